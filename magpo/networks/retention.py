"""Multi-head retention over the tokens of a multi-agent sequence (Sun et al., 2023; Sable, 2025).

The function has two forms:

- Recurrent, for acting: each environment has a state (H, D, D), which decays once per timestep.
- Chunkwise, for training: an attention-like product inside a chunk of timesteps, and states between
  chunks.

Decay acts between timesteps, never between agents of one timestep, and nothing crosses an episode's
start. Axis letters beyond `magpo.types`: B sequences, K chunks, C timesteps of a chunk, H heads, D
features of a head, F embedding features = H * D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import linen as nn
from flax.linen.initializers import normal

from magpo.networks.kernels import write_in_place
from magpo.networks.torsos import Dense, LayerNorm
from magpo.types import Array

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]


def decays(n_head: int, scaling_factor: float) -> FloatArray:
    """Return kappa (H,), the share of a head's state that a timestep keeps (Sable, Section 3)."""
    slowest, fastest = np.log(1 / 512), np.log(1 / 32)
    kappa: FloatArray = (1 - np.exp(np.linspace(fastest, slowest, n_head))) * scaling_factor
    return kappa


class AcrossChunks(NamedTuple):
    """The weights between chunks: decay, and 0 across episode boundaries."""

    entering: Array  # (B, H, K, C*N, 1) the incoming state's weight at each token
    leaving: Array  # (B, H, K, C*N, 1) each token's weight in its chunk's contribution
    between: Array  # (B, H, K, K) chunk j's weight in the state that enters chunk i
    initial: Array  # (B, H, K, 1, 1) the initial state's weight in the state that enters chunk i


class ChunkWeights(NamedTuple):
    """The weights of chunkwise retention (decay and episode boundaries), shared by all blocks."""

    within: Array  # (B, H, K, C*N, C*N) token j's weight at token i of the same chunk
    causal: Array  # the same, 0 where j is a later agent of i's timestep
    across: AcrossChunks | None  # None where nothing passes from one timestep to the next


def chunk_weights(
    reset_before: Array, num_agents: int, chunk_size: int, kappa: FloatArray
) -> ChunkWeights:
    """Return the weights for episode starts `reset_before` (B, T); `chunk_size` divides T."""
    num_chunks = reset_before.shape[1] // chunk_size
    episode = jnp.cumsum(reset_before, axis=1).reshape(-1, 1, num_chunks, chunk_size)
    first, last = episode[..., 0], episode[..., -1]  # (B, 1, K)

    def same(left: Array, right: Array) -> Array:
        return (left[..., :, None] == right[..., None, :]).astype(jnp.float32)

    def powers(exponent: IntArray) -> FloatArray:
        """Return kappa ** exponent (H, 1, ...), 0 in the future, where the exponent is negative."""
        base = kappa.reshape(-1, 1, *[1] * exponent.ndim)
        return np.where(exponent < 0, 0.0, base ** np.maximum(exponent, 0)).astype(np.float32)

    def per_token(weight: Array) -> Array:  # (B, H, K, C) -> (B, H, K, C*N, 1)
        return jnp.repeat(weight, num_agents, axis=3)[..., None]

    step, chunk = np.arange(chunk_size), np.arange(num_chunks)
    within = same(episode, episode) * powers(step[:, None] - step)  # (B, H, K, C, C)
    within = jnp.repeat(jnp.repeat(within, num_agents, axis=3), num_agents, axis=4)
    chunk_powers = powers(chunk_size * (chunk[:, None] - chunk - 1))[:, 0]
    return ChunkWeights(
        within=within,
        causal=jnp.tril(within),
        across=AcrossChunks(
            entering=per_token((episode == first[..., None]) * powers(step + 1)),
            leaving=per_token((episode == last[..., None]) * powers(chunk_size - 1 - step)),
            between=same(first, last) * chunk_powers,
            initial=((first == 0) * powers(chunk_size * chunk)[:, 0])[..., None, None],
        ),
    )


def timestep_weights(num_agents: int) -> ChunkWeights:
    """Return the weights of timesteps without memory, each of which is a chunk of N tokens."""
    within = jnp.ones((1, 1, 1, num_agents, num_agents))
    return ChunkWeights(within, jnp.tril(within), across=None)


class Retention(nn.Module):
    """One retention layer; its inputs include their positional encoding."""

    embed_dim: int
    n_head: int

    def setup(self) -> None:
        init = normal(1 / self.embed_dim)
        self.query = Dense(self.embed_dim, use_bias=False, kernel_init=init)
        self.key_value_gate = Dense(3 * self.embed_dim, use_bias=False, kernel_init=init)
        self.norm = LayerNorm(self.n_head)
        self.output = Dense(self.embed_dim, use_bias=False, kernel_init=init)

    def heads(self, x: Array) -> Array:
        """Split (..., F) into heads, (..., H, D)."""
        return x.reshape(*x.shape[:-1], self.n_head, -1)

    def ask(self, x: Array) -> Array:
        """Project (..., F) inputs to queries (..., H, D)."""
        return self.heads(self.query(x))

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Project (..., F) inputs to keys and values (..., H, D) and a gate (..., F)."""
        key, value, gate = jnp.split(self.key_value_gate(x), 3, axis=-1)
        return self.heads(key), self.heads(value), gate

    def gate_and_mix(self, retained: Array, gate: Array) -> Array:
        """Normalise each head of each token (..., H, D), gate it and mix the heads to (..., F)."""
        mixed: Array = self.output(nn.swish(gate) * self.norm(retained.reshape(gate.shape)))
        return mixed

    def chunkwise(
        self,
        x_query: Array,
        x_key: Array,
        state: Array | None,
        weights: ChunkWeights,
        causal: bool,
    ) -> Array:
        """Retain over all tokens (B, T, N, F) of a sequence that starts from `state` (B, H, D, D).

        If `causal`, a token sees only itself and the agents before it in its own timestep,
        otherwise all agents. Without a state, or with `timestep_weights`, nothing comes from
        earlier timesteps.
        """
        keys, values, gate = self.project(x_key)
        across = weights.across
        num_tokens = weights.within.shape[-1]

        def chunked(x: Array) -> Array:  # (B, T, N, H, D) -> (B, H, K, C*N, D)
            return jnp.moveaxis(x.reshape(len(x), -1, num_tokens, *x.shape[3:]), 3, 1)

        query, key, value = map(chunked, (self.ask(x_query), keys, values))
        scores = query @ key.mT * (weights.causal if causal else weights.within)
        retained = scores @ value
        if across is not None and state is not None:
            contribution = (key * across.leaving).mT @ value  # (B, H, K, D, D)
            flat = (*contribution.shape[:3], -1)
            entering = across.between @ contribution.reshape(flat)
            entering = entering.reshape(contribution.shape) + across.initial * state[:, :, None]
            retained += (query * across.entering) @ entering
        return self.gate_and_mix(jnp.moveaxis(retained, 1, 3), gate)

    def encode_step(self, x: Array, state: "Entering") -> tuple[Array, Array]:
        """Return what one timestep's tokens (B, N, F) retain, and the state after them.

        Each token sees all tokens of the timestep.
        """
        key, value, gate = self.project(x)
        after = state.plus(key.swapaxes(1, 2), value.swapaxes(1, 2))
        return self.gate_and_mix(_read(self.ask(x), after), gate), after

    def recall(self, x: Array, state: "Entering") -> "Recalled":
        """Return what tokens (B, N, F) retain from earlier timesteps."""
        query = self.ask(x)
        return Recalled(query, state.read(query))

    def decode_step(
        self, recalled: "Recalled", x_key: Array, cache: "Cache", agent: Array
    ) -> tuple[Array, "Cache"]:
        """Retain for the token (B, F) of agent `agent`; `recalled` is (B, H, D) each.

        The state changes only after the timestep's last agent has acted.
        """
        key, value, gate = self.project(x_key)
        scores = jnp.einsum("bhd,bhnd->bhn", recalled.query, cache.key)  # later agents' keys are 0
        retained = recalled.retained + jnp.einsum("bhn,bhne->bhe", scores, cache.value)
        retained += (recalled.query * key).sum(-1, keepdims=True) * value
        cache = write_in_place(cache, Cache(key, value), agent, result=retained)
        return self.gate_and_mix(retained, gate), cache


class Recalled(NamedTuple):
    """Tokens' queries, and what they retain from earlier timesteps, each (B, N, H, D)."""

    query: Array
    retained: Array


class Entering(NamedTuple):
    """The state that enters a timestep: the state that left the one before, times `keep`.

    The product is never written to memory, because states are the largest arrays in acting.
    """

    state: Array  # (B, H, D, D)
    keep: Array  # (B, H)

    def read(self, query: Array) -> Array:
        """Return what tokens with these queries retain; both are (B, N, H, D)."""
        return _read(query * self.keep[:, None, :, None], self.state)

    def plus(self, key: Array, value: Array) -> Array:
        """Return the state after tokens (B, H, N, D), in one pass over the state."""
        kept = self.state * self.keep[..., None, None]

        def add(agent: int, state: Array) -> Array:
            return state + key[:, :, agent, :, None] * value[:, :, agent, None]

        num_agents = key.shape[2]
        return jax.lax.fori_loop(0, num_agents, add, kept, unroll=min(num_agents, 8))


def _read(query: Array, state: Array) -> Array:
    return (query.swapaxes(1, 2) @ state).swapaxes(1, 2)


class Cache(NamedTuple):
    """Keys and values of the timestep being decoded, each (B, H, N, D); 0 for agents to come."""

    key: Array
    value: Array
