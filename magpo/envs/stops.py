"""Agents made to stop, which shows whom an advantage blames (GPAE paper, Section 3.1)."""

import jax
import jax.numpy as jnp

from magpo.errors import ConfigError
from magpo.types import Array, EnvSpec, Metrics, Observation


def check(probability: float, spec: EnvSpec) -> None:
    """Raise ConfigError if agents are to be stopped in a game without an action that stops them."""
    if probability and spec.stop_action is None:
        raise ConfigError(f"system.anomaly_probability is for smax/..., not {spec.name}")


def force(
    spec: EnvSpec, probability: float, observation: Observation, action: Array, key: Array
) -> tuple[Array, Array]:
    """Make one agent that has a choice stop in each of E environments, with a probability.

    Returns the actions, (E, N[, A]), and where they are forced, (E, N).
    """
    if spec.stop_action is None:
        return action, jnp.zeros(observation.action_mask.shape[:-1], bool)
    key_when, key_who = jax.random.split(key)
    has_choice = observation.action_mask.sum(axis=-1) > 1
    who = jax.random.categorical(key_who, jnp.where(has_choice, 0.0, -jnp.inf))
    when = jax.random.bernoulli(key_when, probability, who.shape)
    when &= has_choice.any(axis=-1)
    forced = when[:, None] & (jnp.arange(spec.num_agents) == who[:, None])
    return jnp.where(forced, spec.stop_action, action), forced


def advantage_gap(spec: EnvSpec, advantage: Array, forced: Array) -> Metrics:
    """Return by how much the other agents' mean advantage exceeds that of an agent made to stop.

    It is the paper's Delta A, the mean over all `forced` (..., N), and 0 without any. Games without
    an action that stops agents have no such metric.
    """
    if spec.stop_action is None:
        return {}
    above = (advantage[..., None, :] - advantage[..., None]).sum(axis=-1) / (spec.num_agents - 1)
    gap = jnp.where(forced, above, 0.0).sum() / jnp.maximum(forced.sum(), 1)
    return {"policy/advantage_gap": gap}
