"""Multi-head attention over the agents of one timestep (Vaswani et al., 2017).

More axis letters: B environments, H heads, D features of a head, F embedding features = H * D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import orthogonal

from magpo.networks.autoregressive import written
from magpo.networks.torsos import Dense, parts
from magpo.types import Array


class KeysValues(NamedTuple):
    """Of the agents that have acted, each (B, H, N, D)."""

    key: Array
    value: Array


class Attention(nn.Module):
    """One attention layer; `causal`: an agent sees itself and those before it, else all."""

    embed_dim: int
    n_head: int

    def setup(self) -> None:
        init = orthogonal(0.01)
        self.query = Dense(self.embed_dim, kernel_init=init)
        self.key_value = Dense(2 * self.embed_dim, kernel_init=parts(init, 2))
        self.output = Dense(self.embed_dim, kernel_init=init)

    def _project(self, x_query: Array, x_key: Array) -> tuple[Array, Array, Array]:
        """(..., F) inputs to queries, keys and values, (..., H, D) each."""
        heads = (*x_key.shape[:-1], self.n_head, self.embed_dim // self.n_head)
        key, value = jnp.split(self.key_value(x_key), 2, axis=-1)
        scale = heads[-1] ** -0.5
        return (
            scale * self.query(x_query).reshape(heads),
            key.reshape(heads),
            value.reshape(heads),
        )

    def __call__(self, x_query: Array, x_key: Array, causal: bool) -> Array:
        """All agents' tokens, (..., N, F)."""
        query, key, value = self._project(x_query, x_key)
        scores = jnp.einsum("...ihd,...jhd->...hij", query, key)
        if causal:
            seen = jnp.tri(scores.shape[-1], dtype=bool)
            scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        attended = jnp.einsum("...hij,...jhd->...ihd", jax.nn.softmax(scores), value)
        return self.output(attended.reshape(x_query.shape))

    def token(
        self, x_query: Array, x_key: Array, cache: KeysValues, agent: Array
    ) -> tuple[Array, KeysValues]:
        """Agent `agent`'s token, (B, F), seeing those of the agents before it through `cache`."""
        query, key, value = self._project(x_query, x_key)
        before = jnp.arange(cache.key.shape[2]) < agent
        past = jnp.einsum("bhd,bhnd->bhn", query, cache.key)
        past = jnp.where(before, past, jnp.finfo(past.dtype).min)
        own = (query * key).sum(-1, keepdims=True)
        weights = jax.nn.softmax(jnp.concatenate([past, own], axis=-1))
        attended = jnp.einsum("bhn,bhnd->bhd", weights[..., :-1], cache.value)
        attended += weights[..., -1:] * value
        cache = written(cache, KeysValues(key, value), agent, read=attended)
        return self.output(attended.reshape(x_query.shape)), cache
