"""The runs under a folder, the newest last, and how to resume those that ended early.

usage: python -m magpo.runs [results]
"""

import json
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from magpo import config as configuration
from magpo import plugins, tables
from magpo.config.members import short_key
from magpo.errors import ConfigError
from magpo.files import UNREADABLE
from magpo.runs.folders import CONFIG, STATUS, status
from magpo.values import UserPath

COLUMNS = ("run", "system", "task", "status", "varied", "members", "steps", "of", "return")
RETURN = b'"name": "eval/episode_return"'


class Summary(NamedTuple):
    """A run in a line."""

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


def summaries(root: Path) -> list[Summary]:
    """Return the runs anywhere under a folder, in the order in which they began.

    Damaged runs and those of other versions are summarised as far as they can be read.
    """
    runs = []
    for folder, below, files in os.walk(root):
        if {STATUS, CONFIG} <= {*files}:
            below.clear()  # a run's own folders, which are many
            runs.append(Path(folder))
    return [_summary(folder) for folder in sorted(runs, key=lambda folder: folder.name)]


def _summary(folder: Path) -> Summary:
    run = Summary(folder, "?", "?", 0, (), "unknown", 0, 0, None, None)
    with suppress(*UNREADABLE):
        values = configuration.plain_values(folder / CONFIG)
        about, vary = values["run"], configuration.flat(values.get("vary", {}))
        run = run._replace(system=str(about["system"]), task=str(about["env"]), varied=tuple(vary))
        run = run._replace(num_members=len(values["seeds"]) * math.prod(map(len, vary.values())))
        per_chunk = values["num_envs"] * values["rollout_length"] * values["num_evaluations"]
        run = run._replace(total_steps=int(values["total_steps"] // per_chunk * per_chunk))
        run = run._replace(status=status(folder))
        if run.status not in ("running", "finished", "unknown"):
            run = run._replace(resume=_resume(run, map(str, about.get("imports", ()))))
        returns = _last_returns(folder / "metrics.jsonl", run.num_members)
        run = run._replace(steps=int(max((record["env_steps"] for record in returns), default=0)))
        run = run._replace(last_return=_best_mean(returns, run.varied))
    return run


def _resume(run: Summary, imports: Iterable[str]) -> str:
    """Return the command that continues a run, with the imports that it needs."""
    own = run.system not in plugins.of_package()
    program = f"{run.system}.py" if own else f"-m magpo.systems.{run.system}"
    others = [f" import={name}" for name in imports if name != program]
    return f"python {program} resume={shlex.quote(str(run.folder))}{''.join(others)}"


def _best_mean(returns: Iterable[dict[str, Any]], varied: Sequence[str]) -> float | None:
    """Return the best setting's mean over seeds of the returns in records; None without any."""
    settings = groupby(returns, key=lambda record: [record[key] for key in varied])
    values = [[r["value"] for r in of_one if r["value"] is not None] for _, of_one in settings]
    return max(map(fmean, filter(None, values)), default=None)


def _last_returns(file: Path, num_members: int) -> list[dict[str, Any]]:
    """Return the records of the newest evaluation, from the end of metrics.jsonl."""
    with file.open("rb") as stream:
        end = stream.seek(0, 2)
        for length in (2**13, 2**16, 2**20, end):
            stream.seek(max(0, end - length))
            lines = stream.read().splitlines()[bool(length < end) :]
            returns = [json.loads(s) for s in lines if RETURN in s and s.endswith(b"}")]
            if len(returns) >= num_members:
                break
    return returns[-num_members:]


def main(results: UserPath = "results") -> None:
    """Print the table."""
    root = Path(results)
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder")
    runs = summaries(root)
    if not runs:
        print(f"no runs under {root}")
        return
    rows = []
    for run in runs:
        varied = ", ".join(map(short_key, run.varied)) or "-"
        last = "-" if run.last_return is None else f"{run.last_return:.3g}"
        words = [run.folder.resolve().name, run.system, run.task, run.status, varied]
        rows.append([*words, str(run.num_members), f"{run.steps:,}", f"{run.total_steps:,}", last])
    tables.show(COLUMNS, rows, numbers=4)
    for run in runs:
        if run.resume:
            print(tables.printable(run.resume))
