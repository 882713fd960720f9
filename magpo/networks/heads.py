"""Policy heads: features to a distribution over one agent's action.

A distribution's `sample`, `mode` and `log_prob` speak of *raw* actions: a squashed Gaussian's are
those before tanh, which makes its log-prob exact also where tanh saturates.
"""

from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import orthogonal, zeros_init

from magpo.networks.torsos import Dense
from magpo.types import Array

_LOG_2 = 0.6931471805599453
_HALF_LOG_2PI = 0.9189385332046727


class Categorical(NamedTuple):
    """Discrete actions. Illegal ones have probability exactly 0 and add 0 to entropy and KL."""

    log_probs: Array  # (..., A), the dtype's lowest value where illegal

    def sample(self, key: Array) -> Array:
        return jax.random.categorical(key, self.log_probs)  # (...) int32

    def mode(self) -> Array:
        return jnp.argmax(self.log_probs, axis=-1)

    def log_prob(self, action: Array) -> Array:
        return jnp.take_along_axis(self.log_probs, action[..., None], axis=-1)[..., 0]

    def entropy(self, key: Array) -> Array:
        del key
        return -jnp.sum(jnp.exp(self.log_probs) * self.log_probs, axis=-1)

    def kl(self, other: "Categorical") -> Array:
        """KL(self || other), both under the same action mask."""
        return jnp.sum(jnp.exp(self.log_probs) * (self.log_probs - other.log_probs), axis=-1)


class TanhNormal(NamedTuple):
    """Continuous actions in (-1, 1). Masked (padded) dimensions are 0; they leave log-prob, entropy
    and KL."""

    mean: Array  # (..., A), before tanh
    std: Array  # (..., A)
    mask: Array  # (..., A) bool

    def sample(self, key: Array) -> Array:
        noise = jax.random.normal(key, self.mean.shape)
        return jnp.where(self.mask, self.mean + self.std * noise, 0.0)

    def mode(self) -> Array:
        return jnp.where(self.mask, self.mean, 0.0)

    def log_prob(self, action: Array) -> Array:
        normal = -0.5 * ((action - self.mean) / self.std) ** 2 - jnp.log(self.std) - _HALF_LOG_2PI
        log_slope = 2.0 * (_LOG_2 - action - jax.nn.softplus(-2.0 * action))  # log(1 - tanh^2)
        return jnp.sum(jnp.where(self.mask, normal - log_slope, 0.0), axis=-1)

    def entropy(self, key: Array) -> Array:
        """One reparametrised sample: a squashed Gaussian's entropy has no closed form."""
        return -self.log_prob(self.sample(key))

    def kl(self, other: "TanhNormal") -> Array:
        """KL(self || other) of the Gaussians underneath: tanh is a bijection."""
        variance_ratio = (self.std / other.std) ** 2
        shift = ((self.mean - other.mean) / other.std) ** 2
        kl = 0.5 * (variance_ratio + shift - 1.0 - jnp.log(variance_ratio))
        return jnp.sum(jnp.where(self.mask, kl, 0.0), axis=-1)


class Distribution(Protocol):
    """What both have in common."""

    def sample(self, key: Array) -> Array: ...

    def mode(self) -> Array: ...

    def log_prob(self, action: Array) -> Array: ...

    def entropy(self, key: Array) -> Array: ...

    def kl(self, other: Any) -> Array: ...


ActionKind = Literal["discrete", "continuous"]


def executed_action(action: Array, action_kind: ActionKind) -> Array:
    """What the environment, and an autoregressive decoder, is given for a raw action."""
    return action if action_kind == "discrete" else jnp.tanh(action)


class PolicyHead(nn.Module):
    """(..., D) features and an (..., A) action mask to a `Policy`."""

    action_dim: int
    action_kind: ActionKind

    @nn.compact
    def __call__(self, features: Array, action_mask: Array) -> Distribution:
        output = Dense(self.action_dim, kernel_init=orthogonal(0.01))(features)
        if self.action_kind == "discrete":
            output = jnp.where(action_mask, output, jnp.finfo(output.dtype).min)
            return Categorical(jax.nn.log_softmax(output))
        log_std = self.param("log_std", zeros_init(), (self.action_dim,))
        std = jnp.broadcast_to(jax.nn.softplus(log_std) + 1e-3, output.shape)
        return TanhNormal(output, std, action_mask)
