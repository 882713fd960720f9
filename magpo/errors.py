"""Errors that a user can cause."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """An error in the input: one line with the fault, what is allowed, and the nearest match."""


def nearest(name: str, known: Sequence[str]) -> str:
    """Return "did you mean ...? " for the nearest of the `known` names, or "".

    Among dotted names, one with the same last part is the nearest.
    """
    leaf = name.rpartition(".")[2]
    found = [other for other in known if other.rpartition(".")[2] == leaf]
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}? " if found else ""
