"""Runs on disk: a folder for each, who works in it, and what has become of it.

    python -m magpo.runs [results]

lists the runs under a results folder, newest first, with how to resume those that ended early.
"""

import errno
import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml

from magpo import config as configuration
from magpo.config import ConfigError, RunConfig
from magpo.loggers import write_aside

if sys.platform != "win32":
    import fcntl

STATUS, CONFIG, LOCK = "run.json", "config.yaml", ".lock"


def create(config: RunConfig) -> Path:
    """Make a run's own new folder; ConfigError where it cannot be written."""
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
    """The newest run of the same configuration that was not finished and that nobody works on."""
    parent = Path(config.results_dir, config.system, *config.env.name.split("/"))
    wanted = configuration.dump(config)
    for folder in sorted(parent.glob(f"*/{STATUS}"), reverse=True):
        folder = folder.parent
        if status(folder) in ("finished", "running"):
            continue
        try:
            found = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
            if not configuration.differences(found, wanted):
                return folder
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            continue  # not a run that could be resumed
    return None


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the run's config.yaml, complete and resolved."""
    text = yaml.safe_dump(configuration.dump(config), sort_keys=False)
    write_aside(folder / CONFIG, lambda aside: aside.write_text(text, encoding="utf-8"))


def identity(folder: Path) -> str:
    """The id that the run's checkpoints carry. Raises ConfigError."""
    try:
        return str(_read_status(folder)["id"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder / STATUS}: cannot be read") from error


def status(folder: Path) -> str:
    """running, finished, stopped, or what stopped it: interrupted, terminated, failed."""
    with _try_lock(folder) as free:
        if not free:
            return "running"
        try:
            last = _read_status(folder)["status"]
        except (OSError, ValueError, TypeError, KeyError):
            return "unknown"
    return "stopped" if last == "running" else str(last)


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder.

    The lock is the operating system's: it goes with the process, however that ends. Raises
    ConfigError if another process has it.
    """
    with _try_lock(folder) as free:
        if not free:
            raise ConfigError(f"{folder}: another process is at work on this run")
        yield


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Note in run.json that the run goes on, and how that ended."""
    _set_status(folder, "running")
    try:
        yield
    except BaseException as error:
        _set_status(folder, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    _set_status(folder, "finished")


@contextmanager
def _try_lock(folder: Path) -> Iterator[bool]:
    """Whether the folder's lock is ours within this context."""
    try:
        file: IO[bytes] = (folder / LOCK).open("ab")
    except OSError:
        yield True  # a folder that cannot be written to has nobody at work in it
        return
    with file:
        free = True
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # some network file systems have no locks at all
                free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        yield free


def _read_status(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / STATUS).read_bytes())
    return about


def _write_status(folder: Path, about: dict[str, Any]) -> None:
    text = json.dumps(about, indent=2) + "\n"
    write_aside(folder / STATUS, lambda aside: aside.write_text(text, encoding="utf-8"))


def _set_status(folder: Path, word: str) -> None:
    """Best effort: a full disk must not hide what happened to the run."""
    try:
        _write_status(folder, _read_status(folder) | {"status": word})
    except (OSError, ValueError, TypeError):
        return
