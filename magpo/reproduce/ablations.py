"""The papers' ablations, trained and drawn: `python -m magpo.reproduce figure-5a`."""

import re
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from magpo import published, tables
from magpo.plot import draw, read
from magpo.plot.read import Line
from magpo.report.measurements import printed_name
from magpo.reproduce import results, training
from magpo.runs import folders

TABLE = Path(__file__).with_suffix(".yaml")
MEMORY = "memory"  # the metric that is in run.json: the bytes that training takes on each device
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class Command(NamedTuple):
    """A run of an ablation."""

    words: tuple[str, ...]  # a system and its overrides
    position: float | None  # on the figure's axis, unless that has the environment steps


class Ablation(NamedTuple):
    """A figure or table of a paper, an entry of ablations.yaml, with one of its budgets."""

    name: str
    source: str  # the paper and the figure, "MAGPO, Figure 5(a)"
    about: str
    shows: str  # what the paper shows, in words
    metrics: tuple[str | None, ...]  # None: the headline metric
    axis: str | None  # None: environment steps
    commands: tuple[Command, ...]


class Value(NamedTuple):
    """A seed's value of a metric, at a position on a figure's axis."""

    metric: str
    system: str
    position: float
    seed: int
    value: float


@cache
def entries() -> dict[str, Any]:
    """Return the entries of ablations.yaml by name."""
    return dict(yaml.safe_load(TABLE.read_text(encoding="utf-8")))


def find(name: str, budget: str) -> Ablation:
    """Return an ablation with the budget `paper` or `laptop`."""
    entry = entries()[name]
    more = ""
    if budget == "laptop":
        entry = entry | entry["laptop"]
        more = entry["words"]
    positions = entry.get("positions", [None])
    commands = [
        Command(in_published_game(words.split()), positions[i % len(positions)])
        for run in entry["runs"]
        for i, words in enumerate(expanded(f"{run} {more}"))
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


def in_published_game(words: Sequence[str]) -> tuple[str, ...]:
    """Return a run's words with `published=true`, if the papers' tables have its task."""
    (task,) = (text[4:] for text in words if text.startswith("env="))
    return (*words, "published=true") if published.has(task) else (*words,)


def expanded(text: str) -> list[str]:
    """Return a text for each combination of the alternatives in its {a,b}; the last vary first."""
    parts = re.split(r"\{(.*?)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def train(
    ablation: Ablation, seeds: Sequence[int], overrides: Sequence[str], results_dir: str
) -> int:
    """Train the missing seeds of all runs, one run after another.

    Returns the first exit code that is not 0. After a run that fails the others continue, unless a
    signal has stopped it.
    """
    first = 0
    for number, command in enumerate(ablation.commands, 1):
        print(f"run {number} of {len(ablation.commands)}: {' '.join(command.words)}", flush=True)
        code = training.train(command.words, seeds, overrides, results_dir)
        first = first or code
        if code in STOPPED:
            break
    return first


def write(ablation: Ablation, results_dir: str, out: Path) -> Path | None:
    """Draw the runs so far, and write their values beside the figure; `out` has no suffix.

    Returns the figure's path, or None without any value yet.
    """
    found = [
        (command, run.folder)
        for command in ablation.commands
        for run in results.runs(command.words, results_dir)
        if (run.folder / "metrics.jsonl").exists()
    ]
    title = f"{ablation.source}: {ablation.about}"
    caption = [f"In the paper: {ablation.shows}"]
    if ablation.axis is None:
        panels = curves([folder for _, folder in found], ablation.metrics)
        rows = [*_rows(panels)]
    else:
        values = [*over_axis(found, ablation.metrics)]
        rows = [x._asdict() for x in values]
    if not rows:
        return None
    if ablation.axis is None:
        figure = draw.panels(panels, title, caption)
    else:
        figure = draw.points(_by_metric(values), ablation.axis, title, caption)
    out.parent.mkdir(parents=True, exist_ok=True)
    tables.write(out.with_suffix(".csv"), rows)
    draw.save(figure, out, ["png"])
    return out.with_suffix(".png")


def curves(runs: Sequence[Path], metrics: Sequence[str | None]) -> list[list[Line]]:
    """Return the lines of each panel: a metric on a task."""
    records = [metric for metric in metrics if metric and "/" in metric]
    measured = [run for folder in runs for run in read.read(folder, records) if run.evaluations]
    panels = list[list[Line]]()
    for metric in metrics:
        by_task = defaultdict[str, list[Line]](list)
        for line in _pooled(measured, metric):
            by_task[f"{line.suite}/{line.task}"].append(line)
        panels += by_task.values()
    return panels


def over_axis(
    found: Sequence[tuple[Command, Path]], metrics: Sequence[str | None]
) -> Iterator[Value]:
    """Yield each seed's absolute metric, or its last evaluation.

    Of other metrics than evaluations' it is the median over the run.
    """
    for metric in metrics:
        for command, folder in found:
            assert command.position is not None
            place = printed_name(command.words[0]), command.position
            if metric == MEMORY:
                if memory := folders.about(folder).get("memory_bytes"):
                    yield Value(metric, *place, seed=0, value=float(memory))
                continue
            is_record = metric is not None and "/" in metric
            for line in _pooled(read.read(folder, [str(metric)] if is_record else []), metric):
                values = np.median(line.values, axis=0) if is_record else line.score
                for seed, value in zip(line.curves, values, strict=True):
                    yield Value(line.metric, *place, seed, float(value))


def _pooled(runs: Sequence[read.Run], metric: str | None) -> list[Line]:
    """Return the runs' lines, none of runs without the metric."""
    having = [run for run in runs if metric is None or metric in run.evaluations]
    return read.pool(having, metric) if having else []


def _by_metric(values: Sequence[Value]) -> dict[str, draw.Points]:
    metrics = dict.fromkeys(x.metric for x in values)
    points: dict[str, Any] = {metric: defaultdict(lambda: defaultdict(list)) for metric in metrics}
    for x in values:
        points[x.metric][x.system][x.position].append(x.value)
    return points


def _rows(panels: Sequence[Sequence[Line]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table beside a figure of curves."""
    for line in (line for panel in panels for line in panel):
        about = {"task": f"{line.suite}/{line.task}", "line": line.label, "metric": line.metric}
        for step, values in zip(line.steps, line.values, strict=True):
            for seed, value in zip(line.curves, values, strict=True):
                yield about | {"seed": seed, "env_steps": int(step), "value": f"{value:.5g}"}
