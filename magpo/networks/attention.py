"""Multi-head attention over the agents of one timestep (Vaswani et al., 2017).

More axis letters: B environments, H heads, D features of a head, F embedding features = H * D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magpo.networks.kernels import write_in_place
from magpo.networks.torsos import Dense, mask_out, orthogonal, parts
from magpo.types import Array


class DecodeWeights(NamedTuple):
    """An attention layer's weights, arranged for acting.

    With one head the keys' projection is multiplied into the queries', the values' into the
    output's; keys and values are then the layer's inputs themselves.
    """

    query: Array  # (F, H * D)
    query_bias: Array  # (H * D,)
    key_value: tuple[Array, Array] | None  # (F, 2 * H * D), (2 * H * D,)
    output: Array  # (H * D, F)
    output_bias: Array  # (F,)

    def decode_step(
        self, x_query: Array, x_key: Array, cache: tuple[Array, ...], agent: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        """Attend from agent `agent`'s token, (B, F), to its own and those of the agents before it.

        Returns the output, (B, F), and the cache with the agent's entry: keys and values, each
        (B, H, N, D), or, where they are the same, one of them.
        """
        batch, n_head, num_agents, width = cache[0].shape
        entry: tuple[Array, ...] = (x_key,)
        if self.key_value is not None:
            kernel, bias = self.key_value
            entry = tuple(jnp.split(x_key @ kernel + bias, 2, axis=-1))
        query, key, value = (
            x.reshape(-1, 1, width)  # (B * H, 1, D)
            for x in (x_query @ self.query + self.query_bias, entry[0], entry[-1])
        )
        keys, values = (x.reshape(-1, num_agents, width) for x in (cache[0], cache[-1]))
        earlier_scores = jnp.einsum("biw,bnw->bin", query, keys)
        earlier_scores = mask_out(earlier_scores, jnp.arange(num_agents) < agent)
        own_score = jnp.einsum("biw,biw->bi", query, key)[..., None]
        share = jax.nn.softmax(jnp.concatenate([earlier_scores, own_score], axis=-1))
        mean = jnp.einsum("bin,bnw->biw", share[..., :-1], values) + share[..., -1:] * value
        by_head = (batch, n_head, width)
        entry = tuple(x.reshape(by_head) for x in entry)
        cache = write_in_place(cache, entry, agent, result=mean.reshape(by_head))
        return mean.reshape(x_query.shape) @ self.output + self.output_bias, cache


class Attention(nn.Module):
    """One attention layer over the agents."""

    embed_dim: int
    n_head: int

    def setup(self) -> None:
        init = orthogonal(0.01)
        self.query = Dense(self.embed_dim, kernel_init=init)
        self.key_value = Dense(2 * self.embed_dim, kernel_init=parts(init, 2))
        self.output = Dense(self.embed_dim, kernel_init=init)

    def _project(self, x_query: Array, x_key: Array) -> tuple[Array, Array, Array]:
        """Project (..., F) inputs to queries, keys and values, (..., H, D) each."""
        heads = (*x_key.shape[:-1], self.n_head, self.embed_dim // self.n_head)
        key, value = jnp.split(self.key_value(x_key), 2, axis=-1)
        scale = heads[-1] ** -0.5
        return (
            scale * self.query(x_query).reshape(heads),
            key.reshape(heads),
            value.reshape(heads),
        )

    def __call__(self, x_query: Array, x_key: Array, causal: bool) -> Array:
        """Attend from all agents' tokens at once, (..., N, F) to (..., N, F).

        `causal`: an agent sees itself and the agents before it, else all.
        """
        query, key, value = self._project(x_query, x_key)
        scores = jnp.einsum("...ihd,...jhd->...hij", query, key)
        if causal:
            scores = mask_out(scores, jnp.tri(scores.shape[-1], dtype=bool))
        attended = jnp.einsum("...hij,...jhd->...ihd", jax.nn.softmax(scores), value)
        mixed: Array = self.output(attended.reshape(x_query.shape))
        return mixed

    def decode_weights(self) -> DecodeWeights:
        """Return the weights, arranged for acting."""
        scale = (self.embed_dim // self.n_head) ** -0.5
        query, key_value, output = (
            layer.variables["params"] for layer in (self.query, self.key_value, self.output)
        )
        weights = DecodeWeights(
            query=scale * query["kernel"],
            query_bias=scale * query["bias"],
            key_value=(key_value["kernel"], key_value["bias"]),
            output=output["kernel"],
            output_bias=output["bias"],
        )
        if self.n_head > 1:
            return weights
        to_key, to_value = jnp.split(key_value["kernel"], 2, axis=1)
        _, value_bias = jnp.split(key_value["bias"], 2)  # the keys' adds the same to all scores
        return DecodeWeights(
            query=weights.query @ to_key.T,
            query_bias=weights.query_bias @ to_key.T,
            key_value=None,
            output=to_value @ weights.output,
            output_bias=value_bias @ weights.output + weights.output_bias,
        )
