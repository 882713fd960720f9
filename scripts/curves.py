"""Evaluation curves: from a run's metrics.jsonl to a small CSV, from CSVs to one figure.

    python scripts/curves.py collect results/magpo/lbf/8x8-2p-2f-coop/<run-id> a.csv
    python scripts/curves.py draw docs/a.png "MAGPO on lbf/8x8-2p-2f-coop" a.csv b.csv

A figure's lines are the means over seeds, each named by its file, in a band from the smallest to
the largest seed.
"""

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from magpo import tables
from magpo.config import UNREADABLE

RETURN = "eval/episode_return"


class CurvesError(Exception):
    """What is asked cannot be done; the message is one line."""


def collect(run: Path, table: Path, metrics: list[str]) -> None:
    """Write a run's metrics, a row for each seed and step at which it has one of them."""
    file = run / "metrics.jsonl"
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # still being written
            continue
        try:
            record = json.loads(line)
            if record["name"] in metrics and record["value"] is not None:  # null: NaN
                place = {"seed": record["seed"], "env_steps": record["env_steps"]}
                row = rows.setdefault(tuple(place.values()), place | dict.fromkeys(metrics, ""))
                row[record["name"]] = f"{record['value']:.4g}"
        except UNREADABLE:
            raise CurvesError(f"{file}: line {number} is no record") from None
    if not rows:
        raise CurvesError(f"{file}: has no value of {', '.join(metrics)}")
    tables.write(table, list(rows.values()))


def read(table: Path) -> dict[int, list[float]]:
    """A table's evaluation returns, of all seeds, by environment steps."""
    returns = defaultdict[int, list[float]](list)
    try:
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row[RETURN]:
                    returns[int(row["env_steps"])].append(float(row[RETURN]))
    except (ValueError, TypeError, KeyError, csv.Error):
        raise CurvesError(f"{table}: is no table of {RETURN}") from None
    if not returns:
        raise CurvesError(f"{table}: has no value of {RETURN}")
    if len(set(map(len, returns.values()))) > 1:
        raise CurvesError(f"{table}: its seeds were not evaluated at the same steps")
    return returns


def draw(picture: Path, title: str, files: list[Path]) -> None:
    """One line for each table, of the evaluation returns."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for table in files:
        returns = read(table)
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


def main(argv: list[str] | None = None) -> int:
    """Read the command line; return the exit status."""
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
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "collect":
            collect(arguments.run, arguments.table, arguments.metrics)
        else:
            draw(arguments.picture, arguments.title, arguments.tables)
    except (CurvesError, OSError) as error:
        print(f"curves: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
