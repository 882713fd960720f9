"""The results that the two papers print, each with the command that repeats it."""

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

TABLE = Path(__file__).with_suffix(".csv")


class Row(NamedTuple):
    """One printed result, a row of published.csv."""

    paper: str  # magpo | gpae
    table: str  # the table's number in the paper
    task: str  # suite/task, as `env=` takes it
    system: str  # as printed; GPAE's variants are gpae_off, gpae_on, gpae_st, gpae_eta_1.1, ...
    mean: float  # of the suite's headline metric; a win rate from 0 to 1
    std: float | None  # over seeds: 10 in MAGPO's table, 5 in GPAE's; Tables 3 and 4 print none
    command: tuple[str, ...]  # a system and its overrides
    budget: str  # paper: 20M steps | gpae: 10M steps

    @property
    def steps(self) -> str:
        """The environment steps of a seed."""
        return {"paper": "20M steps", "gpae": "10M steps"}[self.budget]

    @property
    def metric(self) -> str:
        """The suite's headline metric, which the paper reports."""
        return "win_rate" if self.task.split("/")[0] in ("smax", "connector") else "episode_return"

    @property
    def source(self) -> str:
        """The paper and the table, "MAGPO, Table 1"."""
        return f"{self.paper.upper()}, Table {self.table}"


@cache
def rows() -> tuple[Row, ...]:
    """Return all rows, in the papers' order."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return tuple(
            Row(
                paper=row["paper"],
                table=row["table"],
                task=f"{row['suite']}/{row['task']}",
                system=row["system"],
                mean=float(row["mean"]),
                std=float(row["std"]) if row["std"] else None,
                command=tuple(row["command"].split()),
                budget=row["budget"],
            )
            for row in csv.DictReader(file)
        )


def has(task: str) -> bool:
    """Return whether a paper prints results for a task."""
    return any(row.task == task for row in rows())


def find(values: Mapping[str, Any]) -> Row | None:
    """Return the first row whose command agrees with a run's configuration.

    `values` are those of config.yaml, by dotted name. Values that the command leaves at their
    defaults (step sizes, the budget) may differ.
    """
    named = {"env": "run.env", "published": "run.published"}
    if values.get("network.guider.kind", "sable") != "sable":
        return None  # the papers' tables have no such guider
    for row in rows():
        wanted = [override.split("=", 1) for override in row.command[1:]]
        if row.command[0] == values.get("run.system") and all(
            values.get(named.get(key, key)) == yaml.safe_load(value) for key, value in wanted
        ):
            return row
    return None
