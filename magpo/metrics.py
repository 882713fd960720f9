"""Training metrics that all systems record, and means over some of the agents."""

import jax.numpy as jnp

from magpo.types import Array, Metrics, TimeStep


def episode_sums(timestep: TimeStep) -> Metrics:
    """Return () sums of the metrics over those of E episodes that ended, and their number."""
    metrics = {"episodes": jnp.ones_like(timestep.discount), **timestep.metrics}
    return {name: jnp.where(timestep.last(), x, 0).sum() for name, x in metrics.items()}


def episode_means(sums: Metrics) -> Metrics:
    """Return `rollout/*`: the number of episodes, and means per episode, 0 where none ended."""
    number = sums["episodes"]
    return {
        f"rollout/{name}": number if name == "episodes" else total / jnp.maximum(number, 1)
        for name, total in sums.items()
    }


def masked_mean(values: Array, where: Array | None) -> Array:
    """Return the mean of the values that `where` marks, 0 if it marks none; None marks all."""
    if where is None:
        return values.mean()
    return jnp.where(where, values, 0.0).sum() / jnp.maximum(where.sum(), 1)


def explained_variance(value: Array, target: Array) -> Array:
    """Return the share of the targets' variance that the values explain, at most 1."""
    return 1.0 - (target - value).var() / jnp.maximum(target.var(), 1e-8)
