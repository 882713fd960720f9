"""Estimate the memory that training will take on a device from its trace, before it is compiled.

XLA reuses some of what is counted here and copies some of what is not; tests/test_footprint.py
holds the two within a factor of two.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax


def estimate(train_chunk: Any, state: Any, mesh: jax.sharding.Mesh) -> int:
    """Return the bytes that the traced chunk, the state and its saved copy take on each device."""
    along_members, along_envs = mesh.axis_sizes
    held = 2 * sum(_size(leaf) for leaf in jax.tree.leaves(state)) // along_members
    return held + peak_bytes(train_chunk.jaxpr.jaxpr) // along_envs


def available() -> int:
    """Return the bytes that a device of this process has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", of_machine // jax.local_device_count()))


def peak_bytes(jaxpr: Any) -> int:
    """Return the most bytes that are alive at once of the values a jaxpr makes.

    A value lives from the operation that makes it to the last that uses it; a loop's body, a branch
    or a called function has its own peak meanwhile.
    """
    uses = [*(_variables(equation.invars) for equation in jaxpr.eqns), _variables(jaxpr.outvars)]
    last_use = {variable: i for i, used in enumerate(uses) for variable in used}
    alive: dict[Any, int] = {}
    peak = 0
    for i, equation in enumerate(jaxpr.eqns):
        made = {variable: _size(variable.aval) for variable in equation.outvars}
        inside = max(map(peak_bytes, _bodies(equation)), default=0)
        if equation.primitive.name not in ("scan", "while"):  # what it makes is what comes out
            inside = max(0, inside - sum(made.values()))
        alive |= made
        peak = max(peak, sum(alive.values()) + inside)
        for variable in {*uses[i], *made}:
            if last_use.get(variable, i) == i:
                alive.pop(variable, None)
    return peak


def _bodies(equation: Any) -> Iterator[Any]:
    for parameter in equation.params.values():
        for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
            jaxpr = getattr(value, "jaxpr", value)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _variables(atoms: Iterable[Any]) -> list[Any]:
    """Return the variables among `atoms`, without the literals."""
    return [atom for atom in atoms if not hasattr(atom, "val")]


def _size(array: Any) -> int:
    return int(array.size * array.dtype.itemsize)
