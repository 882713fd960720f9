"""From results folders to a paper's figures and its table.

    python scripts/plot.py results/ [more/ ...] out=out/ reps=10000

reads every run under the folders, finished or not, and writes

    out/<suite>_<task>.png                         evaluation curves: mean over seeds, and its band
    out/iqm_<suite>.png                            interquartile mean over tasks and seeds
    out/probability_of_improvement_<suite>.png     P(X > Y) for each pair of systems
    out/summary.csv                                final metrics of each system and task

Runs of one system and task that differ only in their seeds are pooled; a seed given twice counts
once, the newest run's. Where settings differ, between runs or within a run that varies them, each
has its own line, named after the differences. The final evaluation is the last one that all pooled
seeds have; the papers report absolute metrics. The aggregates are rliable's (Agarwal et al., 2021):
`pip install -e '.[plot]'`. Their intervals are percentiles of a stratified bootstrap: seeds are
drawn anew within each task, `reps` times.
"""

import csv
import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from magpo import commands
from magpo import published as results
from magpo.errors import ConfigError
from magpo.files import UNREADABLE
from magpo.report import curve
from magpo.values import PositiveInt

WIN_RATE_SUITES = {"smax", "connector"}
# What says who ran it, how long it was looked at and where to, not what was learned.
NO_SETTINGS = {
    *("run", "seeds", "seeds_per_batch", "num_evaluations", "eval_episodes", "absolute_metric"),
    *("platform", "logger", "results_dir", "keep", "checkpoint_share"),
}
MARK = "*"
Metric = Callable[..., Any]  # of (N, M) matrices: seeds, tasks
ABSENT = object()  # a setting that another version's config.yaml has
COLUMNS = (
    *("system", "suite", "task", "seeds", "env_steps", "mean", "low", "high", "low_to_high"),
    *("published_mean", "published_std", "published_in"),
)
COLOURS = (
    *(curve.BLUE, "#d1580d", "#2b8a3e", "#8e44ad", "#c2185b", "#00868b", "#8a6d1d"),
    *("#3d3d3d", "#6c8ebf", "#e08e79"),
)


class Run(NamedTuple):
    """One run's evaluations of the headline metric."""

    system: str
    suite: str
    task: str
    name: str  # the run's id, which sorts by time
    settings: dict[str, Any]  # dotted keys
    values: dict[int, dict[int, float]]  # by seed, by environment steps


class Reference(NamedTuple):
    """A published value, in the unit of the runs."""

    mean: float
    std: float
    source: str


class Line(NamedTuple):
    """Pooled runs. K evaluations, S seeds."""

    label: str
    suite: str
    task: str
    steps: np.ndarray  # (K,)
    values: np.ndarray  # (K, S), by seed
    reference: Reference | None


class Row(NamedTuple):
    """An estimate with its interval."""

    label: str
    colour: str
    point: float
    low: float
    high: float


def headline(suite: str) -> str:
    """The metric that a suite's papers report."""
    return "win_rate" if suite in WIN_RATE_SUITES else "episode_return"


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def read(folder: Path) -> list[Run]:
    """Return a run's evaluations, a Run for each setting that it varies; none without any."""
    settings = settings_of(folder)
    varied = [key.removeprefix("vary.") for key in settings if key.startswith("vary.")]
    shared = {k: v for k, v in settings.items() if k.partition(".")[0] != "vary"}
    where, runs = None, dict[tuple[Any, ...], Run]()
    with (folder / "metrics.jsonl").open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                line = data.decode()
                if '"eval/' not in line or not line.endswith("\n"):  # training; or half-written
                    continue
                record = json.loads(line)
                where = record["system"], record["env"], record["task"], record["run"]
                if not all(isinstance(word, str) for word in where):
                    raise TypeError
                wanted = record["name"] == f"eval/{headline(record['env'])}"
                if not wanted or record["value"] is None:  # null: what JSON has no number for
                    continue
                setting = {key: record[key] for key in varied}
                run = Run(*where, settings=shared | setting, values={})
                run = runs.setdefault(tuple(setting.values()), run)
                of_seed = run.values.setdefault(index(record["seed"]), {})
                of_seed[index(record["env_steps"])] = record["value"] + 0.0
            except UNREADABLE:
                raise ConfigError(f"{folder}/metrics.jsonl: line {number} is no record") from None
    return list(runs.values())


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings in a run's config.yaml that decide what is learned."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ConfigError(f"{folder}: config.yaml holds no settings")
        settings = flat({key: value for key, value in config.items() if key not in NO_SETTINGS})
        return settings | {"run.published": config.get("run", {}).get("published", False)}
    except UNREADABLE:
        raise ConfigError(f"{folder}: config.yaml is missing or cannot be read") from None


def find(folders: list[Path]) -> list[Run]:
    """All runs under the folders that have evaluations, each once."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"no such folder: {folder}")
    found = {file.parent.resolve() for folder in folders for file in folder.rglob("metrics.jsonl")}
    names = ", ".join(map(str, folders))
    if not found:
        raise ConfigError(f"no runs (metrics.jsonl) under {names}")
    runs = [run for folder in sorted(found) for run in read(folder)]
    if not runs:
        raise ConfigError(f"no run under {names} has an evaluation yet")
    return runs


def pool(runs: list[Run]) -> list[Line]:
    """One line for each system, task and setting, by label."""
    together = defaultdict[tuple[str, str, str], list[Run]](list)
    for run in sorted(runs, key=lambda run: run.name):
        together[run.suite, run.task, run.system].append(run)
    lines = []
    for (suite, task, _), group in sorted(together.items()):
        for label, same in labelled(group).items():
            newest = {seed: values for run in same for seed, values in run.values.items()}
            seeds = [newest[seed] for seed in sorted(newest)]
            steps = sorted(set[int].intersection(*(set(seed) for seed in seeds)))
            if not steps:
                raise ConfigError(f"{label} on {suite}/{task}: no evaluation that all seeds have")
            values = np.array([[seed[step] for seed in seeds] for step in steps])
            lines.append(Line(label, suite, task, np.array(steps), values, published(same[-1])))
    return sorted(lines)


def labelled(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of one system and task by label: the system, and the settings that not all share."""
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
        system = run.system.upper().replace("_", "-")
        groups[f"{system} ({shown})" if shown else system].append(run)
    return groups


def written(value: Any) -> str:
    """A setting as on the command line."""
    if value is ABSENT:
        return "absent"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def published(run: Run) -> Reference | None:
    """Return the published value for a run's system, variant and task, if it is of that game."""
    about = {"run.system": run.system, "run.env": f"{run.suite}/{run.task}"}
    row = results.find(run.settings | about)
    return Reference(row.mean, row.std or 0.0, row.source) if row else None


def draw_task(path: Path, lines: list[Line], colours: dict[str, str]) -> None:
    """Evaluation curves of one task."""
    figure, axes = canvas(7.0, 4.6 + 0.12 * len(lines))
    meanings = {}
    for line in lines:
        low, high, meaning = curve.band(line.values)
        num_seeds, colour = line.values.shape[1], colours[line.label]
        if meaning:
            meanings[meaning] = "5 seeds and more" if num_seeds >= 5 else "fewer than 5 seeds"
            axes.fill_between(line.steps, low, high, color=colour, alpha=0.16, linewidth=0)
        label = f"{line.label}, {counted(num_seeds, 'seed')}"
        marker = "o" if len(line.steps) < 3 else None
        axes.plot(
            line.steps, line.values.mean(1), color=colour, linewidth=2, marker=marker, label=label
        )
    handles: list[Artist] = axes.get_legend_handles_labels()[0]
    for meaning, which in meanings.items():
        text = f"{meaning} ({which})" if len(meanings) > 1 else meaning
        handles.append(Patch(color=curve.GREY, alpha=0.3, linewidth=0, label=text))
    name_axes(axes, lines[0])
    legend(figure, handles + references(axes, lines, colours))
    figure.savefig(path, dpi=200)


def name_axes(axes: Axes, line: Line) -> None:
    """What is drawn, and its units."""
    axes.set_title(f"{line.suite}/{line.task}", loc="left", fontsize=12)
    axes.set_xlabel("environment steps (per seed)", fontsize=11)
    unit = " (0 to 1)" if headline(line.suite) == "win_rate" else ""
    axes.set_ylabel(f"evaluation {headline(line.suite).replace('_', ' ')}{unit}", fontsize=11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.margins(x=0.02, y=0.06)


def legend(figure: Figure, handles: list[Artist]) -> None:
    """Under the axes, where it covers nothing, in as many columns as there is room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = 3 if longest < 28 else 2 if longest < 40 else 1
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=9.5, frameon=False
    )


def references(axes: Axes, lines: list[Line], colours: dict[str, str]) -> list[Artist]:
    """Dash a line for each published value; return the legend's handles, one for each paper."""
    values: dict[tuple[str, Reference], str] = {}  # settings of one system share theirs
    for line in lines:
        if line.reference:
            system = line.label.partition(" (")[0]
            values.setdefault((system, line.reference), colours[line.label])
    for i, ((_, reference), colour) in enumerate(values.items()):
        dashes = (5 * (i % 2), (5, 5))  # of two equal values each fills the other's gaps
        axes.axhline(reference.mean, color=colour, linestyle=dashes, linewidth=1.3, zorder=1.5)
    sources = dict.fromkeys(reference.source for _, reference in values)
    return [
        Line2D([], [], color=curve.GREY, linestyle="--", label=f"published ({source})")
        for source in sources
    ]


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without a box around its axes."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    return figure, axes


def counted(number: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def normalised(lines: list[Line]) -> dict[str, dict[str, np.ndarray]]:
    """One suite's final evaluations, (S,) by label and task: 0 and 1 are a task's extremes.

    Over all systems and seeds, and the published values drawn with them.
    """
    extremes = defaultdict[str, list[float]](list)
    for line in lines:
        extremes[line.task] += [*line.values[-1]]
        extremes[line.task] += [line.reference.mean] if line.reference else []
    scores = defaultdict[str, dict[str, np.ndarray]](dict)
    for line in lines:
        low, high = min(extremes[line.task]), max(extremes[line.task])
        final = line.values[-1]
        # A task on which all are equal ranks nobody: all have its best.
        scores[line.label][line.task] = (
            (final - low) / (high - low) if high > low else np.ones_like(final)
        )
    return dict(scores)


def matrix(scores: dict[str, np.ndarray], tasks: list[str]) -> np.ndarray:
    """(N, M) for rliable: as many seeds as every one of the tasks has."""
    num_seeds = min(len(scores[task]) for task in tasks)
    return np.stack([scores[task][:num_seeds] for task in tasks], axis=1)


def rliable_metrics() -> Any:
    """rliable's metrics; ConfigError where it is not installed."""
    try:
        return importlib.import_module("rliable.metrics")
    except ImportError:
        raise ConfigError("rliable is not installed: pip install -e '.[plot]'") from None


def beats(x: np.ndarray, y: np.ndarray) -> float:
    """rliable's probability_of_improvement, without the p-values that take it 99 % of its time."""
    above = (x[:, None] > y).mean() + (x[:, None] == y).mean() / 2  # (N_x, N_y, M), a tie is half
    return float(above)


def estimate(
    metric: Metric, scores: Sequence[np.ndarray], reps: int, quick: Metric | None = None
) -> tuple[float, float, float]:
    """A metric of (N, M) matrices and the edges of its 95 % stratified bootstrap interval.

    What rliable.library does; but that imports `arch`, which pandas 3 broke. `quick` is the same
    metric for the bootstrap's draws.
    """
    draw, found = np.random.default_rng(0), []
    for _ in range(reps):
        seeds = [draw.integers(len(x), size=x.shape) for x in scores]  # anew for each task
        found.append((quick or metric)(*map(partial(np.take_along_axis, axis=0), scores, seeds)))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(metric(*scores)), float(low), float(high)


def iqm(scores: dict[str, dict[str, np.ndarray]], colours: dict[str, str], reps: int) -> list[Row]:
    """Each system's interquartile mean over the tasks it has, the best first."""
    metric = rliable_metrics().aggregate_iqm
    matrices = {label: matrix(tasks, sorted(tasks)) for label, tasks in scores.items()}
    found = {label: estimate(metric, [x], reps) for label, x in matrices.items()}
    rows = []
    for label in sorted(found, key=lambda label: -found[label][0]):
        num_seeds, num_tasks = matrices[label].shape
        size = f"{counted(num_tasks, 'task')} x {counted(num_seeds, 'seed')}"
        rows.append(Row(f"{label}\n{size}", colours[label], *found[label]))
    return rows


def improvement(scores: dict[str, dict[str, np.ndarray]], reps: int) -> list[Row]:
    """P(X > Y) for each pair, over the tasks that both have; P(Y > X) is the rest to 1."""
    metric, rows = rliable_metrics().probability_of_improvement, []
    for x, y in combinations(sorted(scores), 2):
        if tasks := sorted(scores[x].keys() & scores[y].keys()):
            found = estimate(
                metric, [matrix(scores[x], tasks), matrix(scores[y], tasks)], reps, beats
            )
            gap = "  >  " if len(x + y) < 40 else "  >\n"  # long ones take two lines
            rows.append(Row(f"{x}{gap}{y}", curve.BLUE, *found))
    return rows


def draw_rows(path: Path, rows: list[Row], title: str, xlabel: str, even: float | None) -> None:
    """A point and its interval for each row; `even` is where neither side is better."""
    parts = [part for row in rows for part in row.label.split("\n")]
    height = 0.5 if any("\n" in row.label for row in rows) else 0.32
    figure, axes = canvas(5.6 + 0.09 * max(map(len, parts)), 1.3 + height * len(rows))
    places = list(range(len(rows)))
    for place, row in enumerate(rows):
        axes.barh(place, row.high - row.low, 0.45, row.low, color=row.colour, alpha=0.3)
        axes.plot(row.point, place, "D", color=row.colour, markersize=6, clip_on=False)
    axes.set_yticks(places, [row.label for row in rows])
    if even is not None:
        axes.axvline(even, color=curve.GREY, linestyle=(0, (5, 3)), linewidth=1.2, zorder=0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(xlabel, fontsize=11)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=200)


def write_summary(path: Path, lines: list[Line]) -> None:
    """A row for each system and task: its final evaluation beside the published value."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            low, high, meaning = curve.band(line.values[-1:])
            row = {
                "system": line.label,
                "suite": line.suite,
                "task": line.task,
                "seeds": line.values.shape[1],
                "env_steps": line.steps[-1],
                "mean": f"{line.values[-1].mean():.6g}",
            }
            if meaning:
                row |= {"low": f"{low[0]:.6g}", "high": f"{high[0]:.6g}", "low_to_high": meaning}
            if line.reference:
                mean, std, source = line.reference
                row |= {"published_mean": f"{mean:.6g}", "published_std": f"{std:.6g}"}
                row["published_in"] = source
            writer.writerow(row)


def marked(lines: list[Line]) -> dict[str, str]:
    """Labels of one suite as aggregates show them: what ended before others has a mark."""
    last: dict[str, int] = {}
    for line in lines:
        last[line.task] = max(last.get(line.task, 0), int(line.steps[-1]))
    early = {line.label for line in lines if line.steps[-1] < last[line.task]}
    return {line.label: line.label + MARK * (line.label in early) for line in lines}


def notes(lines: list[Line]) -> Iterator[str]:
    """What the aggregates do not show."""
    ends, sizes = defaultdict[str, set[int]](set), defaultdict[tuple[str, str], set[int]](set)
    for line in lines:
        ends[f"{line.suite}/{line.task}"].add(int(line.steps[-1]))
        sizes[line.suite, line.label].add(line.values.shape[1])
    for task, steps in ends.items():
        if len(steps) > 1:
            yield f"{task}: final evaluations are {min(steps)} to {max(steps)} steps in"
    few = [f"{label} on {suite}" for (suite, label), seeds in sizes.items() if min(seeds) < 5]
    if few:
        yield f"fewer than 5 seeds, aggregates' intervals are too narrow: {', '.join(few)}"
    for (suite, label), seeds in sizes.items():
        if len(seeds) > 1:
            yield f"{label} on {suite}: aggregates take {min(seeds)} seeds of every task"


def draw_suite(out: Path, lines: list[Line], colours: dict[str, str], reps: int) -> None:
    """One suite's aggregates."""
    suite, names = lines[0].suite, marked(lines)
    scores = {names[label]: tasks for label, tasks in normalised(lines).items()}
    shades = {name: colours[label] for label, name in names.items()}
    title, why = f"{suite}, with 95 % stratified bootstrap intervals", ""
    if any(name.endswith(MARK) for name in scores):
        why = f"\n{MARK} on some task its evaluations end before others'"
    text = f"IQM of the final evaluation, min-max normalised per task{why}"
    draw_rows(out / f"iqm_{suite}.png", iqm(scores, shades, reps), title, text, None)
    if rows := improvement(scores, reps):
        path = out / f"probability_of_improvement_{suite}.png"
        draw_rows(path, rows, title, f"P(X > Y) of the final evaluation{why}", 0.5)


def main(results: Path, *more: str, out: Path, reps: PositiveInt = 10000) -> None:
    """Write all figures and the table."""
    rliable_metrics()  # before anything is written
    lines = pool(find([results, *map(Path, more)]))
    out.mkdir(parents=True, exist_ok=True)
    labels = sorted({line.label for line in lines})
    colours = dict(zip(labels, COLOURS, strict=False))
    if len(labels) > len(COLOURS):
        colours = {label: curve.shade(i, len(labels))[0] for i, label in enumerate(labels)}
    write_summary(out / "summary.csv", lines)
    for suite, task in sorted({(line.suite, line.task) for line in lines}):
        same = [line for line in lines if (line.suite, line.task) == (suite, task)]
        draw_task(out / f"{suite}_{task}.png", same, colours)
    for suite in sorted({line.suite for line in lines}):
        draw_suite(out, [line for line in lines if line.suite == suite], colours, reps)
    for note in notes(lines):
        print(f"plot: note: {note}", file=sys.stderr)


if __name__ == "__main__":
    commands.run(__doc__, main)
