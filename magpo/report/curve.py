"""The learning curve of one run. Imports matplotlib, so import this module late."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from magpo.config import members
from magpo.report.console import sample_std, spread
from magpo.report.measurements import Measurement, Run, printed_name

BLUE, GREY = "#0b62a4", "#5f6368"


def draw(path: Path, run: Run, measurements: list[Measurement]) -> None:
    """Draw the headline metric over environment steps to a PNG.

    Each setting gets its mean over seeds, their band, and the absolute metric at the end; a single
    setting also gets a line for each seed. The legend explains bands and absolute metrics once.
    """
    curve = [m for m in measurements if m.chunk is not None]
    steps = np.array([m.env_steps[0] for m in curve])  # (K,)
    values = np.stack([m.evaluation[run.headline].mean(-1) for m in curve])  # (K, M)
    absolute = [m.evaluation[run.headline] for m in measurements if m.chunk is None]
    settings = members.by_setting(run.members)
    figure = Figure(figsize=(6.4, 3.66))
    axes = figure.add_subplot()
    for i, (setting, places) in enumerate(settings):
        last = i + 1 == len(settings)
        seeds = values[:, places]  # (K, S)
        colour, dashes = shade(i, len(settings))
        name = members.label(setting) or ("mean of seeds" if len(places) > 1 else "evaluation")
        label = f"{name}: {spread(seeds[-1])}"
        axes.plot(steps, seeds.mean(1), dashes, color=colour, marker=".", ms=4, label=label)
        if len(settings) == 1:
            axes.plot(steps, seeds, color=colour, alpha=min(0.35, 1.5 / len(places)), linewidth=0.7)
        low, high, meaning = band(seeds)
        label = f"{meaning} ({len(places)} seeds)" if meaning and last else ""
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0, label=label)
        for episodes in absolute:
            score = episodes[places].mean(-1)  # (S,)
            of = f"{episodes.shape[1]} episodes" + ", ± std over seeds" * (len(places) > 1)
            label = f"absolute metric ({of})" if last else ""
            at = steps[-1], score.mean(), sample_std(score) or 0
            axes.errorbar(*at, fmt="D", color=colour, mfc="white", capsize=3, zorder=5, label=label)
    if row := run.published:
        text = f"{row.source} (after {row.steps}): {row.mean:.2f} ± {row.std:.2f}"
        axes.axhline(row.mean, color=GREY, linestyle=(0, (5, 3)), linewidth=1.2, label=text)

    axes.set_title(f"{printed_name(run.system)} on {run.suite}/{run.task}", loc="left", fontsize=11)
    axes.set_xlabel("environment steps (per member)")
    axes.set_ylabel(f"evaluation {run.headline.replace('_', ' ')}")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.08)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=8.5, frameon=False
    )
    figure.savefig(path, format="png", dpi=200, bbox_inches="tight")


def shade(place: int, number: int) -> tuple[Any, str]:
    """Return the colour and line style of one of `number` settings; a single one is blue.

    Several take colours in order from a map that colour-blind readers can follow, without its
    palest end. With more than six, neighbours look alike, so the line styles alternate.
    """
    if number == 1:
        return BLUE, "-"
    colour = matplotlib.colormaps["viridis"](0.85 * place / (number - 1))
    return colour, ("-", "--", ":")[place % 3] if number > 6 else "-"


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the lower and upper edges (K,) of values (K, S), and their meaning, "" for one seed.

    Fewer than five seeds give no reliable interval, so the edges are their range.
    """
    num_seeds = values.shape[1]
    if num_seeds == 1:
        return values[:, 0], values[:, 0], ""
    if num_seeds < 5:
        return values.min(1), values.max(1), "smallest to largest seed"
    draws = np.random.default_rng(0).integers(num_seeds, size=(2000, num_seeds))
    low, high = np.percentile(values[:, draws].mean(-1), [2.5, 97.5], axis=1)
    return low, high, "95 % bootstrap interval of the mean"
