"""Runs on disk: their folders, the locks on them, and their status.

    python -m magpo.runs [results]

lists the runs under a folder, the newest last, with the command that resumes one that ended early.
"""

import argparse
import errno
import json
import math
import shlex
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from magpo import checkpoint
from magpo import config as configuration
from magpo.checkpoint import CheckpointError
from magpo.config import UNREADABLE, RunConfig
from magpo.errors import ConfigError
from magpo.loggers import write_aside
from magpo.members import short_key

if sys.platform != "win32":
    import fcntl

STATUS, CONFIG, LOCK, CHECKPOINTS = "run.json", "config.yaml", ".lock", "checkpoints"


def create(config: RunConfig) -> Path:
    """Create a new folder for a run. Raises ConfigError if it cannot be written."""
    parent = Path(config.results_dir, config.system, *config.env.name.split("/"))
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in count(1):
            folder = parent / (name if attempt == 1 else f"{name}_{attempt}")
            try:
                folder.mkdir()
                break
            except FileExistsError:  # another run began in this second
                continue
        write_config(folder, config)
        about = {"id": uuid.uuid4().hex, "began": datetime.now().isoformat(timespec="seconds")}
        _write_status(folder, about | {"status": "running"})
    except OSError as error:
        raise ConfigError(
            f"results_dir={config.results_dir}: cannot write there: {error.strerror}"
        ) from error
    return folder


def newest_unfinished(config: RunConfig) -> Path | None:
    """Return the newest unfinished run of this configuration on which no process works."""
    parent = Path(config.results_dir, config.system, *config.env.name.split("/"))
    wanted = configuration.dump(config)
    for folder in sorted(parent.glob(f"*/{STATUS}"), reverse=True):
        folder = folder.parent
        if status(folder) in ("finished", "running", "unknown"):
            continue
        with suppress(ConfigError):
            if not configuration.differences(configuration.plain_values(folder / CONFIG), wanted):
                return folder
    return None


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the run's config.yaml, complete and resolved."""
    text = yaml.safe_dump(configuration.dump(config), sort_keys=False)
    write_aside(folder / CONFIG, lambda aside: aside.write_text(text, encoding="utf-8"))


def identity(folder: Path) -> str:
    """Return the id that the run's checkpoints carry. Raises ConfigError."""
    try:
        return str(_read_status(folder)["id"])
    except UNREADABLE as error:
        raise ConfigError(f"{folder / STATUS}: cannot be read") from error


def mend(folder: Path, config: RunConfig, run_id: str) -> bool:
    """Restore config.yaml and run.json if the folder was removed; return whether it was."""
    if (folder / STATUS).exists():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    _write_status(folder, {"id": run_id, "status": "running"})
    return True


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the run's newest usable checkpoint and its meta.json; None if the run has none at all.

    Newer ones that cannot be used are named on stderr. Raises ConfigError if none can be used.
    """
    refused: list[str] = []
    for path in checkpoint.checkpoints(folder / CHECKPOINTS):
        try:
            meta = checkpoint.read_meta(path)
            if meta.get("run") != identity(folder):
                raise CheckpointError(f"{path}: belongs to another run")
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            print(f"warning: {reason}: using the one before", file=sys.stderr)
        return path, meta
    if refused:
        raise ConfigError(f"{folder}: no checkpoint can be used: {refused[0]}")
    return None


def status(folder: Path) -> str:
    """Return running, finished, stopped, or the reason: interrupted, failed."""
    with _try_lock(folder) as free:
        if not free:
            return "running"
        last = last_status(folder)
    return "stopped" if last == "running" else last


def last_status(folder: Path) -> str:
    """Return the status in run.json, whoever works there; "unknown" if it cannot be read."""
    try:
        return str(_read_status(folder)["status"])
    except UNREADABLE:
        return "unknown"


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder.

    The lock is the operating system's: it goes with the process, however that ends. Raises
    ConfigError if another process has it.
    """
    with _try_lock(folder, attempts=20) as free:
        if not free:
            raise ConfigError(f"{folder}: another process is at work on this run")
        yield


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Record in run.json that the run continues, and how it ended."""
    _set_status(folder, "running")
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        _set_status(folder, "interrupted" if stopped else "failed")
        raise
    _set_status(folder, "finished")


@contextmanager
def _try_lock(folder: Path, attempts: int = 1) -> Iterator[bool]:
    """Yield whether this process has the folder's lock; `status` holds it only for a moment."""
    try:
        file: IO[bytes] = (folder / LOCK).open("ab")
    except OSError:
        yield True  # a folder that cannot be written to has nobody at work in it
        return
    with file:
        free = True
        for _ in range(attempts if sys.platform != "win32" else 0):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except OSError as error:  # some network file systems have no locks at all
                free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
            if free:
                break
            time.sleep(0.05)
        yield free


def _read_status(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / STATUS).read_bytes())
    return about


def _write_status(folder: Path, about: dict[str, Any]) -> None:
    text = json.dumps(about, indent=2) + "\n"
    write_aside(folder / STATUS, lambda aside: aside.write_text(text, encoding="utf-8"))


def _set_status(folder: Path, word: str) -> None:
    """Write the status if possible: a full disk must not hide what happened to the run."""
    try:
        _write_status(folder, _read_status(folder) | {"status": word})
    except (OSError, ValueError, TypeError):
        return


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

    @property
    def resume(self) -> str | None:
        """The command that continues the run; None if there is nothing to continue."""
        if self.status in ("running", "finished", "unknown"):
            return None
        packaged = self.system in configuration.systems()
        program = f"-m magpo.systems.{self.system}" if packaged else f"{self.system}.py"
        return f"python {program} resume={shlex.quote(str(self.folder))}"


def summaries(root: Path) -> list[Summary]:
    """Return the runs anywhere under a folder, in the order in which they began.

    Damaged runs and those of other versions are summarised as far as they can be read.
    """
    files = sorted(root.rglob(STATUS), key=lambda file: file.parent.name)
    return [_summary(file.parent) for file in files if (file.parent / CONFIG).exists()]


def _summary(folder: Path) -> Summary:
    run = Summary(folder, "?", "?", 0, (), "unknown", 0, 0, None)
    with suppress(*UNREADABLE):
        values = configuration.plain_values(folder / CONFIG)
        system, task = str(values["run"]["system"]), str(values["run"]["env"])
        vary = configuration.flat(values.get("vary", {}))
        num_members = len(values["seeds"]) * math.prod(map(len, vary.values()))
        run = run._replace(system=system, task=task, num_members=num_members, varied=tuple(vary))
        per_chunk = values["num_envs"] * values["rollout_length"] * values["num_evaluations"]
        run = run._replace(total_steps=int(values["total_steps"] // per_chunk * per_chunk))
        run = run._replace(status=status(folder))
        returns = _last_returns(folder / "metrics.jsonl", run.num_members)
        run = run._replace(steps=int(max((record["env_steps"] for record in returns), default=0)))
        run = run._replace(last_return=_best_mean(returns, run.varied))
    return run


def _best_mean(returns: Sequence[dict[str, Any]], varied: Sequence[str]) -> float | None:
    """Return the best setting's mean over seeds of the returns in records; None without any."""
    of_setting = defaultdict[tuple[Any, ...], list[float]](list)
    for record in returns:
        if record["value"] is not None:
            of_setting[tuple(record[key] for key in varied)].append(record["value"])
    return max((sum(values) / len(values) for values in of_setting.values()), default=None)


def _last_returns(file: Path, num_members: int) -> list[dict[str, Any]]:
    """Return the records of the newest evaluation, from the end of metrics.jsonl."""
    with file.open("rb") as stream:
        end = stream.seek(0, 2)
        for length in (2**16, 2**20, end):
            stream.seek(max(0, end - length))
            lines = stream.read().splitlines()[bool(length < end) :]
            records = [json.loads(line) for line in lines if line.endswith(b"}")]
            returns = [record for record in records if record["name"] == "eval/episode_return"]
            if len(returns) >= num_members:
                break
    return returns[-num_members:]


def main() -> None:
    """Run `python -m magpo.runs [results]`."""
    parser = argparse.ArgumentParser(
        prog="python -m magpo.runs",
        description="List runs, the newest last, and how to resume those that ended early.",
    )
    parser.add_argument("results", nargs="?", default="results", type=Path, help="a folder of runs")
    root = parser.parse_args().results
    if not root.is_dir():
        parser.error(f"{root}: no such folder")
    runs = summaries(root)
    if not runs:
        print(f"no runs under {root}")
        return
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("run", "system", "task", "status", "varied"):
        table.add_column(name)
    for name in ("members", "steps", "of", "return"):
        table.add_column(name, justify="right")
    for run in runs:
        last = "-" if run.last_return is None else f"{run.last_return:.3g}"
        numbers = [str(run.num_members), f"{run.steps:,}", f"{run.total_steps:,}", last]
        varied = ", ".join(map(short_key, run.varied)) or "-"
        words = map(_shown, (run.folder.name, run.system, run.task, run.status, varied))
        table.add_row(*words, *numbers)
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table)
    for run in runs:
        if run.resume:
            console.print(_shown(run.resume), soft_wrap=True)


def _shown(text: str) -> Text:
    """Return text without markup or control characters."""
    return Text("".join(c if c.isprintable() else "?" for c in text))


if __name__ == "__main__":
    main()
