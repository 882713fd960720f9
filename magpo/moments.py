"""Running moments of value targets, by which critics' values are normalised (`value_norm`).

Without `value_norm` the moments are None, and values stay as they are.
"""

from typing import NamedTuple

import jax.numpy as jnp

from magpo.types import Array

DECAY = 0.99  # of the averages, per update
MIN_VARIANCE = 0.01  # so that the first rare reward is no huge target


class Moments(NamedTuple):
    """Exponential moving averages, () each; their weights add up to `weight`, 0 at the start."""

    weight: Array
    mean: Array
    square: Array


def init(value_norm: bool) -> Moments | None:
    """Return the moments before the first targets; values stay as they are."""
    return Moments(*jnp.zeros(3)) if value_norm else None


def updated(moments: Moments | None, target: Array) -> Moments | None:
    """Return the moments with the targets of one update."""
    if moments is None:
        return None
    new = Moments(jnp.ones(()), target.mean(), (target**2).mean())
    return Moments(*(DECAY * x + (1 - DECAY) * y for x, y in zip(moments, new, strict=True)))


def normalise(moments: Moments | None, value: Array) -> Array:
    """Return values as distances from the mean target, in standard deviations."""
    if moments is None:
        return value
    mean, std = _mean_and_std(moments)
    return (value - mean) / std


def denormalise(moments: Moments | None, value: Array) -> Array:
    """Return what `normalise` was given."""
    if moments is None:
        return value
    mean, std = _mean_and_std(moments)
    return value * std + mean


def _mean_and_std(moments: Moments) -> tuple[Array, Array]:
    weight = jnp.where(moments.weight > 0, moments.weight, 1.0)
    mean = moments.mean / weight
    variance = jnp.maximum(moments.square / weight - mean**2, MIN_VARIANCE)
    return mean, jnp.where(moments.weight > 0, jnp.sqrt(variance), 1.0)
