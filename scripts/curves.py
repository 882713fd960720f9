"""Evaluation curves: from a run's metrics.jsonl to a small CSV, from CSVs to one picture.

    python scripts/curves.py a.csv run=results/magpo/lbf/8x8-2p-2f-coop/<run-id>
    python scripts/curves.py a.csv b.csv picture=docs/a.png title="MAGPO on lbf/8x8-2p-2f-coop"

By default only eval/episode_return is collected; metrics=[eval/episode_return,eval/win_rate] adds a
metric. The picture has a line for each file and, in a run that varies hyperparameters, for each
setting: the mean over seeds, in a band from the lowest seed to the highest.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from magpo import commands, tables
from magpo.errors import ConfigError
from magpo.files import UNREADABLE

RETURN = "eval/episode_return"
SETTING = "system."  # prefix of varied hyperparameters' keys


def collect(run: Path, table: Path, metrics: Sequence[str]) -> None:
    """Write a run's metrics, one row for each member and step that has any of them."""
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
            raise ConfigError(f"{file}: line {number} is not a record") from None
    if not rows:
        raise ConfigError(f"{file}: has no values of {', '.join(metrics)}")
    tables.write(table, list(rows.values()))


def read(table: Path) -> dict[str, dict[int, list[float]]]:
    """Read all seeds' evaluation returns from a table, by setting and environment steps."""
    curves = defaultdict[str, dict[int, list[float]]](lambda: defaultdict(list))
    try:
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                setting = {key: row[key] or "null" for key in row if key.startswith(SETTING)}
                name = " ".join(f"{key.removeprefix(SETTING)}={setting[key]}" for key in setting)
                if row[RETURN]:
                    curves[name][int(row["env_steps"])].append(float(row[RETURN]))
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error):
        raise ConfigError(f"{table}: is not a table of {RETURN}") from None
    if not curves:
        raise ConfigError(f"{table}: has no values of {RETURN}")
    if any(len(set(map(len, returns.values()))) > 1 for returns in curves.values()):
        raise ConfigError(f"{table}: its seeds were not evaluated at the same steps")
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


def main(
    table: Path,
    *more: str,
    run: Path | None = None,
    metrics: tuple[str, ...] = (RETURN,),
    picture: Path | None = None,
    title: str = "",
) -> None:
    """Collect a run or draw tables."""
    if (run is None) == (picture is None) or (run and more):
        raise ConfigError("give a table and its run=<folder>, or tables and their picture=<file>")
    if run:
        collect(run, table, metrics)
    if picture:
        draw(picture, title, [table, *map(Path, more)])


if __name__ == "__main__":
    commands.run(__doc__, main)
