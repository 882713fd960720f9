"""Show an episode: `python -m magpo.render env=<suite>/<task>` or `run=<folder>`.

Writes a GIF, for MABrax brax's HTML: under random legal actions, or of a run's best policy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magpo import envs
from magpo.config import cli
from magpo.config.schema import PositiveInt, Seed, UserPath
from magpo.errors import ConfigError
from magpo.files import printing
from magpo.runs import policy
from magpo.types import Array, Environment

USAGE = """\
usage: python -m magpo.render env=<suite>/<task> | run=<folder> [key=value ...]

  env=<suite>/<task>     a task, under random legal actions
  run=<folder>           a run's results folder: its best policy, on its task
  vary.<key>=<value>     the best policy with this value, of a run that varied it
  env.<option>=<value>   options of the task
  out=<file>             where to (default: <task>.gif, for MABrax <task>.html)
  steps=500              at most this many, >= 1
  greedy=false           true: the policy's most likely actions
  seed=0                 of the episode, 0 .. 2**32 - 1"""


class Episode(NamedTuple):
    """An episode on the host."""

    states: list[Any]  # L + 1
    actions: np.ndarray  # (L, N[, A])
    rewards: np.ndarray  # (L,) mean over agents


def play(
    env: Environment, acting: policy.TrainedPolicy | None, steps: int, seed: int, greedy: bool
) -> Episode:
    """Play an episode to its end or for `steps` steps; random legal actions without a policy."""
    reset_key, act_key = jax.random.split(jax.random.key(seed))
    state, timestep = jax.jit(env.reset)(reset_key)
    step = jax.jit(env.step)
    carry = acting.initial_carry() if acting else None
    states, actions, rewards = [state], [], []
    for t in range(min(steps, env.time_limit)):
        key = jax.random.fold_in(act_key, t)
        if acting:
            action, carry = acting.act(carry, timestep.observation, key, greedy)
        else:
            action = _random_action(env, timestep.observation.action_mask, key)
        state, timestep = step(state, action)
        states.append(state)
        actions.append(np.asarray(action))
        rewards.append(float(timestep.reward.mean()))
        if timestep.last():
            break
    return Episode(jax.device_get(states), np.stack(actions), np.array(rewards))


def _random_action(env: Environment, mask: Array, key: Array) -> Array:
    if env.action_kind == "continuous":
        return jax.random.uniform(key, mask.shape, minval=-1.0)
    return jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))


def write_gif(path: Path, env: Environment, episode: Episode) -> None:
    """Write a frame for each step: the state, the actions and the reward."""
    from matplotlib.animation import PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from magpo.envs.pictures import DRAW

    draw = DRAW[env.name.partition("/")[0]]
    figure = Figure(figsize=(4.8, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    writer = PillowWriter(fps=4)
    with writer.saving(figure, str(path), dpi=80):
        for t, state in enumerate(episode.states):
            axes.clear()
            over = t == len(episode.actions)
            draw(axes, env, state, None if over else episode.actions[t])
            reward = "the end" if over else f"reward {episode.rewards[t]:+.2f}"
            done = episode.rewards[: t + (not over)].sum()
            axes.set_title(f"{env.name}, step {t}: {reward}, return {done:.2f}", fontsize=9)
            writer.grab_frame()


def write_html(path: Path, env: Any, episode: Episode) -> None:
    """Write a page with brax's own viewer, which loads its script from the web."""
    from brax.io import html

    poses = [state.pipeline_state for state in episode.states]
    brax_env = env.simulator.env
    path.write_text(html.render(brax_env.sys.tree_replace({"opt.timestep": brax_env.dt}), poses))


@dataclass(frozen=True)
class Request:
    """The command line's values."""

    run: UserPath | None
    env: str | None
    options: dict[str, Any]
    vary: dict[str, float | None]
    out: UserPath | None
    steps: PositiveInt
    greedy: bool
    seed: Seed

    def __post_init__(self) -> None:
        if (self.run is None) == (self.env is None):
            raise ValueError("give env=<suite>/<task> or run=<folder>, one of them")
        if self.vary and self.run is None:
            raise ValueError("vary.<key>=<value> chooses a policy: it needs run=<folder>")


@printing()
def main() -> None:
    """Run `python -m magpo.render`."""
    defaults: dict[str, Any] = {"run": None, "env": None, "options": {}, "vary": {}, "out": None}
    defaults |= {"steps": 500, "greedy": False, "seed": 0}
    cli.command(USAGE, Request, defaults, _main)


def _of_run(
    folder: str, options: dict[str, Any], setting: dict[str, Any]
) -> tuple[Environment, policy.TrainedPolicy]:
    """Return a run's environment and its best policy with these values. Raises ConfigError."""
    trained = policy.read(folder)
    env = policy.make_env(trained, None, options)
    return env, policy.build(trained, trained.best(trained.places(setting=setting)), env=env)


def _main(request: Request) -> None:
    env, acting = None, None
    if request.run is not None:
        env, acting = _of_run(request.run, request.options, request.vary)
    try:
        env = env or envs.make(str(request.env), **request.options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    as_html = env.name.startswith("mabrax/")
    suffix = ".html" if as_html else ".gif"
    out = Path(request.out or env.name.replace("/", "_") + suffix)
    if out.suffix.lower() != suffix:
        raise ConfigError(f"out={out}: must be a file's name that ends in {suffix}")
    episode = play(env, acting, request.steps, request.seed, request.greedy)
    try:
        (write_html if as_html else write_gif)(out, env, episode)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot write there: {error.strerror}") from error
    print(f"{out}: {len(episode.actions)} steps, return {episode.rewards.sum():.3f}")


if __name__ == "__main__":
    main()
