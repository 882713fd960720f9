"""The learning curve of one run, drawn as for a paper. Imports matplotlib: import it late."""

import csv
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter

from magpo.config import members
from magpo.config.members import Setting
from magpo.report.console import spread
from magpo.report.measurements import Measurement, Run

PUBLISHED = Path(__file__).resolve().parents[2] / "scripts/published/magpo_table1.csv"
BLUE, ORANGE, GREY = "#0b62a4", "#d1580d", "#5f6368"


def draw(path: Path, run: Run, measurements: list[Measurement]) -> None:
    """Draw the headline metric over environment steps to a PNG."""
    curve = [m for m in measurements if m.chunk is not None]
    steps = np.array([m.env_steps[0] for m in curve])  # (K,)
    values = np.stack([m.evaluation[run.headline].mean(-1) for m in curve])  # (K, M)
    absolute = next((m.evaluation[run.headline] for m in measurements if m.chunk is None), None)
    settings = run.by_setting()
    columns = _legend_columns(settings)
    width, rows = 6.4, 2
    if len(settings) > 1:
        width, rows = 7.6, math.ceil((len(settings) + 3) / columns)

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)  # inches: the last tick label's room
    figure = Figure(figsize=(width, 3.66 + 0.17 * rows), layout=layout)
    axes = figure.add_subplot()
    if len(settings) > 1:
        _draw_settings(axes, settings, steps, values, absolute)
    else:
        _draw_seeds(axes, run, steps, values, absolute)
    reference = published(run.system, run.suite, run.task)
    if reference:
        text = f"published (20M steps): {reference[0]:.2f} ± {reference[1]:.2f}"
        axes.axhline(reference[0], color=GREY, linestyle=(0, (5, 3)), linewidth=1.2, label=text)

    metric = run.headline.replace("_", " ")
    axes.set_title(f"{run.system.upper()} on {run.suite}/{run.task}", loc="left", fontsize=11)
    axes.set_xlabel(f"environment steps (per {'member' if len(settings) > 1 else 'seed'})")
    axes.set_ylabel(f"evaluation {metric}")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.08)
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
    figure.savefig(path, format="png", dpi=200)


def _legend_columns(settings: list[tuple[Setting, list[int]]]) -> int:
    """Return how many columns of settings fit side by side below the axes."""
    longest = max(len(members.label(setting)) for setting, _ in settings)
    return 3 if 0 < longest <= 22 else 2


def _draw_seeds(
    axes: Axes, run: Run, steps: np.ndarray, values: np.ndarray, absolute: np.ndarray | None
) -> None:
    """Draw the mean over seeds, their band, each seed, and the absolute metric at the end."""
    low, high, meaning = band(values)
    num_seeds = values.shape[1]
    if meaning:
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0, label=meaning)
        axes.plot(steps, values, color=BLUE, alpha=min(0.35, 1.5 / num_seeds), linewidth=0.7)
    label = f"mean of {num_seeds} seeds" if num_seeds > 1 else run.members[0].name
    axes.plot(steps, values.mean(1), color=BLUE, linewidth=2, marker=_marker(steps), label=label)
    if absolute is not None:
        text = f"absolute metric ({absolute.shape[1]} episodes): {spread(absolute.mean(-1))}"
        _mark_absolute(axes, steps[-1], absolute, ORANGE, text)


def _draw_settings(
    axes: Axes,
    settings: list[tuple[Setting, list[int]]],
    steps: np.ndarray,
    values: np.ndarray,
    absolute: np.ndarray | None,
) -> None:
    """Draw each setting's mean over seeds, the band of its seeds, and its absolute metric."""
    num_seeds = len(settings[0][1])
    for i, (setting, places) in enumerate(settings):
        colour, dashes = shade(i, len(settings))
        low, high, meaning = band(values[:, places])
        if meaning:
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            steps, values[:, places].mean(1), color=colour, linewidth=1.8, linestyle=dashes,
            marker=_marker(steps), label=members.label(setting),
        )  # fmt: skip
        if absolute is not None:
            _mark_absolute(axes, steps[-1], absolute[places], colour)
    if num_seeds > 1:
        text = f"{meaning} ({num_seeds} seeds)"
        axes.fill_between([], [], [], color=GREY, alpha=0.3, linewidth=0, label=text)
    if absolute is not None:
        text = f"absolute metric ({absolute.shape[1]} episodes)"
        axes.plot([], [], "D", color=GREY, markersize=5, label=text)


def _marker(steps: np.ndarray) -> str | None:
    """Return the marker that makes a curve of one or two points visible."""
    return "o" if len(steps) < 3 else None


def shade(place: int, number: int) -> tuple[Any, str]:
    """Return the colour and line style of one of `number` settings.

    The colours run in order through a map that colour-blind readers can follow, without its palest
    end. Many neighbours look alike: there the line styles alternate.
    """
    colour = matplotlib.colormaps["viridis"](0.85 * place / max(1, number - 1))
    return colour, ("-", "--", ":")[place % 3] if number > 6 else "-"


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the (K,) lower and upper edge of (K, S) values and their meaning, "" for one seed.

    Fewer than five seeds give no honest interval: for those it is their range.
    """
    num_seeds = values.shape[1]
    if num_seeds == 1:
        return values[:, 0], values[:, 0], ""
    if num_seeds < 5:
        return values.min(1), values.max(1), "smallest to largest seed"
    draws = np.random.default_rng(0).integers(num_seeds, size=(2000, num_seeds))
    low, high = np.percentile(values[:, draws].mean(-1), [2.5, 97.5], axis=1)
    return low, high, "95 % bootstrap interval of the mean"


def _mark_absolute(
    axes: Axes, step: int, values: np.ndarray, colour: Any, text: str | None = None
) -> None:
    """Mark the absolute metric, (S, K), at the end: mean and standard deviation over seeds."""
    seeds = values.mean(-1)
    error = seeds.std() if len(seeds) > 1 else None
    axes.errorbar(
        step, seeds.mean(), error, fmt="D", color=colour, markersize=5, capsize=3, label=text,
        clip_on=False, zorder=5,
    )  # fmt: skip


def published(system: str, suite: str, task: str) -> tuple[float, float] | None:
    """Return the published (mean, standard deviation) if the table exists and has the task."""
    if not PUBLISHED.is_file():
        return None
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["system"], row["suite"], row["task"]) == (system, suite, task):
                return float(row["mean"]), float(row["std"])
    return None
