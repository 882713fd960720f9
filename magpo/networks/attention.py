"""Multi-head attention over the agents of one timestep (Vaswani et al., 2017).

More axis letters: B environments, H heads, D features of a head, F embedding features = H * D.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magpo.networks.kernels import write_in_place
from magpo.networks.torsos import Dense, affine, mask_out, orthogonal, parts
from magpo.types import Array


class Weights(NamedTuple):
    """An attention layer's weights in the form in which they are applied.

    With one head, the keys' projection is folded into the queries' and the values' into the
    output's. Keys and values are then the layer's inputs themselves, which saves two matmuls.
    """

    query: Array  # (F, H * D)
    query_bias: Array  # (H * D,)
    key_value: tuple[Array, Array] | None  # (F, 2 * H * D), (2 * H * D,)
    output: Array  # (H * D, F)
    output_bias: Array  # (F,)

    def project(self, x_query: Array, x_key: Array) -> tuple[Array, tuple[Array, ...]]:
        """Return queries (..., F), and keys and values; one array if both are the same."""
        query = affine(x_query, self.query, self.query_bias)
        if self.key_value is None:
            return query, (x_key,)
        return query, tuple(jnp.split(affine(x_key, *self.key_value), 2, axis=-1))

    def decode_step(
        self, x_query: Array, x_key: Array, cache: tuple[Array, ...], agent: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        """Attend from the token (B, F) of agent `agent` to itself and the earlier agents' tokens.

        Returns the output (B, F), and the cache with the agent's entry: keys and values, each
        (B, H, N, D), or one array if both are the same.
        """
        batch, n_head, num_agents, width = cache[0].shape
        query, entry = self.project(x_query, x_key)
        query, key, value = (x.reshape(-1, 1, width) for x in (query, entry[0], entry[-1]))
        keys, values = (x.reshape(-1, num_agents, width) for x in (cache[0], cache[-1]))
        earlier_scores = jnp.einsum("biw,bnw->bin", query, keys)  # (B * H, 1, N)
        earlier_scores = mask_out(earlier_scores, jnp.arange(num_agents) < agent)
        own_score = jnp.einsum("biw,biw->bi", query, key)[..., None]
        share = jax.nn.softmax(jnp.concatenate([earlier_scores, own_score], axis=-1))
        mean = jnp.einsum("bin,bnw->biw", share[..., :-1], values) + share[..., -1:] * value
        by_head = (batch, n_head, width)
        entry = tuple(x.reshape(by_head) for x in entry)
        cache = write_in_place(cache, entry, agent, result=mean.reshape(by_head))
        return affine(mean.reshape(x_query.shape), self.output, self.output_bias), cache


class Attention(nn.Module):
    """One attention layer over the agents."""

    embed_dim: int
    n_head: int

    def setup(self) -> None:
        init = orthogonal(0.01)
        self.query = Dense(self.embed_dim, kernel_init=init)
        self.key_value = Dense(2 * self.embed_dim, kernel_init=parts(init, 2))
        self.output = Dense(self.embed_dim, kernel_init=init)

    def __call__(self, x_query: Array, x_key: Array, causal: bool) -> Array:
        """Attend from all agents' tokens at once, (..., N, F) to (..., N, F).

        If `causal`, an agent sees itself and the agents before it, otherwise all.
        """
        if self.is_initializing():
            for layer in (self.query, self.key_value, self.output):
                layer(x_query)
        weights, num_agents = self.weights(), x_key.shape[-2]
        query, entry = weights.project(x_query, x_key)
        # A CPU is slow at products of a few agents' tokens, so several timesteps share one product.
        at_once = 2 ** max(0, (32 // num_agents).bit_length() - 1)
        at_once = math.gcd(math.prod(x_key.shape[:-2]), at_once)
        grouped = (-1, at_once * num_agents, self.n_head, self.embed_dim // self.n_head)
        query, key, value = (
            x.reshape(grouped).swapaxes(1, 2) for x in (query, entry[0], entry[-1])
        )
        seen = np.tri(num_agents) if causal else np.ones((num_agents, num_agents))
        visible = jnp.asarray(np.kron(np.eye(at_once), seen), bool)
        scores = mask_out(query @ key.mT, visible)
        attended = (jax.nn.softmax(scores) @ value).swapaxes(1, 2)
        return affine(attended.reshape(x_query.shape), weights.output, weights.output_bias)

    def weights(self) -> Weights:
        """Return the weights in the form in which they are applied."""
        scale = (self.embed_dim // self.n_head) ** -0.5
        query, key_value, output = (
            layer.variables["params"] for layer in (self.query, self.key_value, self.output)
        )
        weights = Weights(
            query=scale * query["kernel"],
            query_bias=scale * query["bias"],
            key_value=(key_value["kernel"], key_value["bias"]),
            output=output["kernel"],
            output_bias=output["bias"],
        )
        if self.n_head > 1:
            return weights
        to_key, to_value = jnp.split(key_value["kernel"], 2, axis=1)
        _, value_bias = jnp.split(key_value["bias"], 2)  # a key bias moves all scores alike
        return Weights(
            query=weights.query @ to_key.T,
            query_bias=weights.query_bias @ to_key.T,
            key_value=None,
            output=to_value @ weights.output,
            output_bias=value_bias @ weights.output + weights.output_bias,
        )
