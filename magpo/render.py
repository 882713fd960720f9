"""A rendered episode: a GIF or, for MABrax, a page with brax's own viewer.

usage: python -m magpo.render env=<suite>/<task> | run=<folder> [key=value ...]

  env=<suite>/<task>     play this task with random legal actions
  run=<folder>           play a run's best policy on its task
  vary.<key>=<value>     play the best policy with this value, if the run varied it
  env.<option>=<value>   options of the task
  out=<file>             the file to write (default: <task>.gif, for MABrax <task>.html)
  steps=500              the largest number of steps, >= 1
  greedy=false           true: take the policy's most likely actions
  seed=0                 the episode's seed, 0 .. 2**32 - 1
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from magpo import commands, envs, tables
from magpo.envs.wrappers import random_action
from magpo.errors import ConfigError
from magpo.runs import policy
from magpo.types import Environment
from magpo.values import PositiveInt, Seed, UserPath


class Frame(NamedTuple):
    """A state of an episode, on the host, with the step taken from it."""

    state: Any
    view: Any  # (N, O)
    action: Any  # (N[, A]); None at the end
    reward: float  # mean over agents; 0 at the end


def play(
    env: Environment, acting: policy.TrainedPolicy | None, steps: int, seed: int, greedy: bool
) -> Iterator[Frame]:
    """Yield an episode's frames, of at most `steps` steps; without a policy, act at random."""
    reset_key, act_key = jax.random.split(jax.random.key(seed))
    state, timestep = jax.jit(env.reset)(reset_key)
    step = jax.jit(env.step)
    carry = acting.initial_carry() if acting else None
    for t in range(min(steps, env.time_limit)):
        key = jax.random.fold_in(act_key, t)
        before, seen = state, timestep.observation
        if acting:
            action, carry = acting.act(carry, seen, key, greedy)
        else:
            action = random_action(env, seen.action_mask, key)
        state, timestep = step(before, action)
        yield jax.device_get(Frame(before, seen.agents_view, action, timestep.reward.mean()))
        if timestep.last():
            break
    yield jax.device_get(Frame(state, timestep.observation.agents_view, None, 0.0))


def write_gif(path: Path, env: Environment, frames: Sequence[Frame]) -> None:
    """Write a GIF with a frame per step: the state, the actions and the reward.

    A user's environment is drawn by its method `draw(axes, state, action)`, where the action is
    None at the end, or else by its agents' views.
    """
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure

    from magpo.envs import pictures

    suite = env.name.partition("/")[0]
    figure = Figure(figsize=(4.8, 5.0), layout="constrained")
    axes = figure.add_subplot()
    writer = PillowWriter(fps=4)
    with writer.saving(figure, str(path), dpi=80):
        for t, (state, view, action, reward) in enumerate(frames):
            axes.clear()
            if suite in pictures.DRAW:
                pictures.DRAW[suite](axes, env, state, action)
            elif hasattr(env, "draw"):
                env.draw(axes, state, action)
            else:
                pictures.views(axes, view, action)
            now = "the end" if action is None else f"reward {reward:+.2f}"
            done = sum(frame.reward for frame in frames[: t + 1])
            axes.set_title(f"{env.name}, step {t}: {now}, return {done:.2f}", fontsize=9)
            writer.grab_frame()


def write_html(path: Path, env: Any, frames: Sequence[Frame]) -> None:
    """Write a page with brax's viewer, whose script is loaded from the web."""
    from brax.io import html

    poses = [frame.state.pipeline_state for frame in frames]
    brax_env = env.simulator.env
    path.write_text(html.render(brax_env.sys.tree_replace({"opt.timestep": brax_env.dt}), poses))


def main(
    *,
    run: UserPath | None = None,
    env: str | None = None,
    options: Mapping[str, Any] = {},
    vary: Mapping[str, float | None] = {},
    out: UserPath | None = None,
    steps: PositiveInt = 500,
    greedy: bool = False,
    seed: Seed = 0,
) -> None:
    """Play an episode and write its GIF or page."""
    acting = None
    if env is not None and run is None and not vary:
        task = envs.make(env, **options)
    elif run is not None and env is None:
        trained = policy.read(run)
        task = policy.make_env(trained, None, options)
        acting = policy.build(trained, trained.best(trained.places(setting=vary)), env=task)
    else:
        raise ConfigError("give env=<suite>/<task>, or run=<folder> and its vary.<key>=<value>")
    suffix = ".html" if task.name.startswith("mabrax/") else ".gif"
    file = Path(out or task.name.replace("/", "_") + suffix)
    if file.suffix.lower() != suffix:
        raise ConfigError(f"out={file}: must be a file's name that ends in {suffix}")
    with tables.working("playing an episode and drawing it"):
        frames = list(play(task, acting, steps, seed, greedy))
        (write_html if suffix == ".html" else write_gif)(file, task, frames)
    total = sum(frame.reward for frame in frames)
    print(f"{file}: {len(frames) - 1} steps, return {total:.3f}")


if __name__ == "__main__":
    commands.run(__doc__, main)
