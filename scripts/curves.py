"""Evaluation curves: from a run's metrics.jsonl to a small CSV, from CSVs to one picture.

    python scripts/curves.py collect results/magpo/lbf/8x8-2p-2f-coop/<run-id> a.csv
    python scripts/curves.py draw docs/a.png "MAGPO on lbf/8x8-2p-2f-coop" a.csv b.csv

The picture's lines are means over seeds, each named by its file and, in a run that varies
hyperparameters, by its setting, in a band from the smallest to the largest seed.
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
from magpo.files import UNREADABLE

RETURN = "eval/episode_return"
SETTING = "system."  # how the keys of varied hyperparameters begin


class CurvesError(Exception):
    """The request cannot be met; the message is one line."""


def collect(run: Path, table: Path, metrics: list[str]) -> None:
    """Write a run's metrics, a row for each member and step at which it has one of them."""
    file = run / "metrics.jsonl"
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # still being written
            continue
        try:
            record = json.loads(line)
            if record["name"] in metrics and record["value"] is not None:  # null: NaN
                place = {key: record[key] for key in record if key.startswith(SETTING)}
                place |= {"seed": record["seed"], "env_steps": record["env_steps"]}
                row = rows.setdefault(tuple(place.values()), place | dict.fromkeys(metrics, ""))
                row[record["name"]] = f"{record['value']:.4g}"
        except UNREADABLE:
            raise CurvesError(f"{file}: line {number} is no record") from None
    if not rows:
        raise CurvesError(f"{file}: has no value of {', '.join(metrics)}")
    tables.write(table, list(rows.values()))


def read(table: Path) -> dict[str, dict[int, list[float]]]:
    """Read a table's evaluation returns, of all seeds, by setting and environment steps."""
    curves = defaultdict[str, dict[int, list[float]]](lambda: defaultdict(list))
    try:
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                setting = {key: row[key] or "null" for key in row if key.startswith(SETTING)}
                name = " ".join(f"{key.removeprefix(SETTING)}={setting[key]}" for key in setting)
                if row[RETURN]:
                    curves[name][int(row["env_steps"])].append(float(row[RETURN]))
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error):
        raise CurvesError(f"{table}: is no table of {RETURN}") from None
    if not curves:
        raise CurvesError(f"{table}: has no value of {RETURN}")
    if any(len(set(map(len, returns.values()))) > 1 for returns in curves.values()):
        raise CurvesError(f"{table}: its seeds were not evaluated at the same steps")
    return curves


def draw(picture: Path, title: str, files: list[Path]) -> None:
    """Draw the evaluation returns, one line for each table and setting."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    curves = [(table, *found) for table in files for found in read(table).items()]
    for table, setting, returns in curves:
        steps = sorted(returns)
        values = np.array([returns[step] for step in steps])  # (evaluations, S)
        name = f"{table.stem.replace('_', ' ')} {setting}".strip()
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
