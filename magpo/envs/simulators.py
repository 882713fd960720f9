"""Simulators imported without the side effects of their libraries.

Importing jaxmarl prints, and resets `sys.stdout` and `sys.stderr` to the process's first streams.
In a notebook, importing jumanji switches plots to ipympl, and fails if that is not installed.
"""

import builtins
import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def notebook_hidden() -> Iterator[None]:
    """Hide a notebook from what is imported meanwhile."""
    mark = vars(builtins).pop("__IPYTHON__", None)
    try:
        yield
    finally:
        if mark is not None:
            vars(builtins)["__IPYTHON__"] = mark


def load(module: str, needs: str = "") -> Any:
    """Import a module of jaxmarl's environments, such as "mpe".

    Raises a one-line ValueError, which names magpo's extra `needs`, if a library is missing.
    """
    process: Any = sys
    streams = process.stdout, process.stderr, process.__stdout__
    process.stdout = process.__stdout__ = io.StringIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(f"jaxmarl.environments.{module}")
    except ImportError as error:
        missing = error.name or "jaxmarl"
        install = f"pip install 'magpo[{needs}]'" if needs else "pip install jaxmarl"
        suite = module.partition(".")[0]
        raise ValueError(f"{suite} needs {missing}, which is not installed: {install}") from error
    finally:
        process.stdout, process.stderr, process.__stdout__ = streams
