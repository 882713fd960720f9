"""Our results for the rows of `magpo.published`, collected from runs, in one CSV per row.

A CSV has the columns `seed, env_steps, name, value`. For each seed, it contains in this order:

1. the FACTS, without steps
2. every evaluation, `eval/<metric>`
3. the absolute metric, `absolute/<metric>`, at the steps of the best parameters; only for finished
   runs
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from magpo import config as configuration
from magpo import published, tables
from magpo.config.schema import RunConfig
from magpo.errors import ConfigError
from magpo.files import UNREADABLE, write_aside
from magpo.published import Row
from magpo.runs import folders

COLUMNS = ("seed", "env_steps", "name", "value")
FACTS = (
    *("command", "steps", "hours"),  # steps requested; hours that all of the run's seeds took
    *("devices", "magpo", "jax"),  # the run's
    *("reproduce_python", "reproduce_commit"),  # of the process that wrote the seed
)
# The keys that may differ between runs of the same experiment.
FREE = ("seeds", "seeds_per_batch", "platform", "logger", "results_dir", "keep", "checkpoint_share")

Key = tuple[str, str, str]  # paper, task, system: a row's result, which several tables may print


class Seed(NamedTuple):
    """The results of one seed."""

    facts: dict[str, str]
    records: list[tuple[int, str, float]]  # environment steps, name and value

    @property
    def steps(self) -> int:
        """The environment steps at the last evaluation."""
        return max((at for at, name, _ in self.records if name.startswith("eval/")), default=0)

    @property
    def finished(self) -> bool:
        """Return whether the absolute metric, the last one of a run, was measured."""
        return any(name.startswith("absolute/") for _, name, _ in self.records)

    def last(self, kind: str) -> float | None:
        """Return the last value of "eval" or "absolute"."""
        values = [value for _, name, value in self.records if name.startswith(f"{kind}/")]
        return values[-1] if values else None


Seeds = dict[int, Seed]


class Run(NamedTuple):
    """A run that belongs to a row."""

    folder: Path
    status: str
    seeds: tuple[int, ...]


def key(row: Row) -> Key:
    """Return the paper, task and system, which identify a row's result and its CSV."""
    return row.paper, row.task, row.system


def rows() -> dict[Key, Row]:
    """Return the rows by key; if several tables print a result, the first one's row counts."""
    found = dict[Key, Row]()
    for row in published.rows():
        found.setdefault(key(row), row)
    return found


def path(out: Path, row: Row) -> Path:
    """Return the path of a row's CSV."""
    return out / row.paper / row.task.replace("/", "_") / f"{row.system}.csv"


def read_all(out: Path) -> dict[Key, Seeds]:
    """Return the results of all CSVs. Raises ConfigError for one that this version cannot read."""
    known = {path(out, row): key(row) for row in rows().values()}
    found = dict[Key, Seeds]()
    for file in sorted(out.glob("*/*/*.csv")):
        if file not in known:
            raise ConfigError(f"{file}: magpo.published has no such row in this version")
        found[known[file]] = read(file)
    return found


def read(file: Path) -> Seeds:
    """Return the results in a CSV. Raises ConfigError."""
    facts, records = defaultdict[int, dict[str, str]](dict), defaultdict[int, list[Any]](list)
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError("other columns")
            for row in reader:
                seed, name = int(row["seed"]), row["name"]
                if name in FACTS:
                    facts[seed][name] = row["value"]
                elif name.startswith(("eval/", "absolute/")):
                    records[seed].append((int(row["env_steps"]), name, float(row["value"])))
                else:
                    raise ValueError(name)
        if not records or any(set(facts[seed]) != {*FACTS} for seed in records):
            raise ValueError("other facts")
    except (*UNREADABLE, csv.Error) as error:
        raise ConfigError(f"{file}: not a table of results of this version ({error})") from error
    return {seed: Seed(facts[seed], records[seed]) for seed in records}


def write(file: Path, seeds: Seeds) -> None:
    """Write the results of seeds to a CSV."""
    lines = []
    for number, seed in sorted(seeds.items()):
        named = [("", name, seed.facts[name]) for name in FACTS]
        lines += [(number, *record) for record in (*named, *seed.records)]
    cells = [dict(zip(COLUMNS, line, strict=True)) for line in lines]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, lambda aside: tables.write(aside, cells))


def merged(old: Mapping[int, Seed], new: Mapping[int, Seed]) -> Seeds:
    """Return the seeds of both; for a seed in both, `new` counts unless `old` got further.

    If both have the same values, `old` counts, so that the facts of the first collection stay.
    """
    both = dict(old)
    for number, seed in new.items():
        have = old.get(number, seed)
        same = have.records == seed.records
        if not same and (seed.finished, seed.steps) >= (have.finished, have.steps):
            both[number] = seed
        both.setdefault(number, seed)
    return both


@cache
def _config(command: tuple[str, ...]) -> RunConfig:
    return configuration.load(command[0], command[1:])


def runs(command: Sequence[str], results_dir: str) -> list[Run]:
    """Return the runs of a command, a system and its overrides, the oldest first.

    A run belongs to the command if it has its configuration. FREE keys may differ. Options of the
    system, network or task may be missing in either version, unless the command sets them.
    """
    found = list[Run]()
    parent = Path(results_dir, command[0], _config(tuple(command)).env.name)
    for folder in sorted(parent.glob("*/")):
        with suppress(*UNREADABLE):  # a run that is just beginning, or a damaged one
            values = configuration.plain_values(folder / folders.CONFIG)
            if _is_of(tuple(command), configuration.flat(values)):
                found.append(Run(folder, folders.status(folder), tuple(values["seeds"])))
    return found


def strangers(results_dir: str) -> list[Path]:
    """Return the folders of runs that belong to no row, such as other experiments or versions."""
    of_rows = {run.folder for row in rows().values() for run in runs(row.command, results_dir)}
    files = Path(results_dir).glob(f"*/*/*/*/{folders.CONFIG}")
    return sorted({file.parent for file in files} - of_rows)


def _is_of(command: tuple[str, ...], given: Mapping[str, Any]) -> bool:
    """Return whether a configuration, by dotted names, is that of a command."""
    wanted = configuration.flat(configuration.dump(_config(command)))
    chosen = [override.partition("=")[0] for override in command[1:]]
    for name in {**wanted, **given}:
        group, both = name.partition(".")[0], name in wanted and name in given
        may_be_absent = group in ("system", "network", "env") and name not in chosen
        if group in FREE or (may_be_absent and not both):
            continue
        if not both or given[name] != wanted[name]:
            return False
    return True


def from_runs(row: Row, found: list[Run], facts: Mapping[str, str]) -> Seeds:
    """Return what a row's runs have measured so far; `facts` are about this process."""
    seeds = Seeds()
    for run in found:
        seeds = merged(seeds, _measured(row, run, facts))
    return seeds


def _measured(row: Row, run: Run, facts: Mapping[str, str]) -> Seeds:
    records, hours = defaultdict[int, list[Any]](list), dict[int, str]()
    for record in _records(run.folder / "metrics.jsonl", row.metric):
        seed = record["seed"]
        records[seed].append((record["env_steps"], record["name"], record["value"]))
        hours[seed] = f"{record['wall_s'] / 3600:.3f}"
    made_with = folders.made_with(run.folder)
    words = ["python", "-m", f"magpo.systems.{row.command[0]}", *row.command[1:]]
    common = {
        "command": " ".join([*words, f"seeds={list(run.seeds)}".replace(" ", "")]),
        "steps": str(_config(row.command).trained_steps),
        **{name: made_with.get(name, "") for name in ("devices", "magpo", "jax")},
        **facts,
    }
    return {seed: Seed(common | {"hours": hours[seed]}, records[seed]) for seed in records}


def _records(file: Path, metric: str) -> Iterator[dict[str, Any]]:
    """Yield a run's evaluations, in order. Raises ConfigError."""
    names = {f"{kind}/{metric}".encode() for kind in ("eval", "absolute")}
    if not file.exists():
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not (line.endswith(b"\n") and any(name in line for name in names)):
                continue  # another metric, or a line that is still being written
            try:
                record = json.loads(line)
                if record["name"].encode() in names and record["value"] is not None:  # null: NaN
                    int(record["seed"]), int(record["env_steps"]), float(record["wall_s"])
                    yield record
            except UNREADABLE:
                raise ConfigError(f"{file}: line {number} is not a record") from None
