"""The folders of runs: creation, locks, status and newest checkpoints."""

import json
import sys
import time
import uuid
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml

from magpo import config as configuration
from magpo.config.schema import RunConfig
from magpo.errors import ConfigError
from magpo.files import UNREADABLE, complain, write_aside
from magpo.hardware import processes
from magpo.runs import checkpoint

if sys.platform != "win32":
    import fcntl


T = TypeVar("T")
STATUS, CONFIG, LOCK, CHECKPOINTS = "run.json", "config.yaml", ".lock", "checkpoints"


def create(config: RunConfig) -> Path:
    """Create a new folder for a run. Raises ConfigError if it cannot be written."""
    parent = Path(config.results_dir, config.system, config.env.name)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    with writable(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in count(1):
            folder = parent / (name if attempt == 1 else f"{name}_{attempt}")
            with suppress(FileExistsError):  # another run began in the same second
                folder.mkdir()
                break
        begin(folder, config, {"id": uuid.uuid4().hex, "name": folder.name})
    return folder


def begin(folder: Path, config: RunConfig, about: dict[str, str]) -> None:
    """Write the complete, resolved config.yaml and run.json as a run begins or continues."""
    text = yaml.safe_dump(configuration.dump(config), sort_keys=False)
    write_aside(folder / CONFIG, lambda aside: aside.write_text(text, encoding="utf-8"))
    _write_status(folder, about | {"status": "running"})


def newest(config: RunConfig, without: Container[str] = ()) -> Path | None:
    """Return the newest run of this configuration whose status is not one of `without`."""
    parent = Path(config.results_dir, config.system, config.env.name)
    wanted = configuration.dump(config)
    for folder in sorted(parent.glob("*/"), reverse=True):
        if without and status(folder) in without:
            continue
        with suppress(*UNREADABLE):  # a run that is just beginning, or a damaged one
            if not configuration.differences(configuration.plain_values(folder / CONFIG), wanted):
                return folder
    return None


def newest_unfinished(config: RunConfig) -> Path | None:
    """Return the newest unfinished run of this configuration that no process works on."""
    return newest(config, without=("finished", "running", "unknown"))


def about(folder: Path) -> dict[str, str]:
    """Return run.json: the run's id, its folder's first name, its status. Raises ConfigError."""
    try:
        found: dict[str, str] = json.loads((folder / STATUS).read_bytes())
        return {"id": "", "name": folder.resolve().name, "status": "unknown"} | found
    except UNREADABLE as error:
        raise ConfigError(f"{folder / STATUS}: cannot be read") from error


def newest_checkpoint(folder: Path, load: Callable[[Path, dict[str, Any]], T]) -> T | None:
    """Return the result of `load` for the run's newest usable checkpoint and its meta.json.

    Returns None if the run has no checkpoint. `load` may raise CheckpointError; newer checkpoints
    that cannot be used are named on stderr. Raises ConfigError if no checkpoint can be used. All
    processes of a run must call this function.
    """
    refused, root = list[str](), folder / CHECKPOINTS
    run, *found = processes.agreed(
        lambda: [about(folder)["id"], *map(str, checkpoint.checkpoints(root))]
    )
    for path in map(Path, found):
        try:
            meta = processes.agreed(partial(checkpoint.read_meta, path))
        except ConfigError as error:
            refused.append(str(error))
            continue
        try:
            if meta["run"] != run:
                raise checkpoint.CheckpointError(f"{path}: belongs to another run")
            loaded = load(path, meta)
        except checkpoint.CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused if processes.is_first() else ():
            complain(f"warning: {reason}: using the previous one")
        return loaded
    if refused:
        raise ConfigError(f"{folder}: no checkpoint can be used: {refused[0]}")
    return None


def made_with(folder: Path) -> dict[str, str]:
    """Return the versions and devices that the run's newest readable checkpoint names."""
    for found in checkpoint.checkpoints(folder / CHECKPOINTS):
        with suppress(*UNREADABLE):
            return dict(json.loads((found / checkpoint.META).read_bytes())["with"])
    return {}


def status(folder: Path) -> str:
    """Return running, finished, stopped, or why it ended (interrupted, failed).

    If run.json cannot be read, returns unknown.
    """
    with _try_lock(folder, shared=True) as free:
        if not free:
            return "running"
        try:
            last = about(folder)["status"]
        except ConfigError:
            return "unknown"
    return "stopped" if last == "running" else last


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder.

    The operating system releases the lock when the process ends, however it ends. Raises
    ConfigError if another process has the lock.
    """
    with _try_lock(folder, attempts=20) as free:
        if not free:
            raise ConfigError(f"{folder}: another process is at work on this run")
        yield


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Raise ConfigError if something in a run's folder cannot be written."""
    try:
        yield
    except OSError as error:
        where = error.filename2 or error.filename or folder
        raise ConfigError(f"{where}: cannot write there: {error.strerror}") from error


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Record in run.json how the run ended."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        _set_status(folder, "interrupted" if stopped else "failed")
        raise
    _set_status(folder, "finished")


@contextmanager
def _try_lock(folder: Path, attempts: int = 1, shared: bool = False) -> Iterator[bool]:
    """Yield whether this process has the folder's lock; `status` holds it only for a moment.

    Several processes can have a `shared` lock, so that readers do not block each other.
    """
    try:
        file: IO[bytes] = (folder / LOCK).open("rb" if shared else "ab")
    except OSError:
        yield True  # without a lock file that can be opened, nobody is at work
        return
    with file:
        free = True
        for _ in range(attempts if sys.platform != "win32" else 0):
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                free = True
            except OSError as error:  # some network file systems have no locks at all
                free = not isinstance(error, BlockingIOError)
            if free:
                break
            time.sleep(0.05)
        yield free


def note(folder: Path, fact: str, value: str) -> None:
    """Record a fact about a run in run.json."""
    with writable(folder):
        _write_status(folder, about(folder) | {fact: value})


def _write_status(folder: Path, facts: dict[str, str]) -> None:
    text = json.dumps(facts, indent=2) + "\n"
    write_aside(folder / STATUS, lambda aside: aside.write_text(text, encoding="utf-8"))


def _set_status(folder: Path, word: str) -> None:
    """Write the status if possible; a full disk must not hide how the run ended."""
    with suppress(ConfigError, OSError):
        _write_status(folder, about(folder) | {"status": word})
