"""Runs on disk, pooled over their seeds: one line for each system, task and setting.

All values come from metrics.jsonl. Its `absolute/<metric>` is the mean over the episodes that
marl_eval.json lists one by one, so that file is not needed.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from magpo import config, published
from magpo.errors import ConfigError, nearest
from magpo.files import UNREADABLE
from magpo.report.measurements import ABSOLUTE_EVALUATIONS, printed_name

# Settings that do not change what is learned.
NO_SETTINGS = {
    *("run", "seeds", "seeds_per_batch", "num_evaluations", "eval_episodes", "absolute_metric"),
    *("vary_in_step", "platform", "logger", "results_dir", "keep", "checkpoint_share"),
}
ABSENT = object()  # marks a setting that only other runs have
Curve = dict[int, float]  # means over an evaluation's episodes, by environment steps


class Run(NamedTuple):
    """One run, or one setting of a run that varies several."""

    system: str
    suite: str
    task: str
    name: str  # the run's id; ids sort by time
    settings: dict[str, Any]  # by dotted key
    episodes: int  # behind each seed's absolute metric
    evaluations: dict[str, dict[int, Curve]]  # by metric and seed
    absolute: dict[str, dict[int, float]]  # means over episodes, by metric and seed


class Line(NamedTuple):
    """Pooled runs. K evaluations, S seeds."""

    label: str
    system: str
    suite: str
    task: str
    metric: str
    steps: np.ndarray  # (K,) the evaluations that all seeds have
    values: np.ndarray  # (K, S)
    absolute: np.ndarray | None  # (S,) None unless all seeds have the absolute metric
    episodes: int  # behind each seed's absolute metric
    curves: dict[int, Curve]  # all evaluations, by seed
    extremes: tuple[float, float]  # over all seeds and all their evaluations
    reference: published.Row | None

    @property
    def score(self) -> np.ndarray:
        """Each seed's absolute metric, or its last evaluation; (S,)."""
        return self.values[-1] if self.absolute is None else self.absolute


def find(folders: Sequence[Path]) -> list[Run]:
    """Return all runs under the folders that have evaluations, each once."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"no such folder: {folder}")
    found = {file.parent.resolve() for folder in folders for file in folder.rglob("metrics.jsonl")}
    names = ", ".join(map(str, folders))
    if not found:
        raise ConfigError(f"no runs (metrics.jsonl) under {names}")
    runs = [run for folder in sorted(found) for run in read(folder) if run.evaluations]
    if not runs:
        raise ConfigError(f"no run under {names} has an evaluation yet")
    return runs


def read(folder: Path, records: Sequence[str] = ()) -> list[Run]:
    """Return a run's evaluations, one Run for each of its settings.

    `records` are the full names of other metrics to read in the same way, such as `loss/policy`.
    """
    kinds = ['"eval/', '"absolute/', *(f'"{name}"' for name in records)]
    settings, episodes = settings_of(folder)
    varied = [key.removeprefix("vary.") for key in settings if key.startswith("vary.")]
    shared = {k: v for k, v in settings.items() if k.partition(".")[0] != "vary"}
    runs = dict[tuple[Any, ...], Run]()
    with (folder / "metrics.jsonl").open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                line = data.decode()
                # Most lines are about training, and parsing them is slow. The last line may still
                # be half-written.
                if not (line.endswith("\n") and any(kind in line for kind in kinds)):
                    continue
                record = json.loads(line)
                where = record["system"], record["env"], record["task"], record["run"]
                kind, _, metric = record["name"].partition("/")
                value = record["value"]
                if record["name"] in records:
                    kind, metric = "eval", record["name"]
                if kind not in ("eval", "absolute") or value is None:  # null: not finite
                    continue
                if not all(isinstance(word, str) for word in where) or not math.isfinite(value):
                    raise ValueError
                setting = {key: record[key] for key in varied}
                run = Run(*where, shared | setting, episodes, evaluations={}, absolute={})
                run = runs.setdefault(tuple(setting.values()), run)
                seed = index(record["seed"])
                if kind == "absolute":
                    run.absolute.setdefault(metric, {})[seed] = value
                else:
                    curve = run.evaluations.setdefault(metric, {}).setdefault(seed, {})
                    curve[index(record["env_steps"])] = value
            except UNREADABLE:
                raise ConfigError(
                    f"{folder}/metrics.jsonl: line {number} is not a record"
                ) from None
    return list(runs.values())


def settings_of(folder: Path) -> tuple[dict[str, Any], int]:
    """Return the settings in a run's config.yaml that decide what is learned, by dotted key, and
    the number of episodes behind its absolute metric."""
    try:
        values = config.flat(config.plain_values(folder / "config.yaml"))
        settings = {k: v for k, v in values.items() if k.partition(".")[0] not in NO_SETTINGS}
        settings["run.published"] = values.get("run.published", False)
        return settings, ABSOLUTE_EVALUATIONS * index(values.get("eval_episodes", 0))
    except UNREADABLE:
        raise ConfigError(f"{folder}: config.yaml is missing or cannot be read") from None


def pool(runs: Sequence[Run], metric: str | None = None, order: Sequence[str] = ()) -> list[Line]:
    """Return a line for each system, setting and task; systems come in the order given.

    The default `metric` is each suite's headline: the win rate, if it has one, or the return.
    """
    metrics = sorted({name for run in runs for name in run.evaluations})
    systems = sorted({run.system for run in runs})
    known_or_raise("metric", [metric] if metric is not None else [], metrics)
    known_or_raise("order", order, systems)
    systems.sort(key=lambda system: order.index(system) if system in order else len(order))
    headline = {run.suite: "episode_return" for run in runs}
    headline |= {run.suite: "win_rate" for run in runs if "win_rate" in run.evaluations}
    groups = defaultdict[tuple[str, str, str], list[Run]](list)
    for run in sorted(runs, key=lambda run: run.name):
        if (metric or headline[run.suite]) in run.evaluations:
            groups[run.suite, run.task, run.system].append(run)
    lines = []
    for (suite, _, _), group in groups.items():
        shown = metric or headline[suite]
        for label, same in labelled(group).items():
            reference = reference_of(same[-1]) if shown == headline[suite] else None
            lines.append(line_of(label, same, shown, reference))
    return sorted(lines, key=lambda x: (systems.index(x.system), x.label, x.suite, x.task))


def known_or_raise(key: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError for a name on the command line that no run has."""
    for name in names:
        if name not in known:
            there = f"{nearest(name, known)}there are {', '.join(known)}"
            raise ConfigError(f"{key}: no run has {name!r}: {there}")


def line_of(label: str, runs: list[Run], metric: str, reference: published.Row | None) -> Line:
    """Pool the seeds of runs with the same settings, given oldest first. If several runs have a
    seed, the newest counts."""
    newest = {seed: run for run in runs for seed in run.evaluations[metric]}
    curves = {seed: newest[seed].evaluations[metric][seed] for seed in sorted(newest)}
    steps = sorted(set.intersection(*map(set, curves.values())))
    system, suite, task, *_ = runs[-1]
    if not steps:
        raise ConfigError(f"{label} on {suite}/{task}: no evaluation that all seeds have")
    absolute = [newest[seed].absolute.get(metric, {}).get(seed) for seed in curves]
    complete = [value for value in absolute if value is not None]
    everything = [*complete, *(value for curve in curves.values() for value in curve.values())]
    return Line(
        label=label,
        system=system,
        suite=suite,
        task=task,
        metric=metric,
        steps=np.array(steps),
        values=np.array([[curve[step] for curve in curves.values()] for step in steps]),
        absolute=np.array(complete) if len(complete) == len(absolute) else None,
        episodes=min(run.episodes for run in newest.values()),
        curves=curves,
        extremes=(min(everything), max(everything)),
        reference=reference,
    )


def labelled(runs: list[Run]) -> dict[str, list[Run]]:
    """Group the runs of one system on one task by label: the system, and the settings in which the
    runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: {written(run.settings.get(key, ABSENT)) for run in runs} for key in keys}
    differ = [key for key in keys if len(values[key]) > 1]
    groups = defaultdict[str, list[Run]](list)
    for run in runs:
        shown = ", ".join(
            f"{key.removeprefix('system.').removeprefix('network.')}="
            f"{written(run.settings.get(key, ABSENT))}"
            for key in differ
        )
        system = printed_name(run.system)
        groups[f"{system} ({shown})" if shown else system].append(run)
    return groups


def written(value: Any) -> str:
    """Return a setting as the command line takes it, floats with four digits."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def reference_of(run: Run) -> published.Row | None:
    """Return the published result of a run's system, variant and task, if the run played the
    published game."""
    about = {"run.system": run.system, "run.env": f"{run.suite}/{run.task}"}
    return published.find(run.settings | about)
