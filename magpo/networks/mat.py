"""MAT: an autoregressive joint policy and its values, by attention (Wen et al., 2022).

An encoder reads all agents' observations of one timestep and returns each agent's value; a decoder
returns each agent's policy from the encoding and the actions of the agents before it. The methods
are those of `magpo.networks.sable.Sable`, but there is no memory. Axis letters beyond
`magpo.types`: B environments or sequences, F embedding features.
"""

import chex
import jax.numpy as jnp
from flax import linen as nn

from magpo.networks.attention import Attention, Weights
from magpo.networks.autoregressive import AgentInputs, JointAction, decode, shift_actions
from magpo.networks.heads import ActionKind, Distribution, PolicyHead
from magpo.networks.torsos import Dense, LayerNorm, orthogonal
from magpo.types import Array, Observation


def _dense(width: int, gain: float = 2**0.5, use_bias: bool = True) -> nn.Module:
    return Dense(width, use_bias=use_bias, kernel_init=orthogonal(gain))


_Cache = tuple[Array, ...]  # of one attention layer
_Caches = list[tuple[_Cache, _Cache]]  # of self- and cross-attention, for each block


class _EncoderBlock(nn.Module):
    embed_dim: int
    n_head: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        attended = Attention(self.embed_dim, self.n_head)(x, x, causal=False)
        x = LayerNorm()(x + attended)
        mixed = nn.Sequential([_dense(self.embed_dim), nn.gelu, _dense(self.embed_dim, 0.01)])(x)
        normalised: Array = LayerNorm()(x + mixed)
        return normalised


class _DecoderBlock(nn.Module):
    embed_dim: int
    n_head: int

    def setup(self) -> None:
        self.self_attention = Attention(self.embed_dim, self.n_head)
        self.cross_attention = Attention(self.embed_dim, self.n_head)
        self.norms = [LayerNorm() for _ in range(3)]
        self.mix = nn.Sequential([_dense(self.embed_dim), nn.gelu, _dense(self.embed_dim, 0.01)])

    def _add_and_mix(self, encoded: Array, attended: Array) -> Array:
        x = self.norms[1](encoded + attended)
        normalised: Array = self.norms[2](x + self.mix(x))
        return normalised

    def __call__(self, x: Array, encoded: Array) -> Array:
        x = self.norms[0](x + self.self_attention(x, x, causal=True))
        return self._add_and_mix(encoded, self.cross_attention(encoded, x, causal=True))

    def decode_step(
        self,
        x: Array,
        encoded: Array,
        weights: tuple[Weights, Weights],
        caches: tuple[_Cache, _Cache],
        agent: Array,
    ) -> tuple[Array, tuple[_Cache, _Cache]]:
        attended, self_cache = weights[0].decode_step(x, x, caches[0], agent)
        x = self.norms[0](x + attended)
        attended, cross_cache = weights[1].decode_step(encoded, x, caches[1], agent)
        return self._add_and_mix(encoded, attended), (self_cache, cross_cache)

    def weights(self) -> tuple[Weights, Weights]:
        return self.self_attention.weights(), self.cross_attention.weights()


class MAT(nn.Module):
    """The joint policy and the values of all agents."""

    action_dim: int
    action_kind: ActionKind
    embed_dim: int
    n_head: int
    n_block: int

    def setup(self) -> None:
        block = (self.embed_dim, self.n_head)
        embed = self.embed_dim
        self.embed_observation = nn.Sequential([LayerNorm(), _dense(embed), nn.gelu, LayerNorm()])
        self.encoder = [_EncoderBlock(*block) for _ in range(self.n_block)]
        self.value_torso = nn.Sequential([_dense(embed), nn.gelu, LayerNorm()])
        self.value_head = _dense(1, 0.01)
        self.embed_action = nn.Sequential([_dense(embed, use_bias=False), nn.gelu, LayerNorm()])
        self.decoder = [_DecoderBlock(*block) for _ in range(self.n_block)]
        self.policy_torso = nn.Sequential([_dense(embed), nn.gelu, LayerNorm()])
        self.policy_head = PolicyHead(self.action_dim, self.action_kind)

    def initial_carry(self, batch_size: int) -> tuple[()]:
        """Return the empty carry of a network without memory."""
        del batch_size
        return ()

    def __call__(
        self, carry: tuple[()], observation: Observation, action: Array, reset_before: Array | None
    ) -> tuple[Array, Distribution]:
        """Return values and distributions (..., N) for any leading axes.

        `action` (..., N[, A]) is raw. `carry` and `reset_before` are ignored.
        """
        del carry, reset_before
        chex.assert_equal_shape_prefix(
            (observation.agents_view, action), observation.agents_view.ndim - 1
        )
        encoded, value = self._encode(observation)
        x = self.embed_action(shift_actions(action, self.action_dim, self.action_kind))
        for block in self.decoder:
            x = block(x, encoded)
        return value, self.policy_head(self.policy_torso(x), observation.action_mask)

    def value(
        self, carry: tuple[()], observation: Observation, reset_before: Array | None
    ) -> Array:
        """Return one timestep's values (B, N)."""
        del carry, reset_before
        return self._encode(observation)[1]

    def act(
        self,
        carry: tuple[()],
        observation: Observation,
        reset_before: Array | None,
        key: Array,
        greedy: bool = False,
    ) -> JointAction:
        """Act for one timestep, one agent after the other; `observation` has a leading axis B."""
        del reset_before
        chex.assert_rank(observation.agents_view, 3)
        encoded, value = self._encode(observation)
        batch, num_agents = value.shape
        empty = jnp.zeros((batch, self.n_head, num_agents, self.embed_dim // self.n_head))
        weights = [block.weights() for block in self.decoder]

        def decode_agent(
            caches: _Caches, previous: Array, agent: AgentInputs
        ) -> tuple[_Caches, Distribution]:
            x, new_caches = self.embed_action(previous), []
            for block, layers, cache in zip(self.decoder, weights, caches, strict=True):
                x, cache = block.decode_step(x, agent.encoded, layers, cache, agent.agent)
                new_caches.append(cache)
            return new_caches, self.policy_head(self.policy_torso(x), agent.action_mask)

        cache = (empty,) if self.n_head == 1 else (empty, empty)  # keys and values
        caches = [(cache, cache) for _ in self.decoder]
        _, action, log_prob = decode(
            decode_agent, caches, encoded, observation.action_mask, key, self.action_kind, greedy
        )
        return JointAction(carry, action, log_prob, value)

    def _encode(self, observation: Observation) -> tuple[Array, Array]:
        """Return the encoding (..., N, F) and the values (..., N)."""
        x = self.embed_observation(observation.agents_view)
        for block in self.encoder:
            x = block(x)
        return x, self.value_head(self.value_torso(x))[..., 0]
