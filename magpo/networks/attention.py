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


class TokenWeights(NamedTuple):
    """What acting needs of an attention layer. With one head a query's projection is multiplied out
    with the keys', the values' with the output's: keys and values are then the inputs as they are.
    """

    query: Array  # (F, H * D)
    query_bias: Array  # (H * D,)
    key_value: tuple[Array, Array] | None  # (F, 2 * H * D), (2 * H * D,)
    output: Array  # (H * D, F)
    output_bias: Array  # (F,)


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

    def token_weights(self) -> TokenWeights:
        """The layer's weights for `token`."""
        scale = (self.embed_dim // self.n_head) ** -0.5
        query, key_value, output = (
            layer.variables["params"] for layer in (self.query, self.key_value, self.output)
        )
        layer = TokenWeights(
            query=scale * query["kernel"],
            query_bias=scale * query["bias"],
            key_value=(key_value["kernel"], key_value["bias"]),
            output=output["kernel"],
            output_bias=output["bias"],
        )
        if self.n_head > 1:
            return layer
        to_key, to_value = jnp.split(key_value["kernel"], 2, axis=1)
        _, value_bias = jnp.split(key_value["bias"], 2)  # the keys' adds to all scores alike
        return TokenWeights(
            query=layer.query @ to_key.T,
            query_bias=layer.query_bias @ to_key.T,
            key_value=None,
            output=to_value @ layer.output,
            output_bias=value_bias @ layer.output + layer.output_bias,
        )


def token(
    layer: TokenWeights, x_query: Array, x_key: Array, cache: tuple[Array, ...], agent: Array
) -> tuple[Array, tuple[Array, ...]]:
    """Agent `agent`'s token, (B, F), seeing those of the agents before it, and the cache after it.

    The cache is of keys and of values, (B, H, N, D), or, where they are the same, of one of them.
    """
    batch, n_head, num_agents, width = cache[0].shape
    own: tuple[Array, ...] = (x_key,)
    if layer.key_value is not None:
        kernel, bias = layer.key_value
        own = tuple(jnp.split(x_key @ kernel + bias, 2, axis=-1))
    query, key, value = (
        x.reshape(-1, 1, width)  # (B * H, 1, D)
        for x in (x_query @ layer.query + layer.query_bias, own[0], own[-1])
    )
    keys, values = (x.reshape(-1, num_agents, width) for x in (cache[0], cache[-1]))
    past = jnp.einsum("biw,bnw->bin", query, keys)
    past = jnp.where(jnp.arange(num_agents) < agent, past, jnp.finfo(past.dtype).min)
    now = jnp.einsum("biw,biw->bi", query, key)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([past, now], axis=-1))
    mean = jnp.einsum("bin,bnw->biw", weights[..., :-1], values) + weights[..., -1:] * value
    by_head = (batch, n_head, width)
    new = tuple(x.reshape(by_head) for x in own)
    cache = written(cache, new, agent, read=mean.reshape(by_head))
    return mean.reshape(x_query.shape) @ layer.output + layer.output_bias, cache
