"""Files: where the YAML files are, how a file is replaced, what reading a damaged one raises."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

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
    """Replace a file atomically: neither a reader nor a crash ever meets half of it."""
    aside = path.with_name(f".{path.name}.tmp")
    write(aside)
    os.replace(aside, path)
