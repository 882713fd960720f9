"""The papers' ablations, trained and drawn: `python -m magpo.reproduce figure-5a`."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from magpo import config as configuration
from magpo import published, tables
from magpo.config.schema import RunConfig
from magpo.plot import draw, read
from magpo.plot.draw import Points
from magpo.plot.read import Line
from magpo.report.measurements import printed_name
from magpo.runs import child, folders

TABLE = Path(__file__).with_suffix(".yaml")
MEMORY = "memory"  # of training on each device, which run.json has


class Command(NamedTuple):
    """A run of an ablation."""

    system: str
    overrides: tuple[str, ...]
    position: float | None  # on the figure's axis, unless that has the environment steps

    def config(self, overrides: Sequence[str]) -> RunConfig:
        """Return the run's configuration. Raises ConfigError."""
        return configuration.load(self.system, [*self.overrides, *overrides])


class Ablation(NamedTuple):
    """A figure or table of a paper, an entry of ablations.yaml, with one of its budgets."""

    name: str
    source: str  # the paper and the figure, "MAGPO, Figure 5(a)"
    about: str
    shows: str  # what the paper's figure shows, in words
    metrics: tuple[str | None, ...]  # None: the headline metric
    axis: str | None  # None: environment steps
    commands: tuple[Command, ...]


@cache
def entries() -> dict[str, Any]:
    """Return the entries of ablations.yaml by name."""
    return dict(yaml.safe_load(TABLE.read_text(encoding="utf-8")))


def find(name: str, budget: str) -> Ablation:
    """Return an ablation with the budget `paper` or `laptop`."""
    entry = entries()[name]
    words = ""
    if budget == "laptop":
        entry = entry | entry["laptop"]
        words = entry["words"]
    values = entry.get("values", [None])
    commands = [
        Command(system, in_published_game(overrides), values[i % len(values)])
        for run in entry["runs"]
        for i, (system, *overrides) in enumerate(map(str.split, expanded(f"{run} {words}")))
    ]
    return Ablation(
        name=name,
        source=entry["source"],
        about=entry["about"],
        shows=entry["shows"],
        metrics=tuple(entry.get("metrics", [None])),
        axis=entry.get("axis"),
        commands=tuple(commands),
    )


def in_published_game(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides with `published=true`, if the papers' tables have the task."""
    (task,) = (text[4:] for text in overrides if text.startswith("env="))
    return (*overrides, "published=true") if published.has(task) else (*overrides,)


def expanded(text: str) -> list[str]:
    """Return a text for each combination of the alternatives in its {a,b}; the last vary first."""
    parts = re.split(r"\{(.*?)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def train(ablation: Ablation, overrides: Sequence[str]) -> int:
    """Train the unfinished runs, one after another, and return the first exit code that is not 0.

    Raises ConfigError before any run begins if one of them takes no such override.
    """
    configs = [command.config(overrides) for command in ablation.commands]
    for number, (command, config) in enumerate(zip(ablation.commands, configs, strict=True), 1):
        run = folders.newest(config)
        state = folders.status(run) if run else "new"
        words = [command.system, *command.overrides, *overrides]
        print(f"{number} of {len(configs)}: {' '.join(words)}", flush=True)
        if state == "running":
            print(f"another process trains it: {run}")
        elif state != "finished":
            system, *own = words
            code = child.run([sys.executable, "-m", f"magpo.systems.{system}", *own, "resume=auto"])
            if code:
                return code
    return 0


def write(ablation: Ablation, overrides: Sequence[str], out: Path) -> Path | None:
    """Draw the runs so far, and write their values beside the figure.

    Returns the figure's path, or None without any evaluation yet.
    """
    found = [
        (command, run)
        for command in ablation.commands
        if (run := folders.newest(command.config(overrides)))
    ]
    title = f"{ablation.source}: {ablation.about}"
    caption = [f"In the paper: {ablation.shows}"]
    if ablation.axis is None:
        lines = curves([run for _, run in found], ablation.metrics)
        rows, figure = [*of_curves(lines)], draw.panels(lines, title, caption)
    else:
        points = {metric: over_axis(found, metric) for metric in ablation.metrics}
        rows = [*of_points(points, ablation.axis)]
        figure = draw.points(points, ablation.axis, title, caption)
    if not rows:
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    tables.write(out.with_suffix(".csv"), rows)
    draw.save(figure, out, ["png"])
    return out.with_suffix(".png")


def curves(runs: Sequence[Path], metrics: Sequence[str | None]) -> list[list[Line]]:
    """Return the lines of each panel, a metric on a task."""
    training = [metric for metric in metrics if metric and "/" in metric]
    measured = [run for folder in runs for run in read.read(folder, training) if run.evaluations]
    panels = list[list[Line]]()
    for metric in metrics:
        if any(metric is None or metric in run.evaluations for run in measured):
            by_task = defaultdict[str, list[Line]](list)
            for line in read.pool(measured, metric):
                by_task[f"{line.suite}/{line.task}"].append(line)
            panels += by_task.values()
    return panels


def over_axis(found: Sequence[tuple[Command, Path]], metric: str | None) -> Points:
    """Return the values of a metric, (S,), by system and position on the axis.

    A value is a seed's absolute metric, or its last evaluation; of a training metric, the median
    of all updates.
    """
    points = defaultdict[str, dict[float, np.ndarray]](dict)
    for command, folder in found:
        assert command.position is not None
        if values := _values(folder, metric):
            points[printed_name(command.system)][command.position] = np.array(values)
    return points


def _values(folder: Path, metric: str | None) -> list[float]:
    """Return a run's values of a metric, one for each seed."""
    if metric == MEMORY:
        memory = folders.about(folder).get("memory_bytes")
        return [float(memory)] if memory else []
    is_record = metric is not None and "/" in metric
    runs = read.read(folder, [metric] if metric and is_record else [])
    if is_record:
        return [
            float(np.median(list(curve.values())))
            for run in runs
            for curve in run.evaluations.get(str(metric), {}).values()
        ]
    return [float(x) for line in read.pool(runs, metric) for x in line.score]


def of_curves(panels: Sequence[Sequence[Line]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table beside a figure of curves."""
    for line in (line for panel in panels for line in panel):
        about = {"task": f"{line.suite}/{line.task}", "line": line.label, "metric": line.metric}
        for step, values in zip(line.steps, line.values, strict=True):
            for seed, value in zip(line.curves, values, strict=True):
                yield about | {"seed": seed, "env_steps": int(step), "value": f"{value:.5g}"}


def of_points(points: Mapping[str | None, Points], axis: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table beside a figure over another axis than steps."""
    for metric, by_system in points.items():
        for system, by_position in by_system.items():
            for position, values in by_position.items():
                for value in values:
                    about = {"metric": metric, "system": system, axis: position}
                    yield about | {"value": f"{value:.5g}"}
