"""Figures of pooled runs and of their aggregates."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from magpo import published
from magpo.plot.aggregate import AGGREGATES, THRESHOLDS, Interval, bounds
from magpo.plot.read import Line
from magpo.report import curve

COLOURS = (
    *(curve.BLUE, "#d1580d", "#2b8a3e", "#8e44ad", "#c2185b", "#00868b", "#8a6d1d"),
    *("#3d3d3d", "#6c8ebf", "#e08e79"),
)
QUANTITIES = {"memory": "memory (bytes)", "time/steps_per_s": "training steps per second"}
NO_ABSOLUTE, ENDED_EARLY = "*", "†"  # marks after the names of systems
Colours = Mapping[str, str]  # by label
Points = Mapping[str, Mapping[float, Sequence[float]]]  # seeds' values by system and position


def colours_of(lines: Sequence[Line]) -> Colours:
    """Return a colour for each label, in the order of the systems."""
    labels = list(dict.fromkeys(line.label for line in lines))
    if len(labels) > len(COLOURS):
        return {label: curve.shade(i, len(labels))[0] for i, label in enumerate(labels)}
    return dict(zip(labels, COLOURS, strict=False))


def save(figure: Figure, path: Path, formats: Sequence[str]) -> None:
    """Write a figure in each format; `path` has no suffix."""
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # conferences refuse Type 3 fonts
        for name in formats:
            figure.savefig(f"{path}.{name}", dpi=200)


def task(lines: Sequence[Line], colours: Colours) -> Figure:
    """Draw the evaluation curves of one task: the mean over seeds and its band."""
    figure, (axes,) = canvas(7.0, 4.0)
    handles = curves(axes, lines, colours)
    legend(figure, handles + references(axes, lines, colours))
    return figure


def panels(groups: Sequence[Sequence[Line]], title: str, caption: Sequence[str]) -> Figure:
    """Draw evaluation curves, each group in a panel of its own."""
    figure, each = grid(len(groups))
    colours = colours_of([line for lines in groups for line in lines])
    handles = list[Artist]()
    for axes, lines in zip(each, groups, strict=True):
        handles += curves(axes, lines, colours) + references(axes, lines, colours)
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    legend(figure, distinct(handles), caption)
    return figure


def points(found: Mapping[str, Points], axis: str, title: str, caption: Sequence[str]) -> Figure:
    """Draw values over an axis of settings, a panel for each metric and a line for each system."""
    figure, each = grid(len(found))
    systems = dict.fromkeys(system for by_system in found.values() for system in by_system)
    colours = dict(zip(systems, COLOURS, strict=False))
    handles = list[Artist]()
    for axes, (metric, by_system) in zip(each, found.items(), strict=True):
        ticks = sorted({position for by_position in by_system.values() for position in by_position})
        for system, by_position in by_system.items():
            positions = sorted(by_position)
            values = [by_position[position] for position in positions]
            low, high, means = map(min, values), map(max, values), map(np.mean, values)
            colour = colours[system]
            axes.fill_between(positions, [*low], [*high], color=colour, alpha=0.16, linewidth=0)
            axes.plot(positions, [*means], "o-", color=colour, linewidth=2, label=system)
        axes.set_xscale("log")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_xlabel(axis, fontsize=11)
        axes.set_ylabel(QUANTITIES.get(metric, shown(metric)), fontsize=11)
        if metric in QUANTITIES:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        handles += axes.get_legend_handles_labels()[0]
        if any(len(seeds) > 1 for places in by_system.values() for seeds in places.values()):
            handles.append(explained("smallest to largest seed"))
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    legend(figure, distinct(handles), caption)
    return figure


def distinct(handles: Iterable[Artist]) -> list[Artist]:
    """Return the first of the legend's entries with each label."""
    by_label = dict[str, Artist]()
    for handle in handles:
        by_label.setdefault(str(handle.get_label()), handle)
    return list(by_label.values())


def explained(label: str) -> Artist:
    """Return the legend's entry for bands."""
    return Patch(color=curve.GREY, alpha=0.3, linewidth=0, label=label)


def curves(axes: Axes, lines: Sequence[Line], colours: Colours) -> list[Artist]:
    """Draw evaluation curves, and return the legend's entries."""
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
        handles.append(explained(text))
    of_steps(axes)
    axes.set_title(f"{lines[0].suite}/{lines[0].task}", loc="left", fontsize=12)
    unit = " (0 to 1)" if lines[0].metric == "win_rate" else ""
    kind = "" if "/" in lines[0].metric else "evaluation "
    axes.set_ylabel(f"{kind}{shown(lines[0].metric)}{unit}", fontsize=11)
    return handles


def references(axes: Axes, lines: Sequence[Line], colours: Colours) -> list[Artist]:
    """Draw a dashed line at each published result; return the legend's entries, one for each
    paper's table and number of steps."""
    labels = defaultdict[published.Row, list[str]](list)
    for line in lines:
        if line.reference:
            labels[line.reference].append(line.label)
    rows = {  # several settings of a system may share a row
        row: colours[own[0]] if len(own) == 1 else curve.GREY for row, own in labels.items()
    }
    for i, (row, colour) in enumerate(rows.items()):
        dashes = (5 * (i % 2), (5, 5))  # two lines at the same height fill each other's gaps
        axes.axhline(row.mean, color=colour, linestyle=dashes, linewidth=1.3, zorder=1.5)
    entries: dict[str, set[str]] = {}
    for row, colour in rows.items():
        label = f"published: {row.source}, after {row.steps}"
        entries.setdefault(label, set()).add(colour)
    return [
        Line2D([], [], color=min(same) if len(same) == 1 else curve.GREY, ls="--", label=label)
        for label, same in entries.items()
    ]


def aggregates(found: Mapping[str, Interval], lines: Sequence[Line], colours: Colours) -> Figure:
    """Draw one suite's AGGREGATES, a row for each system."""
    names = [f"{name}\n{size(label, lines)}" for label, name in marked(found, lines).items()]
    figure, panels = row_canvas(names, len(AGGREGATES))
    for i, (axes, aggregate) in enumerate(zip(panels, AGGREGATES, strict=True)):
        for place, (label, interval) in enumerate(found.items()):
            row(axes, place, Interval(*(edge[i] for edge in interval)), colours[label])
        note = "\n(lower is better)" if aggregate == "optimality_gap" else ""
        axes.set_xlabel(shown(aggregate) + note, fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    describe(figure, lines, "aggregate scores")
    return figure


def improvement(found: Mapping[tuple[str, str], Interval], lines: Sequence[Line]) -> Figure:
    """Draw P(X > Y), a row for each pair of systems."""
    marks = marked([line.label for line in lines], lines)
    pairs = [(marks[x], marks[y]) for x, y in found]
    names = [x + ("  >  " if len(x + y) < 40 else "  >\n") + y for x, y in pairs]
    figure, (axes,) = row_canvas(names)
    for place, interval in enumerate(found.values()):
        row(axes, place, interval, curve.BLUE)
    axes.axvline(0.5, color=curve.GREY, linestyle=(0, (5, 3)), linewidth=1.2, zorder=0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("P(X > Y)", fontsize=11)
    describe(figure, lines, "probability of improvement")
    return figure


def profiles(found: Mapping[str, Interval], lines: Sequence[Line], colours: Colours) -> Figure:
    """Draw one suite's performance profiles."""
    figure, (axes,) = canvas(7.0, 4.0)
    for label, name in marked(found, lines).items():
        band(axes, THRESHOLDS, found[label], colours[label], f"{name}, {size(label, lines)}")
    axes.set_xlabel("normalised score τ", fontsize=11)
    axes.set_ylabel("share of seeds and tasks above τ", fontsize=11)
    axes.set_ylim(-0.02, 1.02)
    describe(figure, lines, "performance profiles", axes.get_legend_handles_labels()[0])
    return figure


def over_steps(
    found: Mapping[str, tuple[np.ndarray, Interval]], lines: Sequence[Line], colours: Colours
) -> Figure:
    """Draw the IQM of one suite's evaluations over environment steps."""
    figure, (axes,) = canvas(7.0, 4.0)
    for label, (steps, interval) in found.items():
        band(axes, steps, interval, colours[label], f"{label}, {size(label, lines)}")
    of_steps(axes)
    axes.set_ylabel("IQM of normalised evaluations", fontsize=11)
    describe(figure, lines, "sample efficiency", axes.get_legend_handles_labels()[0], last=False)
    return figure


def canvas(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side, without boxes around them."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    return figure, styled(figure.subplots(1, panels, sharey=True, squeeze=False))


def grid(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels that share no axis, two in a row."""
    rows, columns = math.ceil(panels / 2), min(panels, 2)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(1.5 + 5.0 * columns, 0.4 + 3.2 * rows), layout=layout)
    axes = styled(figure.subplots(rows, columns, squeeze=False))
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def styled(axes: np.ndarray) -> list[Axes]:
    """Return the axes of a grid, without boxes around them."""
    for one in axes.flat:
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=10)
        one.grid(color="#e6e6e6", linewidth=0.8)
        one.margins(x=0.02, y=0.06)
    return list(axes.flat)


def row_canvas(names: Sequence[str], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with a row for each name, the first on top."""
    parts = [part for name in names for part in name.split("\n")]
    width = 0.09 * max(map(len, parts)) + max(5.6, 2.2 * panels)
    height = (0.5 if len(parts) > len(names) else 0.34) * len(names)
    figure, axes = canvas(width, 1.5 + height, panels)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure, axes


def row(axes: Axes, place: int, interval: Interval, colour: str) -> None:
    """Draw a point and its interval."""
    point, low, high = interval
    axes.barh(place, high - low, 0.45, low, color=colour, alpha=0.3)
    axes.plot(point, place, "D", color=colour, markersize=6, clip_on=False)
    axes.use_sticky_edges = False  # bars have a margin too
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def band(axes: Axes, x: np.ndarray, interval: Interval, colour: str, label: str) -> None:
    """Draw a curve with its intervals."""
    axes.fill_between(x, interval.low, interval.high, color=colour, alpha=0.16, linewidth=0)
    marker = "o" if len(x) < 3 else None
    axes.plot(x, interval.point, color=colour, linewidth=2, marker=marker, label=label)


def of_steps(axes: Axes) -> None:
    """Label the axis of environment steps."""
    axes.set_xlabel("environment steps (per seed)", fontsize=11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def legend(figure: Figure, handles: Sequence[Artist], caption: Sequence[str] = ()) -> None:
    """Put the caption's sentences below the axes, and below them the legend, in as many columns as
    fit. The figure grows to hold both."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = 3 if longest < 28 else 2 if longest < 40 else 1
    figure.set_figwidth(max(figure.get_figwidth(), 0.9 + 0.08 * longest))
    width = int(15 * figure.get_figwidth())  # characters
    words = "\n".join(textwrap.fill(sentence, width) for sentence in caption)
    height = 0.2 * math.ceil(len(handles) / columns) + 0.15 * (words.count("\n") + 1)
    figure.set_figheight(figure.get_figheight() + height)
    figure.legend(
        handles=handles,
        loc="outside lower left" if caption else "outside lower center",
        ncols=columns,
        fontsize=9.5,
        frameon=False,
        title=words,
        title_fontproperties={"size": 8.5},
        alignment="left",
    ).get_title().set_color(curve.GREY)


def describe(
    figure: Figure,
    lines: Sequence[Line],
    what: str,
    handles: Sequence[Artist] = (),
    last: bool = True,
) -> None:
    """Give a suite's figure a title, and a caption that says how scores are normalised and, if
    `last`, which evaluation they are from."""
    caption = [f"{bounds_in_words(lines)}; 95 % stratified bootstrap intervals"]
    figure.suptitle(f"{lines[0].suite}: {what}", x=0.02, ha="left", fontsize=12)
    legend(figure, handles, [basis(lines), *caption] if last else caption)


def basis(lines: Sequence[Line]) -> str:
    """Return words for which evaluation the scores are from."""
    absolute = [line for line in lines if line.absolute is not None]
    where = " on some task" if len({line.task for line in lines}) > 1 else ""
    number = " or ".join(map(str, sorted({line.episodes for line in absolute} - {0})))
    text = f"absolute metric{f' ({number} episodes per seed)' * bool(number)}"
    if not absolute:
        text = "last evaluation, because no run has an absolute metric"
    elif len(absolute) < len(lines):
        text += f"; {NO_ABSOLUTE} no absolute metric{where}: the last evaluation"
    text += f"; {ENDED_EARLY} trained for fewer steps{where}" * bool(early(lines))
    return f"{shown(lines[0].metric)}: {text}"


def bounds_in_words(lines: Sequence[Line]) -> str:
    """Return words for the bounds by which each task's scores are normalised."""
    own, of_runs = defaultdict[str, list[str]](list), list[str]()
    for name, (low, high, is_own) in sorted(bounds(lines).items()):
        if is_own:
            own[f"{low:g} to {high:g}"].append(name)
        else:
            of_runs.append(f"{name}: {low:.4g} to {high:.4g}")
    parts = [f"the task's own bounds, {span} ({', '.join(names)})" for span, names in own.items()]
    if of_runs:
        parts.append(f"the smallest and largest evaluation of all runs ({', '.join(of_runs)})")
    return f"normalised by {' and '.join(parts)}"


def early(lines: Sequence[Line]) -> set[str]:
    """Return the labels whose runs end before others' on some task."""
    last: dict[str, int] = {}
    for line in lines:
        last[line.task] = max(last.get(line.task, 0), int(line.steps[-1]))
    # Rounding to whole chunks can cost up to one per cent.
    return {line.label for line in lines if line.steps[-1] < 0.99 * last[line.task]}


def marked(labels: Iterable[str], lines: Sequence[Line]) -> dict[str, str]:
    """Return each label as it appears beside scores, with its marks."""
    without = {line.label for line in lines if line.absolute is None}
    mixed, ended = any(line.absolute is not None for line in lines), early(lines)
    return {
        label: label + NO_ABSOLUTE * (mixed and label in without) + ENDED_EARLY * (label in ended)
        for label in labels
    }


def size(label: str, lines: Sequence[Line]) -> str:
    """Return how many tasks and seeds a system's aggregates use, "3 tasks x 5 seeds"."""
    seeds = [len(line.score) for line in lines if line.label == label]
    return f"{counted(len(seeds), 'task')} x {counted(min(seeds), 'seed')}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 seed", "2 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shown(metric: str) -> str:
    """Return a metric's name as axes show it."""
    return metric.upper() if metric == "iqm" else metric.replace("_", " ")
