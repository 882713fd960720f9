"""Errors that a user can cause."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """An error in the input: one line with the fault, what is allowed, and the nearest match."""


def nearest(name: str, known: Sequence[str]) -> str:
    """Return "did you mean ...? " for the nearest of the `known` names, or "".

    Among dotted names, the last part decides first: `lr` is near to `system.actor_lr`, and
    `NUM_SEEDS` to `seeds`.
    """
    leaf = name.rpartition(".")[2].lower()
    leaves = {other.rpartition(".")[2]: other for other in reversed(known)}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    near += [other for other in leaves if other.endswith(f"_{leaf}") or leaf.endswith(f"_{other}")]
    found = [leaves[other] for other in near]
    # A shared group alone does not make keys similar.
    found += difflib.get_close_matches(name, known, n=1, cutoff=0.75 if "." in name else 0.55)
    return f"did you mean {found[0]!r}? " if found else ""
