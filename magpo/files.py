"""Helpers for files and standard streams: the folder of YAML files, atomic replacement, the errors
of damaged files, and streams that cannot be written."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from magpo.errors import ConfigError

# The errors that reading a damaged file raises.
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(RecursionError, yaml.YAMLError),
)


def configs() -> Path:
    """Return the folder `configs`: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file atomically, so that neither a reader nor a crash ever sees half of it."""
    aside = path.with_name(f".{path.name}.tmp")
    write(aside)
    os.replace(aside, path)


def complain(line: str) -> None:
    """Print a line on standard error, if it can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


@contextmanager
def printing() -> Iterator[None]:
    """Exit without a traceback if standard output cannot be written.

    Exit silently if its reader has gone, as with `| head`.
    """
    try:
        yield
        print(end="", flush=True)
    except OSError as error:
        if error.filename is not None:  # another file
            raise
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            complain(f"error: standard output cannot be written: {error.strerror}")
        sys.exit(1)


@contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turn a ConfigError into one line on stderr and exit code 2."""
    try:
        yield
    except ConfigError as error:
        complain("error: " + " ".join(str(error).split()))
        sys.exit(2)


def flush_output() -> None:
    """Flush the standard streams; a failure to do so does not change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # None: closed before Python started
                stream.flush()
        except (OSError, ValueError):
            _discard(stream)


def _discard(stream: IO[str]) -> None:
    """Redirect a stream, its buffer included, to the null device."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())
