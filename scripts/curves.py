"""Evaluation curves: from a run's metrics.jsonl to a small CSV, from CSVs to one figure.

    python scripts/curves.py collect results/magpo/lbf/8x8-2p-2f-coop/<run-id> a.csv
    python scripts/curves.py draw docs/a.png "MAGPO on lbf/8x8-2p-2f-coop" a.csv b.csv

A figure's lines are the means over seeds, each named by its file, in a band from the smallest to
the largest seed.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from magpo import tables

RETURN = "eval/episode_return"


def collect(run: Path, table: Path, metrics: list[str]) -> None:
    """Write a run's metrics, a row for each seed and step at which it has one of them."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for record in records:
        if record["name"] in metrics:
            place = {"seed": record["seed"], "env_steps": record["env_steps"]}
            row = rows.setdefault(tuple(place.values()), place | dict.fromkeys(metrics, ""))
            row[record["name"]] = f"{record['value']:.4g}"
    tables.write(table, list(rows.values()))


def draw(picture: Path, title: str, files: list[Path]) -> None:
    """One line for each table, of the evaluation returns."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for table in files:
        returns = defaultdict(list)
        with table.open() as file:
            for row in csv.DictReader(file):
                returns[int(row["env_steps"])].append(float(row[RETURN]))
        steps = sorted(returns)
        values = np.array([returns[step] for step in steps])  # (evaluations, S)
        name = table.stem.replace("_", " ")
        (line,) = axes.plot(steps, values.mean(1), linewidth=2, label=name)
        axes.fill_between(
            steps, values.min(1), values.max(1), color=line.get_color(), alpha=0.15, linewidth=0
        )
    axes.set_title(title, loc="left")
    axes.set_xlabel("environment steps (per seed)")
    axes.set_ylabel("evaluation episode return")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("collect")
    command.add_argument("run", type=Path)
    command.add_argument("table", type=Path)
    command.add_argument("--metrics", nargs="+", default=[RETURN], help=f"default: {RETURN}")
    command = commands.add_parser("draw")
    command.add_argument("picture", type=Path)
    command.add_argument("title")
    command.add_argument("tables", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        collect(arguments.run, arguments.table, arguments.metrics)
    else:
        draw(arguments.picture, arguments.title, arguments.tables)


if __name__ == "__main__":
    main()
