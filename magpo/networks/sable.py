"""Sable: an autoregressive joint policy and its values, by retention (Mahjoub et al., 2025).

An encoder reads all agents' observations over all timesteps and returns each agent's value; a
decoder returns each agent's policy from the encoding and the actions of the agents before it. Axis
letters beyond `magpo.types`: B sequences, H heads, D features of a head, F = H * D.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from magpo.networks.autoregressive import AgentInputs, JointAction, decode, shift_actions
from magpo.networks.heads import ActionKind, Distribution, PolicyHead
from magpo.networks.kernels import apply_blocks
from magpo.networks.retention import (
    Cache,
    ChunkWeights,
    Entering,
    Recalled,
    Retention,
    chunk_weights,
    decays,
    timestep_weights,
)
from magpo.networks.torsos import Dense, RMSNorm, SwiGLU, orthogonal, sinusoidal_encoding
from magpo.types import Array, Observation


class SableCarry(NamedTuple):
    """The retention states, (B, H, D, D) for each block; empty without memory."""

    encoder: tuple[Any, ...]
    decoder_self: tuple[Any, ...]
    decoder_cross: tuple[Any, ...]


_Caches = list[tuple[Cache, Cache]]  # of self- and cross-retention, for each block


class _Block(nn.Module):
    embed_dim: int
    n_head: int
    ffn: bool
    num_norms: int

    def setup(self) -> None:
        self.norms = [RMSNorm() for _ in range(self.num_norms)]
        if self.ffn:
            self.feed_forward = SwiGLU()

    def add_and_feed_forward(self, x: Array, retained: Array) -> Array:
        x = self.norms[-2](x + retained)
        normalised: Array = self.norms[-1](x + self.feed_forward(x) if self.ffn else x)
        return normalised


class _EncoderBlock(_Block):
    num_norms: int = 2

    def setup(self) -> None:
        super().setup()
        self.retention = Retention(self.embed_dim, self.n_head)

    def chunkwise(self, x: Array, position: Array, state: Array, weights: ChunkWeights) -> Array:
        x_key = x + position
        retained = self.retention.chunkwise(x_key, x_key, state, weights, causal=False)
        return self.add_and_feed_forward(x, retained)

    def encode_step(self, x: Array, position: Array, state: Entering) -> tuple[Array, Array]:
        retained, after = self.retention.encode_step(x + position, state)
        return self.add_and_feed_forward(x, retained), after


class _DecoderBlock(_Block):
    num_norms: int = 3

    def setup(self) -> None:
        super().setup()
        self.self_retention = Retention(self.embed_dim, self.n_head)
        self.cross_retention = Retention(self.embed_dim, self.n_head)

    def chunkwise(
        self,
        x: Array,
        encoded: Array,
        position: Array,
        states: tuple[Array, Array],
        weights: ChunkWeights,
    ) -> Array:
        x_key = x + position
        retained = self.self_retention.chunkwise(x_key, x_key, states[0], weights, causal=True)
        x_key = self.norms[0](x + retained) + position
        retained = self.cross_retention.chunkwise(
            encoded + position, x_key, states[1], weights, causal=True
        )
        return self.add_and_feed_forward(encoded, retained)

    def decode_step(
        self,
        x: Array,
        encoded: Array,
        position: Array,
        state: Entering,
        recalled: Recalled,
        caches: tuple[Cache, Cache],
        agent: Array,
    ) -> tuple[Array, tuple[Cache, Cache]]:
        """Decode one agent's token (B, F).

        `state` enters self-retention; `recalled` is for cross-retention.
        """
        x_key = x + position
        own = Recalled(*(x[:, 0] for x in self.self_retention.recall(x_key[:, None], state)))
        retained, self_cache = self.self_retention.decode_step(own, x_key, caches[0], agent)
        x_key = self.norms[0](x + retained) + position
        retained, cross_cache = self.cross_retention.decode_step(recalled, x_key, caches[1], agent)
        return self.add_and_feed_forward(encoded, retained), (self_cache, cross_cache)


class Sable(nn.Module):
    """The joint policy and the values of all agents.

    `ffn: false` leaves out the feed-forward layers, `memory: false` the earlier timesteps.
    """

    num_agents: int
    action_dim: int
    action_kind: ActionKind
    embed_dim: int
    n_head: int
    n_block: int
    decay_scaling_factor: float
    chunk_size: int  # timesteps
    ffn: bool = True
    memory: bool = True

    def setup(self) -> None:
        def dense(bias: bool) -> nn.Module:
            return Dense(self.embed_dim, use_bias=bias, kernel_init=orthogonal(2**0.5))

        self.kappa = decays(self.n_head, self.decay_scaling_factor)
        block = (self.embed_dim, self.n_head, self.ffn)
        self.embed_observation = nn.Sequential([RMSNorm(), dense(False), nn.gelu])
        self.encoder_norm = RMSNorm()  # one for all encoder blocks
        self.encoder = [_EncoderBlock(*block) for _ in range(self.n_block)]
        self.value_torso = nn.Sequential([dense(True), nn.gelu, RMSNorm()])
        self.value_head = Dense(1, kernel_init=orthogonal(0.01))
        self.embed_action = nn.Sequential([dense(False), nn.gelu])
        self.decoder_norm = RMSNorm()
        self.decoder = [_DecoderBlock(*block) for _ in range(self.n_block)]
        self.policy_torso = nn.Sequential([dense(True), nn.gelu, RMSNorm()])
        self.policy_head = PolicyHead(self.action_dim, self.action_kind)

    def initial_carry(self, batch_size: int) -> SableCarry:
        """Return the carry at an episode's start."""
        return self._zero_states(batch_size) if self.memory else SableCarry((), (), ())

    def _zero_states(self, batch_size: int) -> SableCarry:
        head_dim = self.embed_dim // self.n_head
        state = jnp.zeros((batch_size, self.n_head, head_dim, head_dim))
        return SableCarry(*[(state,) * self.n_block] * 3)

    def __call__(
        self, carry: SableCarry, observation: Observation, action: Array, reset_before: Array
    ) -> tuple[Array, Distribution]:
        """Return the values and distributions (B, T, N) of sequences that start from `carry`.

        Args:
            observation: leading axes (B, T).
            action: (B, T, N[, A]), raw; each agent's distribution depends on those before it.
            reset_before: (B, T) bool, where an episode starts.
        """
        chex.assert_shape(observation.agents_view, (*reset_before.shape, self.num_agents, None))
        chex.assert_equal_shape_prefix((observation.agents_view, action), 3)
        if self.memory:
            chunk_size = min(self.chunk_size, reset_before.shape[1])
            weights = chunk_weights(reset_before, self.num_agents, chunk_size, self.kappa)
        else:
            weights = timestep_weights(self.num_agents)
            carry = SableCarry(*[(None,) * self.n_block] * 3)
        position = self._position(observation)
        x = self.embed_observation(observation.agents_view)
        encoded = self._apply_blocks("encoder", x, carry.encoder, position, weights)
        previous = shift_actions(action, self.action_dim, self.action_kind)
        x = self.decoder_norm(self.embed_action(previous))
        states = list(zip(carry.decoder_self, carry.decoder_cross, strict=True))
        x = self._apply_blocks("decoder", x, states, encoded, position, weights)
        distribution = self.policy_head(self.policy_torso(x), observation.action_mask)
        return self._value(encoded), distribution

    def value(self, carry: SableCarry, observation: Observation, reset_before: Array) -> Array:
        """Return one timestep's values (B, N); the arguments have a leading axis B."""
        return self._encode(self._entering(carry, reset_before), observation)[1]

    def act(
        self,
        carry: SableCarry,
        observation: Observation,
        reset_before: Array,
        key: Array,
        greedy: bool = False,
    ) -> JointAction:
        """Act for one timestep, one agent after the other; the arguments have a leading axis B."""
        chex.assert_shape(observation.agents_view, (*reset_before.shape, self.num_agents, None))
        entering = self._entering(carry, reset_before)
        encoded, value, encoder_states = self._encode(entering, observation)
        position = self._position(observation)  # (B, 1, F)
        recalled = [
            block.cross_retention.recall(encoded + position, state)
            for block, state in zip(self.decoder, entering.decoder_cross, strict=True)
        ]
        head_dim = self.embed_dim // self.n_head
        empty = jnp.zeros((len(value), self.n_head, self.num_agents, head_dim))

        def decode_agent(
            caches: _Caches, previous: Array, agent: AgentInputs
        ) -> tuple[_Caches, Distribution]:
            x, new_caches = self.decoder_norm(self.embed_action(previous)), []
            encoded, recalled = agent.encoded
            blocks = zip(self.decoder, entering.decoder_self, recalled, caches, strict=True)
            for block, state, cross, cache in blocks:
                x, cache = block.decode_step(
                    x, encoded, position[:, 0], state, cross, cache, agent.agent
                )
                new_caches.append(cache)
            return new_caches, self.policy_head(self.policy_torso(x), agent.action_mask)

        caches = [(Cache(empty, empty), Cache(empty, empty)) for _ in self.decoder]
        mask = observation.action_mask
        caches, action, log_prob = decode(
            decode_agent, caches, (encoded, recalled), mask, key, self.action_kind, greedy
        )
        if not self.memory:
            return JointAction(self.initial_carry(len(value)), action, log_prob, value)
        of_self, of_cross = zip(*caches, strict=True)

        def after(states: Sequence[Entering], caches: Sequence[Cache]) -> tuple[Array, ...]:
            return tuple(s.plus(*cache) for s, cache in zip(states, caches, strict=True))

        carry = SableCarry(
            encoder_states,
            after(entering.decoder_self, of_self),
            after(entering.decoder_cross, of_cross),
        )
        return JointAction(carry, action, log_prob, value)

    def encoder_block(
        self, i: int, x: Array, state: Array, position: Array, weights: ChunkWeights
    ) -> Array:
        return self.encoder[i].chunkwise(self.encoder_norm(x), position, state, weights)

    def decoder_block(
        self,
        i: int,
        x: Array,
        states: tuple[Array, Array],
        encoded: Array,
        position: Array,
        weights: ChunkWeights,
    ) -> Array:
        return self.decoder[i].chunkwise(x, encoded, position, states, weights)

    def _apply_blocks(self, stack: str, x: Array, states: Sequence[Any], *inputs: Any) -> Array:
        """Apply a stack's blocks, "encoder" or "decoder", to `x`."""
        method = f"{stack}_block"
        if self.is_initializing():
            for i, state in enumerate(states):
                getattr(self, method)(i, x, state, *inputs)
        module, variables = self.unbind()
        params = variables["params"]
        block_params = [params[f"{stack}_{i}"] for i in range(self.n_block)]

        def block(block_params: Any, x: Array, state: Any) -> Array:
            variables = {"params": {**params, f"{stack}_0": block_params}}
            after: Array = module.apply(variables, 0, x, state, *inputs, method=method)
            return after

        return apply_blocks(block, x, block_params, states)

    def _entering(self, carry: SableCarry, reset_before: Array) -> SableCarry:
        """Return the states that enter a timestep, decayed, or zero where an episode starts."""
        if not self.memory:
            carry = self._zero_states(len(reset_before))
        keep = jnp.where(reset_before[:, None], 0.0, jnp.asarray(self.kappa, jnp.float32))
        entering: SableCarry = jax.tree.map(lambda state: Entering(state, keep), carry)
        return entering

    def _encode(
        self, carry: SableCarry, observation: Observation
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """Return the encoding (B, N, F), the values (B, N) and the encoder's states after it."""
        position = self._position(observation)
        x = self.embed_observation(observation.agents_view)  # (B, N, F)
        states = []
        for i, block in enumerate(self.encoder):
            x, state = block.encode_step(self.encoder_norm(x), position, carry.encoder[i])
            states.append(state)
        return x, self._value(x), tuple(states)

    def _value(self, encoded: Array) -> Array:
        value: Array = self.value_head(self.value_torso(encoded))[..., 0]
        return value

    def _position(self, observation: Observation) -> Array:
        """Return the positional encoding (..., 1, F), the same for all agents of a timestep."""
        return sinusoidal_encoding(observation.step_count[..., None], self.embed_dim)
