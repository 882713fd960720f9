"""The runs under a folder, and how to resume those that ended early.

usage: python -m magpo.runs [results] [key=value ...]

  system=<name>        only the runs of this system
  env=<suite>/<task>   only the runs on this task
  state=<state>        running | finished | stopped | interrupted | failed | unknown
  sort=time            time: the newest last | return: the highest last, task by task
  --json, --csv        print a record for each run, with its folder and all its settings

The table shows settings that runs of one system on one task do not share, and those that a run
varies.
"""

import csv as csv_format
import io
import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from json import dumps, loads
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from magpo import config as configuration
from magpo import plugins, tables
from magpo.config.members import short_key
from magpo.config.schema import WITHOUT_EFFECT
from magpo.envs import registry
from magpo.errors import ConfigError
from magpo.files import UNREADABLE
from magpo.runs.folders import CONFIG, STATUS, status
from magpo.values import UserPath, as_argument

COLUMNS = ("run", "system", "task", "state", "members", "steps", "total", "return", "settings")
WORDS = ("run", "system", "task", "state", "settings")  # aligned to the left
HIDDEN = (*WITHOUT_EFFECT, "run", "total_steps")  # settings in a column, or without effect
State = Literal["running", "finished", "stopped", "interrupted", "failed", "unknown"]
MOST = 6  # the most settings in a line of the table
RETURN = b'"name": "eval/episode_return"'


class Summary(NamedTuple):
    """A summary of a run."""

    folder: Path
    system: str
    task: str
    num_members: int
    varied: tuple[str, ...]  # dotted keys
    status: str
    steps: int  # evaluated so far, per member
    total_steps: int
    last_return: float | None  # mean over seeds, of the best setting
    resume: str | None  # the command that continues the run, if there is anything to continue
    settings: dict[str, Any]  # all of config.yaml, by dotted key
    seconds: float = 0.0  # of training, up to these steps


def summaries(root: Path) -> list[Summary]:
    """Return the runs anywhere under a folder, in the order in which they began.

    Damaged runs and those of other versions are summarised as far as they can be read.
    """
    runs = []
    for folder, below, files in os.walk(root):
        if len({STATUS, CONFIG, "metrics.jsonl"} & {*files}) > 1:
            below.clear()  # a run's own folders are many
            runs.append(Path(folder))
    return [_summary(folder) for folder in sorted(runs, key=lambda folder: folder.name)]


def _summary(folder: Path) -> Summary:
    run = Summary(folder, "?", "?", 0, (), "unknown", 0, 0, None, None, {})
    with suppress(*UNREADABLE):
        values = configuration.plain_values(folder / CONFIG)
        run = run._replace(settings=configuration.flat(values))
        about, vary = values["run"], configuration.flat(values.get("vary", {}))
        run = run._replace(system=str(about["system"]), task=str(about["env"]), varied=tuple(vary))
        run = run._replace(num_members=len(values["seeds"]) * math.prod(map(len, vary.values())))
        per_chunk = values["num_envs"] * values["rollout_length"] * values["num_evaluations"]
        run = run._replace(total_steps=int(values["total_steps"] // per_chunk * per_chunk))
        run = run._replace(status=status(folder))
        if run.status not in ("running", "finished", "unknown"):
            imports = map(str, about.get("imports", ()))
            run = run._replace(resume=resume_command(run.system, folder, imports))
        returns = _last_returns(folder / "metrics.jsonl", run.num_members)
        run = run._replace(steps=int(max((record["env_steps"] for record in returns), default=0)))
        run = run._replace(last_return=_best_mean(returns, run.varied))
        run = run._replace(seconds=float(max((r.get("wall_s", 0) for r in returns), default=0)))
    return run


def resume_command(system: str, folder: Path, imports: Iterable[str]) -> str:
    """Return the command that continues a run, with the imports that it needs."""
    own = system not in _of_package()
    program = f"{system}.py" if own else f"-m magpo.systems.{system}"
    others = [f" import={name}" for name in imports if name != program]
    return f"python {program} resume={shlex.quote(str(folder))}{''.join(others)}"


_of_package = cache(plugins.of_package)  # reads a folder


def _best_mean(returns: Iterable[dict[str, Any]], varied: Sequence[str]) -> float | None:
    """Return the best setting's mean return over seeds in some records; None without any."""
    settings = groupby(returns, key=lambda record: [record[key] for key in varied])
    values = [[r["value"] for r in of_one if r["value"] is not None] for _, of_one in settings]
    return max(map(fmean, filter(None, values)), default=None)


def _last_returns(file: Path, num_members: int) -> list[dict[str, Any]]:
    """Return the records of the newest evaluation; read metrics.jsonl from its end."""
    with file.open("rb") as stream:
        end = stream.seek(0, 2)
        for length in (2**13, 2**16, 2**20, end):
            stream.seek(max(0, end - length))
            lines = stream.read().splitlines()[bool(length < end) :]
            returns = [loads(s) for s in lines if RETURN in s and s.endswith(b"}")]
            if len(returns) >= num_members:
                break
    return returns[-num_members:]


def _settings(runs: Sequence[Summary]) -> list[str]:
    """Return the settings to show for each of some runs of one system on one task: those in which
    they differ, and those that the run varies."""
    first = runs[0].settings
    known = dict.fromkeys(key for run in runs for key in run.settings if key != "vary")
    differ = {k for k in known if any(run.settings.get(k) != first.get(k) for run in runs)}
    keys = [k for k in known if k in differ or k.startswith("vary.")]
    keys = [k for k in keys if k.partition(".")[0] not in HIDDEN]
    names = {key: key.removeprefix("vary.") for key in keys}
    leaves = Counter(map(short_key, {*names.values()}))
    names |= {k: short_key(name) for k, name in names.items() if leaves[short_key(name)] == 1}
    shown = []
    for run in runs:
        own = [k for k in keys if k in run.settings and f"vary.{k}" not in run.settings]
        words = [f"{names[key]}={as_argument(run.settings[key])}" for key in own]
        more = f" and {len(words) - MOST} more" if len(words) > MOST else ""
        shown.append(" ".join(words[:MOST]) + more or "-")
    return shown


def _record(run: Summary) -> dict[str, Any]:
    """Return all that is known of a run, in JSON's types."""
    record = {
        "run": run.folder.resolve().name,
        "folder": str(run.folder),
        "system": run.system,
        "task": run.task,
        "state": run.status,
        "varied": run.varied,
        "members": run.num_members,
        "steps": run.steps,
        "total_steps": run.total_steps,
        "return": run.last_return,
        "resume": run.resume,
        "settings": run.settings,
    }
    # YAML has dates and infinities; JSON has neither.
    plain: dict[str, Any] = loads(dumps(record, default=str), parse_constant=str)
    return plain


def _print_csv(records: Iterable[dict[str, Any]]) -> None:
    """Print records as CSV, with a column for each setting that any of them has."""
    rows = [configuration.flat(record) for record in records]
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv_format.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        lists = {key: dumps(x) for key, x in row.items() if isinstance(x, list | dict | bool)}
        writer.writerow(row | lists)
    print(text.getvalue().encode(errors="replace").decode(), end="")


def _print_table(runs: Sequence[Summary]) -> None:
    """Print a line for each run, then the commands that continue those that ended early."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for run in runs:
        groups.setdefault((run.system, run.task), []).append(run)
    shown = dict[Path, str]()
    for group in groups.values():
        shown |= dict(zip([run.folder for run in group], _settings(group), strict=True))
    rows = []
    for run in runs:
        last = "-" if run.last_return is None else f"{run.last_return:.3g}"
        words = [run.folder.resolve().name, run.system, run.task, run.status]
        numbers = [str(run.num_members), f"{run.steps:,}", f"{run.total_steps:,}", last]
        rows.append([*words, *numbers, shown[run.folder]])
    tables.show_lines(COLUMNS, rows, WORDS)
    for run in runs:
        if run.resume:
            print(tables.printable(run.resume))


def find(root: Path, state: str | None, **wanted: str | None) -> list[Summary]:
    """Return the runs anywhere under a folder with this state and these values of the fields
    `system` and `task`. Raises ConfigError for a value that no run has."""
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder")
    runs = summaries(root)
    for field, name in wanted.items():
        known = sorted({getattr(run, field) for run in runs})
        if runs and name is not None and name not in known:
            raise registry.unknown(f"{field} of these runs", name, known)
    given = {field: name for field, name in wanted.items() if name is not None}
    runs = [run for run in runs if all(getattr(run, f) == name for f, name in given.items())]
    return [run for run in runs if state in (None, run.status)]


def main(
    results: UserPath = "results",
    *,
    system: str | None = None,
    env: str | None = None,
    state: State | None = None,
    sort: Literal["time", "return"] = "time",
    json: bool = False,
    csv: bool = False,
) -> None:
    """Print the table, or the records."""
    root = Path(results)
    if json and csv:
        raise ConfigError("--json and --csv: choose one")
    runs = find(root, state, system=system, task=env)
    if sort == "return":
        runs.sort(key=lambda r: (r.task, -math.inf if r.last_return is None else r.last_return))
    if json:
        print("[" + ",\n ".join(dumps(_record(run)) for run in runs) + "]")
    elif csv:
        _print_csv(map(_record, runs))
    elif runs:
        _print_table(runs)
    else:
        print(f"no{f' {state}' if state else ''} runs under {root}")
