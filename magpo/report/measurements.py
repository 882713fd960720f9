"""The measurements of a run, as every sink receives them."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from magpo.config.members import Member
from magpo.published import Row

ABSOLUTE_EVALUATIONS = 10  # the absolute metric plays this many times `eval_episodes`


class Run(NamedTuple):
    """The facts about a run that its records and figures repeat."""

    folder: Path
    system: str
    suite: str
    task: str
    members: tuple[Member, ...]
    headline: str  # the metric the suite's papers report
    steps_per_update: int  # environment steps, per member
    name: str  # of the folder in which the run began
    published: Row | None = None  # the printed result of this command


class Measurement(NamedTuple):
    """One evaluation and the training since the previous one. K episodes, U updates."""

    chunk: int | None  # chunks trained so far; None: the absolute metric
    env_steps: tuple[int, ...]  # (M,) environment steps behind the evaluated parameters
    wall_s: float  # since training began, without compilation
    evaluation: dict[str, np.ndarray]  # (M, K) each
    training: dict[str, np.ndarray]  # (M, U) each; empty if nothing was trained
    timing: dict[str, float]


def printed_name(system: str) -> str:
    """Return a system's name as figures and tables show it: MAGPO, GPAE-MAPPO, Sable."""
    return "Sable" if system == "sable" else system.upper().replace("_", "-")


def defined(training: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return where a training metric has a value, (M, U) bool; a mean over no episode has none."""
    if name.startswith("rollout/") and name != "rollout/episodes":
        return training["rollout/episodes"] > 0
    return np.ones(training[name].shape, bool)


def plain(value: np.float32) -> float | None:
    """Return the shortest decimal for a float32, or None for a value that JSON cannot hold."""
    return float(str(value)) if np.isfinite(value) else None


def scalars(run: Run, measurement: Measurement) -> Iterator[tuple[int, int, str, float | None]]:
    """Yield each value: a member's place, its environment steps, the name and the value.

    The values of updates come before those of the evaluation after them. `eval/*` and
    `absolute/*` are means over episodes. `time/steps_per_s` counts one member's steps.
    """
    training = measurement.training
    masks = {name: defined(training, name) for name in training}
    num_updates = next(iter(training.values())).shape[1] if training else 0
    for update in range(num_updates):
        for place, last_step in enumerate(measurement.env_steps):
            steps = last_step - (num_updates - 1 - update) * run.steps_per_update
            for name in training:
                if masks[name][place, update]:
                    yield place, steps, name, plain(training[name][place, update])
    kind = "absolute" if measurement.chunk is None else "eval"
    for place, steps in enumerate(measurement.env_steps):
        for name, value in measurement.evaluation.items():
            yield place, steps, f"{kind}/{name}", plain(value[place].mean())
        for name, seconds in measurement.timing.items():
            yield place, steps, f"time/{name}", round(seconds, 4)
