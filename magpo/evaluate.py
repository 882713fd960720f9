"""Evaluation: whole episodes of a policy, measured on their own.

    python -m magpo.evaluate run=<folder> episodes=320 greedy=true

plays the best policies of a run, of all its seeds, on its task, or with env=<suite>/<task> on
another where the shapes allow; env.<option>=<value> changes the task.
"""

from collections.abc import Sequence
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


def main() -> None:
    """`python -m magpo.evaluate run=<folder> [key=value ...]`"""
    from magpo import cli

    cli.command(USAGE, _main)


USAGE = """\
usage: python -m magpo.evaluate run=<folder> [key=value ...]

  run=<folder>           a run's results folder; its best policies are played, all seeds'
  episodes=320           per seed, >= 1
  greedy=false           true: the most likely actions instead of sampled ones
  seed=0                 of the episodes, 0 .. 2**32 - 1
  env=<suite>/<task>     another task than the run's, where the shapes allow
  env.<option>=<value>   options of the task; by default the run's"""


def _main(arguments: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from magpo import cli, envs, policy
    from magpo.config import ConfigError
    from magpo.console import spread

    keys = {"run": str, "episodes": int, "greedy": bool, "seed": int, "env": str}
    given = cli.key_values(arguments, keys, open_group="env")
    cli.within(given, episodes=(1, 2**31 - 1), seed=(0, 2**32 - 1))
    if "run" not in given:
        raise ConfigError("run=<folder> is missing")
    trained = policy.read(given["run"])
    task = given.get("env", trained.env.name)
    own = trained.config.env.options if task == trained.env.name else {}
    options = {k.removeprefix("env."): v for k, v in given.items() if k.startswith("env.")}
    try:
        env = envs.make(task, **own | options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    policy.check_fits(trained, env)
    episodes, greedy = given.get("episodes", 320), given.get("greedy", False)

    system = trained.module.make(trained.config.algorithm, env)
    keys_ = jax.random.split(jax.random.key(given.get("seed", 0)), len(trained.config.seeds))
    play = jax.jit(
        jax.vmap(lambda p, k: evaluate(trained.module, system, env, p, k, episodes, greedy))
    )
    metrics = jax.device_get(play(trained.params, keys_))  # (S, episodes) each
    names = list(dict.fromkeys(["episode_return", env.headline, "episode_length"]))
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title_justify="left")
    table.title = f"{trained.config.system} on {env.name}, {episodes} episodes a seed"
    for name in ("seed", "trained steps", *names):
        table.add_column(name, justify="right")
    means = {name: metrics[name].mean(-1) for name in names}
    for s, seed in enumerate(trained.config.seeds):
        steps = int(trained.chunk[s]) * trained.config.steps_per_chunk
        table.add_row(str(seed), f"{steps:,}", *(f"{means[name][s]:.3f}" for name in names))
    if len(trained.config.seeds) > 1:
        table.add_row("mean", "", *(spread(means[name]) for name in names), style="bold")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
