"""The learning curve of one run, as for a paper. Imports matplotlib: import it late."""

import csv
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter

from magpo.console import spread
from magpo.loggers import Measurement, Run

PUBLISHED = Path(__file__).resolve().parent.parent / "scripts/published/magpo_table1.csv"
BLUE, ORANGE, GREY = "#0b62a4", "#d1580d", "#5f6368"


def draw(path: Path, run: Run, measurements: list[Measurement]) -> None:
    """Draw the headline metric over environment steps to a PNG."""
    curve = [m for m in measurements if m.chunk is not None]
    steps = np.array([m.env_steps[0] for m in curve])  # (K,)
    values = np.stack([m.evaluation[run.headline].mean(-1) for m in curve])  # (K, S)
    low, high, meaning = band(values)

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)  # inches: the last tick label's room
    figure = Figure(figsize=(6.4, 4.0), layout=layout)
    axes = figure.add_subplot()
    num_seeds = values.shape[1]
    if meaning:
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0, label=meaning)
        axes.plot(steps, values, color=BLUE, alpha=min(0.35, 1.5 / num_seeds), linewidth=0.7)
    label = f"mean of {num_seeds} seeds" if num_seeds > 1 else f"seed {run.seeds[0]}"
    marker = "o" if len(steps) < 3 else None
    axes.plot(steps, values.mean(1), color=BLUE, linewidth=2, marker=marker, label=label)
    for m in measurements:
        if m.chunk is None:
            _mark_absolute(axes, steps[-1], m.evaluation[run.headline])
    reference = published(run.system, run.suite, run.task)
    if reference:
        text = f"published (20M steps): {reference[0]:.2f} ± {reference[1]:.2f}"
        axes.axhline(reference[0], color=GREY, linestyle=(0, (5, 3)), linewidth=1.2, label=text)

    metric = run.headline.replace("_", " ")
    axes.set_title(f"{run.system.upper()} on {run.suite}/{run.task}", loc="left", fontsize=11)
    axes.set_xlabel("environment steps (per seed)")
    axes.set_ylabel(f"evaluation {metric}")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.08)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    figure.savefig(path, format="png", dpi=200)


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """The (K,) lower and upper edge of (K, S) values, and their meaning; none for one seed.

    Fewer than five seeds have no honest interval: there it is their range.
    """
    num_seeds = values.shape[1]
    if num_seeds == 1:
        return values[:, 0], values[:, 0], ""
    if num_seeds < 5:
        return values.min(1), values.max(1), "smallest to largest seed"
    draws = np.random.default_rng(0).integers(num_seeds, size=(2000, num_seeds))
    low, high = np.percentile(values[:, draws].mean(-1), [2.5, 97.5], axis=1)
    return low, high, "95 % bootstrap interval of the mean"


def _mark_absolute(axes: Axes, step: int, values: np.ndarray) -> None:
    """The absolute metric at the curve's end: mean and standard deviation over seeds, (S, K)."""
    seeds, episodes = values.mean(-1), values.shape[1]
    text = f"absolute metric ({episodes} episodes): {spread(seeds)}"
    error = seeds.std() if len(seeds) > 1 else None
    axes.errorbar(
        step, seeds.mean(), error, fmt="D", color=ORANGE, markersize=5, capsize=3, label=text,
        clip_on=False, zorder=5,
    )  # fmt: skip


def published(system: str, suite: str, task: str) -> tuple[float, float] | None:
    """The published (mean, standard deviation), where the table is at hand and has the task."""
    if not PUBLISHED.is_file():
        return None
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["system"], row["suite"], row["task"]) == (system, suite, task):
                return float(row["mean"]), float(row["std"])
    return None
