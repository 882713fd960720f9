"""Evaluation: whole episodes of a policy.

usage: python -m magpo.evaluate run=<folder> [key=value ...]

  run=<folder>           a run's results folder; the best policy of each member is played
  vary.<key>=<value>     only the members with this value, if the run varied it
  episodes=320           per member, >= 1
  greedy=false           true: take the most likely actions instead of sampled ones
  seed=0                 of the episodes, 0 .. 2**32 - 1
  env=<suite>/<task>     a task other than the run's, if the shapes allow it
  env.<option>=<value>   options of the task; by default the run's
  json=<file>            also write each member's means and standard deviations here

The table shows every metric of the suite as mean ± standard deviation over episodes. The return is
the mean over agents of their summed rewards.
"""

from collections.abc import Mapping
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magpo import commands, tables
from magpo.contract import Algorithm
from magpo.files import write_aside
from magpo.report.console import member_table
from magpo.report.measurements import plain
from magpo.runs import policy
from magpo.types import Array, Environment, TimeStep
from magpo.values import PositiveInt, Seed, UserPath

BATCH = 1024  # episodes of a member that `python -m magpo.evaluate` plays at once


class _Episodes(NamedTuple):
    """B episodes under way."""

    step: Array  # () int32
    env_state: Any  # (B, ...)
    timestep: TimeStep  # (B, ...)
    carry: Any  # (B, ...) the policy's recurrent state
    running: Array  # (B,) bool, false once the episode has ended
    metrics: dict[str, Array]  # (B,) each, frozen where not running


def evaluate(
    algorithm: Algorithm,
    setup: Any,
    env: Environment,
    params: Any,
    key: Array,
    num_episodes: int,
    greedy: bool = False,
) -> dict[str, Array]:
    """Play `num_episodes` episodes side by side, from reset to end, without auto-reset.

    Returns (num_episodes,) float32 each: `episode_return` (the mean over agents of their summed
    rewards), `episode_length`, and the environment's `metrics` at the episode's last step. Steps
    after an episode's end do not count.
    """
    reset_key, act_key = jax.random.split(key)
    env_state, timestep = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))
    zeros = jnp.zeros(num_episodes)
    start = _Episodes(
        step=jnp.int32(0),
        env_state=env_state,
        timestep=timestep,
        carry=algorithm.initial_carry(setup, (num_episodes,)),
        running=jnp.ones(num_episodes, bool),
        metrics=_measure(timestep, zeros, zeros),
    )

    def unfinished(episodes: _Episodes) -> Array:
        return (episodes.step < env.time_limit) & episodes.running.any()

    def step(episodes: _Episodes) -> _Episodes:
        key = jax.random.fold_in(act_key, episodes.step)
        observation = episodes.timestep.observation
        action, carry = algorithm.act(setup, params, episodes.carry, observation, key, greedy)
        env_state, timestep = jax.vmap(env.step)(episodes.env_state, action)
        before = episodes.metrics
        episode_return = before["episode_return"] + timestep.reward.mean(-1)
        after = _measure(timestep, episode_return, before["episode_length"] + 1)
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
    """Return the episodes' metrics as of `timestep`, (B,) float32 each."""
    suite = {name: value.astype(jnp.float32) for name, value in timestep.metrics.items()}
    return suite | {"episode_return": episode_return, "episode_length": episode_length}


def main(
    *,
    run: UserPath,
    vary: Mapping[str, float | None] = {},
    episodes: PositiveInt = 320,
    greedy: bool = False,
    seed: Seed = 0,
    env: str | None = None,
    options: Mapping[str, Any] = {},
    json: UserPath | None = None,
) -> None:
    """Play a run's best policies, then print and write each member's metrics."""
    trained = policy.read(run)
    places = trained.places(setting=vary)
    task = policy.make_env(trained, env, options)
    setup = policy.build(trained, 0, env=task).setup
    if json:  # fail before playing if it cannot be written
        Path(json).parent.mkdir(parents=True, exist_ok=True)

    @partial(jax.jit, static_argnums=2)
    @partial(jax.vmap, in_axes=(0, 0, None))
    def play(params: Any, key: Array, size: int) -> dict[str, Array]:
        return evaluate(trained.algorithm, setup, task, params, key, size, greedy)

    params = jax.tree.map(lambda x: x[places], trained.params)
    key = jax.random.key(seed)
    parts = []
    with tables.working(f"playing {episodes} episodes"):
        for left in range(episodes, 0, -BATCH):
            keys, size = jax.random.split(key, len(trained.score))[places], min(left, BATCH)
            parts.append(jax.device_get(play(params, keys, size)))  # (members, size) each
            key = jax.random.fold_in(key, left)
    names = dict.fromkeys(["episode_return", task.headline, *parts[0]])
    metrics = {name: np.concatenate([part[name] for part in parts], 1) for name in names}
    print(f"{trained.config.system} on {task.name}, {episodes} episodes each")
    played = [trained.config.members[place] for place in places]
    steps = trained.chunk[places].astype(int) * trained.config.steps_per_chunk
    tables.show_wide(member_table(played, {"trained steps": steps} | metrics))
    if json:
        about: dict[str, Any] = {"run": run, "system": trained.config.system, "task": task.name}
        about |= {"episodes": episodes, "greedy": greedy, "seed": seed}
        members = [
            {"seed": member.seed, "setting": member.setting, "trained_steps": int(steps[place])}
            | {"metrics": {name: _summary(values[place]) for name, values in metrics.items()}}
            for place, member in enumerate(played)
        ]
        text = dumps(about | {"members": members}, indent=2) + "\n"
        write_aside(Path(json), lambda aside: aside.write_text(text, encoding="utf-8"))


def _summary(values: np.ndarray) -> dict[str, float | None]:
    """Return a metric's mean and standard deviation over episodes."""
    return {"mean": plain(np.float32(values.mean())), "std": plain(np.float32(values.std()))}


if __name__ == "__main__":
    commands.run(__doc__, main)
