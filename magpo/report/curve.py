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
    settings = members.by_setting(run.members)
    longest = max(len(members.label(setting)) for setting, _ in settings)
    columns = 3 if 0 < longest <= 22 else 2  # of the legend
    width, rows = 6.4, 2
    if len(settings) > 1:
        width, rows = 7.6, math.ceil((len(settings) + 3) / columns)

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)  # inches: the last tick label's room
    figure = Figure(figsize=(width, 3.66 + 0.17 * rows), layout=layout)
    axes = figure.add_subplot()
    _draw_settings(axes, run, steps, values, absolute)
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


def _draw_settings(
    axes: Axes, run: Run, steps: np.ndarray, values: np.ndarray, absolute: np.ndarray | None
) -> None:
    """Draw each setting's mean over seeds, their band, and the absolute metric at the end.

    A single setting has its seeds drawn too; the legend explains all settings' bands and metrics.
    """
    settings = members.by_setting(run.members)
    num_seeds, several = len(settings[0][1]), len(settings) > 1
    for i, (setting, places) in enumerate(settings):
        seeds = values[:, places]
        low, high, meaning = band(seeds)
        colour, dashes = shade(i, len(settings))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        label = members.label(setting)
        if not several:
            label = f"mean of {num_seeds} seeds" if num_seeds > 1 else run.members[0].name
            alpha = min(0.35, 1.5 / num_seeds)
            axes.plot(steps, seeds, color=colour, alpha=alpha, linewidth=0.7)
        axes.plot(
            steps, seeds.mean(1), color=colour, linewidth=1.8, linestyle=dashes, label=label,
            marker="o" if len(steps) < 3 else None,  # a curve of one or two points is not visible
        )  # fmt: skip
        if absolute is not None:
            score = absolute[places].mean(-1)
            axes.errorbar(
                steps[-1], score.mean(), score.std() if num_seeds > 1 else None, fmt="D",
                color=colour if several else ORANGE, markersize=5, capsize=3, clip_on=False,
                zorder=5,
            )  # fmt: skip
    if num_seeds > 1:
        text, colour = (f"{meaning} ({num_seeds} seeds)", GREY) if several else (meaning, BLUE)
        axes.fill_between([], [], [], color=colour, alpha=0.25, linewidth=0, label=text)
    if absolute is not None:
        text, colour = f"absolute metric ({absolute.shape[1]} episodes)", GREY
        if not several:
            text, colour = f"{text}: {spread(absolute.mean(-1))}", ORANGE
        axes.plot([], [], "D", color=colour, markersize=5, label=text)


def shade(place: int, number: int) -> tuple[Any, str]:
    """Return the colour and line style of one of `number` settings; a single one is blue.

    Several run in order through a map that colour-blind readers can follow, without its palest end.
    Many neighbours look alike: there the line styles alternate.
    """
    if number == 1:
        return BLUE, "-"
    colour = matplotlib.colormaps["viridis"](0.85 * place / (number - 1))
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


def published(system: str, suite: str, task: str) -> tuple[float, float] | None:
    """Return the published (mean, standard deviation) if the table exists and has the task."""
    if not PUBLISHED.is_file():
        return None
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["system"], row["suite"], row["task"]) == (system, suite, task):
                return float(row["mean"]), float(row["std"])
    return None
