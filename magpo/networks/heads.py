"""Policy heads, from features to a distribution over one agent's action.

`sample`, `mode` and `log_prob` work on *raw* actions. A squashed Gaussian's raw action is the one
before tanh, so that its log-prob stays exact where tanh saturates.
"""

from typing import Any, Literal, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import zeros_init

from magpo.networks.torsos import Dense, mask_out, orthogonal
from magpo.types import Array

ActionKind = Literal["discrete", "continuous"]


class Distribution(Protocol):
    """Interface shared by Categorical and TanhNormal: pytrees whose leaves are (..., A)."""

    def sample(self, key: Array) -> Array: ...

    def mode(self) -> Array: ...

    def log_prob(self, action: Array) -> Array: ...

    def entropy(self, key: Array) -> Array: ...

    def kl(self, other: Any) -> Array: ...


class Categorical(NamedTuple):
    """Discrete actions. Illegal ones have probability exactly 0 and add 0 to entropy and KL.

    distrax's `log_prob`, `entropy` and `kl_divergence` normalise the log-probs again and multiply
    by one-hot actions, which takes 1.5 times as long.
    """

    log_probs: Array  # (..., A) normalised, the dtype's lowest value where illegal

    def sample(self, key: Array) -> Array:  # (...) int32
        return jax.random.categorical(key, self.log_probs)

    def mode(self) -> Array:
        return jnp.argmax(self.log_probs, axis=-1)

    def log_prob(self, action: Array) -> Array:
        return jnp.take_along_axis(self.log_probs, action[..., None], axis=-1)[..., 0]

    def entropy(self, key: Array) -> Array:
        del key
        return -jnp.sum(jnp.exp(self.log_probs) * self.log_probs, axis=-1)

    def kl(self, other: "Categorical") -> Array:
        """Return KL(self || other); both have the same action mask."""
        return jnp.sum(jnp.exp(self.log_probs) * (self.log_probs - other.log_probs), axis=-1)


class TanhNormal(NamedTuple):
    """Continuous actions in (-1, 1).

    Masked (padded) dimensions are 0 and add nothing to log-prob, entropy and KL.
    """

    mean: Array  # (..., A), before tanh
    std: Array  # (..., A)
    mask: Array  # (..., A) bool

    @property
    def _normal(self) -> Any:
        import distrax  # imported late: takes half a second, for continuous actions only

        return distrax.Normal(self.mean, self.std)

    def _log_slope(self, action: Array) -> Array:
        import distrax

        log_slope: Array = distrax.Tanh().forward_log_det_jacobian(action)
        return log_slope

    def _sum(self, terms: Array) -> Array:
        return jnp.sum(jnp.where(self.mask, terms, 0.0), axis=-1)

    def sample(self, key: Array) -> Array:
        return jnp.where(self.mask, self._normal.sample(seed=key), 0.0)

    def mode(self) -> Array:
        return jnp.where(self.mask, self.mean, 0.0)

    def log_prob(self, action: Array) -> Array:
        return self._sum(self._normal.log_prob(action) - self._log_slope(action))

    def entropy(self, key: Array) -> Array:
        """Estimate the entropy, which has no closed form, from one reparametrised sample."""
        action, log_prob = self._normal.sample_and_log_prob(seed=key)
        return -self._sum(log_prob - self._log_slope(action))

    def kl(self, other: "TanhNormal") -> Array:
        """Return KL(self || other): the KL of the Gaussians, because tanh is a bijection."""
        variance_ratio = (self.std / other.std) ** 2
        shift = ((self.mean - other.mean) / other.std) ** 2
        return self._sum(0.5 * (variance_ratio + shift - 1.0 - jnp.log(variance_ratio)))


class ActionValues(NamedTuple):
    """Values of discrete actions; the policy takes the best legal one."""

    value: Array  # (..., A), the dtype's lowest value where illegal

    def sample(self, key: Array) -> Array:  # (...) int32
        del key
        return self.mode()

    def mode(self) -> Array:
        return jnp.argmax(self.value, axis=-1)

    def of(self, action: Array) -> Array:
        """Return the values (...) of actions (...)."""
        return jnp.take_along_axis(self.value, action[..., None], axis=-1)[..., 0]


def executed_action(action: Array, action_kind: ActionKind) -> Array:
    """Return the action that environments and autoregressive decoders get for a raw action."""
    return action if action_kind == "discrete" else jnp.tanh(action)


class PolicyHead(nn.Module):
    """A linear layer from (..., D) features to a distribution under an (..., A) action mask."""

    action_dim: int
    action_kind: ActionKind

    @nn.compact
    def __call__(self, features: Array, action_mask: Array) -> Distribution:
        chex.assert_shape(action_mask, (*features.shape[:-1], self.action_dim))
        output = Dense(self.action_dim, kernel_init=orthogonal(0.01))(features)
        if self.action_kind == "discrete":
            return Categorical(jax.nn.log_softmax(mask_out(output, action_mask)))
        log_std = self.param("log_std", zeros_init(), (self.action_dim,))
        std = jnp.broadcast_to(jax.nn.softplus(log_std) + 1e-3, output.shape)
        return TanhNormal(output, std, action_mask)
