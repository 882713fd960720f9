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


class Folded(NamedTuple):
    """What acting needs of an attention layer: a query's projection with the keys', the values'
    with the output's. Queries, keys and values themselves are never formed then."""

    seek: Array  # (F, H * F)
    seek_bias: Array  # (H * F,)
    tell: Array  # (H * F, F)
    tell_bias: Array  # (F,)


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

    def folded(self) -> Folded:
        """The layer's projections, multiplied out."""
        heads = (-1, self.n_head, self.embed_dim // self.n_head)
        query, key_value, output = (
            layer.variables["params"] for layer in (self.query, self.key_value, self.output)
        )
        to_query = heads[-1] ** -0.5 * query["kernel"].reshape(heads)  # (F, H, D)
        to_key, to_value = (k.reshape(heads) for k in jnp.split(key_value["kernel"], 2, axis=1))
        _, value_bias = jnp.split(key_value["bias"], 2)  # the keys' adds to all scores alike
        to_output = output["kernel"].reshape(*heads[1:], -1)  # (H, D, F)
        query_bias = heads[-1] ** -0.5 * query["bias"].reshape(heads[1:])
        return Folded(
            seek=jnp.einsum("fhd,ghd->fhg", to_query, to_key).reshape(self.embed_dim, -1),
            seek_bias=jnp.einsum("hd,ghd->hg", query_bias, to_key).reshape(-1),
            tell=jnp.einsum("ghd,hdf->hgf", to_value, to_output).reshape(-1, self.embed_dim),
            tell_bias=value_bias @ output["kernel"] + output["bias"],
        )


def token(
    layer: Folded, x_query: Array, x_key: Array, cache: Array, agent: Array
) -> tuple[Array, Array]:
    """Agent `agent`'s token, (B, F), seeing those of the agents before it, and the cache after it.

    The cache is of their `x_key`, (B, 1, N, F): half of what their keys and values would be.
    """
    sought = (x_query @ layer.seek + layer.seek_bias).reshape(len(x_query), -1, x_key.shape[-1])
    past = jnp.einsum("bhf,bnf->bhn", sought, cache[:, 0])
    past = jnp.where(jnp.arange(past.shape[-1]) < agent, past, jnp.finfo(past.dtype).min)
    own = jnp.einsum("bhf,bf->bh", sought, x_key)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([past, own], axis=-1))
    mean = jnp.einsum("bhn,bnf->bhf", weights[..., :-1], cache[:, 0])
    mean += weights[..., -1:] * x_key[:, None]
    cache = written(cache, x_key[:, None], agent, read=mean[:, :1])
    return mean.reshape(len(x_query), -1) @ layer.tell + layer.tell_bias, cache
