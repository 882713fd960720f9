"""Multi-head attention over the agents of one timestep (Vaswani et al., 2017).

More axis letters: B environments, H heads, D features of a head, F embedding features = H * D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import orthogonal

from magpo.networks.torsos import Dense, parts
from magpo.types import Array


class KeysValues(NamedTuple):
    """Of the agents that have acted, each (B, N, H, D)."""

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
        cache = jax.tree.map(
            lambda past, new: jax.lax.dynamic_update_slice_in_dim(past, new[:, None], agent, 1),
            cache,
            KeysValues(key, value),
        )
        scores = jnp.einsum("bhd,bnhd->bhn", query, cache.key)
        seen = jnp.arange(scores.shape[-1]) <= agent
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min))
        attended = jnp.einsum("bhn,bnhd->bhd", weights, cache.value)
        return self.output(attended.reshape(x_query.shape)), cache
