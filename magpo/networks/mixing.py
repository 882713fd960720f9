"""QMIX's mixing network (Rashid et al., 2018).

Axis letters beyond `magpo.types`: K hidden units of the mixing network.
"""

import jax.numpy as jnp
from flax import linen as nn

from magpo.networks.torsos import Dense, orthogonal
from magpo.types import Array


class HyperNetwork(nn.Module):
    """Two dense layers from the global state to weights of the mixing network."""

    hidden_dim: int
    num_outputs: int
    init_scale: float

    @nn.compact
    def __call__(self, global_state: Array) -> Array:
        init = orthogonal(self.init_scale)
        hidden = nn.relu(Dense(self.hidden_dim, kernel_init=init)(global_state))
        weights: Array = Dense(self.num_outputs, kernel_init=init)(hidden)
        return weights


class Mixer(nn.Module):
    """The team's value from the agents' values, which it never decreases with.

    Hypernetworks make its weights from the global state; the weights on values are not negative.
    """

    embed_dim: int
    hypernet_dim: int
    init_scale: float

    @nn.compact
    def __call__(self, value: Array, global_state: Array) -> Array:
        """Return the team's value (...) for the agents' values (..., N) and the state (..., G)."""
        num_agents, width = value.shape[-1], self.embed_dim

        def weights(hidden_dim: int, num_outputs: int) -> Array:
            return HyperNetwork(hidden_dim, num_outputs, self.init_scale)(global_state)

        first = jnp.abs(weights(self.hypernet_dim, num_agents * width))
        first = first.reshape(*value.shape, width)  # (..., N, K)
        bias = Dense(width, kernel_init=orthogonal(self.init_scale))(global_state)
        hidden = nn.elu(jnp.einsum("...n,...nk->...k", value, first) + bias)
        second = jnp.abs(weights(self.hypernet_dim, width))
        return (hidden * second).sum(-1) + weights(width, 1)[..., 0]
