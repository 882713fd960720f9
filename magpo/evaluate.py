"""Evaluation: whole episodes of a policy, measured on their own. Pure; for one seed."""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magpo.types import Array, Environment, TimeStep


class _Episodes(NamedTuple):
    """B episodes under way."""

    step: Array  # () int32
    env_state: Any  # (B, ...)
    timestep: TimeStep  # (B, ...)
    carry: Any  # (B, ...) the policy's memory
    running: Array  # (B,) bool, false from an episode's end on
    metrics: dict[str, Array]  # (B,) each, frozen where not running


def evaluate(
    system_module: ModuleType,
    system: Any,
    env: Environment,
    params: Any,
    key: Array,
    num_episodes: int,
    greedy: bool = False,
) -> dict[str, Array]:
    """Play `num_episodes` episodes side by side, from reset to end, without auto-reset.

    Returns (num_episodes,) float32 each: `episode_return` (the sum over steps of the mean over
    agents of the reward), `episode_length`, and what the environment's timestep reports in
    `metrics` at the episode's last step. What follows an episode's end counts for nothing.
    """
    reset_key, act_key = jax.random.split(key)
    env_state, timestep = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))
    zeros = jnp.zeros(num_episodes)
    start = _Episodes(
        step=jnp.int32(0),
        env_state=env_state,
        timestep=timestep,
        carry=system_module.initial_carry(system, (num_episodes,)),
        running=jnp.ones(num_episodes, bool),
        metrics=_measure(timestep, zeros, zeros),
    )

    def unfinished(episodes: _Episodes) -> Array:
        return (episodes.step < env.time_limit) & episodes.running.any()

    def step(episodes: _Episodes) -> _Episodes:
        action, carry = system_module.act(
            system,
            params,
            episodes.carry,
            episodes.timestep.observation,
            jax.random.fold_in(act_key, episodes.step),
            greedy,
        )
        env_state, timestep = jax.vmap(env.step)(episodes.env_state, action)
        before = episodes.metrics
        after = _measure(
            timestep,
            before["episode_return"] + timestep.reward.mean(-1),
            before["episode_length"] + 1,
        )
        return _Episodes(
            step=episodes.step + 1,
            env_state=env_state,
            timestep=timestep,
            carry=carry,
            running=episodes.running & ~timestep.last(),
            metrics={k: jnp.where(episodes.running, after[k], before[k]) for k in after},
        )

    return jax.lax.while_loop(unfinished, step, start).metrics


def _measure(timestep: TimeStep, episode_return: Array, episode_length: Array) -> dict[str, Array]:
    """The episodes' figures as of `timestep`, (B,) float32 each."""
    suite = {name: value.astype(jnp.float32) for name, value in timestep.metrics.items()}
    return suite | {"episode_return": episode_return, "episode_length": episode_length}
