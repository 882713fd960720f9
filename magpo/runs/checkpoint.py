"""Atomic checkpoints of a run's complete state.

    checkpoints/00000012/state/         arrays written by Orbax, one folder per part
                         record/
                         meta.json      the run, and the arrays' names, shapes and dtypes
                         manifest.json  the SHA-256 of every file above

A checkpoint is written under a hidden name and renamed once it is complete on disk. A reader first
compares it with the manifest, then with the expected shapes. A checkpoint is used as a whole or
refused with one line that says why. Nothing in it is executed.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from magpo.errors import ConfigError
from magpo.files import UNREADABLE
from magpo.hardware import processes
from magpo.types import EnvSpec
from magpo.values import PositiveInt, validate

META, MANIFEST = "meta.json", "manifest.json"


class CheckpointError(ConfigError):
    """A checkpoint cannot be used; the one-line message names it."""


@dataclass(frozen=True)
class Meta:
    """The schema of meta.json."""

    format: Literal[2]  # format 1 had no hyperparameters in the state
    chunk: PositiveInt
    run: str
    config: dict[str, Any]
    made_with: Annotated[dict[str, str], Field(alias="with")]
    env: EnvSpec
    steps_per_chunk: int
    log_bytes: Annotated[int, Field(ge=0)]
    arrays: dict[str, dict[str, tuple[str, tuple[int, ...]]]]  # dtype and shape, by part and name


def save(root: Path, chunk: int, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """Write the pytrees `parts` and the JSON values `meta` as root/<chunk>.

    All processes of a run must call this function, each with its shards of the arrays. Raises
    OSError, or an error of Orbax, if it cannot write.
    """
    final = root / f"{chunk:08d}"
    aside = root / f".{final.name}.tmp"
    if processes.is_first():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        _check_room(aside, parts)
        arrays = {part: _named(tree) for part, tree in parts.items()}
        with _checkpointer() as checkpointer:
            for part, leaves in arrays.items():
                checkpointer.save((aside / part).absolute(), jax.tree.map(_stored, leaves))
        if processes.is_first():
            described = jax.tree.map(_describe, arrays)
            _write(aside / META, {"format": 2, "chunk": chunk, **meta, "arrays": described})
            _write(aside / MANIFEST, {name: _sha256(aside / name) for name in _files(aside)})
            os.replace(aside, final)
    except BaseException as error:
        if processes.is_first():
            _remove(aside)
        if os.strerror(errno.ENOSPC) in str(error):  # Orbax's own message has four lines
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    return final


def _remove(folder: Path) -> None:
    """Remove a folder to which Orbax's threads may still write."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _check_room(folder: Path, parts: Mapping[str, Any]) -> None:
    """Raise OSError if the disk is too full, because Orbax prints a traceback if a write fails.

    Several processes skip this check: they might disagree and wait for each other forever.
    """
    leaves = jax.tree.leaves(parts)
    needed = 2**18 + sum(2**10 + leaf.nbytes for leaf in leaves)  # files, and Orbax's descriptions
    if jax.process_count() == 1 and shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and unfinished ones."""
    for folder in [*checkpoints(root)[keep:], *root.glob(".*.tmp")]:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(root: Path, after: int) -> None:
    """Set aside checkpoints newer than `after`; the resumed run will overwrite that history."""
    for folder in checkpoints(root):
        if int(folder.name) > after:
            aside = folder.with_name(f"{folder.name}.unusable")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def checkpoints(root: Path) -> list[Path]:
    """Return the finished checkpoints, newest first, without checking that they are intact."""
    return sorted(root.glob("[0-9]" * 8), reverse=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's meta.json.

    Raises CheckpointError if a file has changed since it was written, or if meta.json violates its
    schema or contradicts itself. Files that other programs added do no harm.
    """
    try:
        manifest = {META: None} | json.loads((folder / MANIFEST).read_bytes())
        found = {name: _sha256(folder / name) for name in _files(folder)}
        for name, checksum in manifest.items():
            if found.get(name) != checksum:
                raise ConfigError(f"{name} is missing or damaged")
        meta: dict[str, Any] = json.loads((folder / META).read_bytes())
        env = validate(Meta, meta).env
        if meta["chunk"] != int(folder.name):
            raise ConfigError(f"is the checkpoint of chunk {meta['chunk']}")
        seen = {"agents_view": env.num_features, "action_mask": env.action_dim}
        for name, (_, shape) in meta["arrays"].get("state", {}).items():
            size = seen.get(name.rpartition(".")[2])
            if size is not None and shape[-2:] != [env.num_agents, size]:
                raise ConfigError(f"{name} is not of {env.num_agents} agents x {size}")
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    return meta


def load(folder: Path, meta: Mapping[str, Any], part: str, template: Any) -> Any:
    """Load one part of a checkpoint as a pytree like `template`, whose leaves have shape and dtype.

    Leaves whose template has a sharding are loaded as arrays with this sharding, others as NumPy
    arrays. Raises CheckpointError if names, shapes or dtypes differ.
    """
    if misfit := difference(meta, part, template):
        raise CheckpointError(f"{folder}: {misfit}")
    leaves = _named(template)
    arrays = load_named(folder, meta, part, leaves)
    restored = [
        jax.random.wrap_key_data(arrays[name]) if _is_key(leaf) else arrays[name]
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), restored)


def difference(meta: Mapping[str, Any], part: str, template: Any) -> str:
    """Return the first difference in names, shapes and dtypes between a part and `template`, or
    ""."""
    expected = {name: "{}{}".format(*_describe(leaf)) for name, leaf in _named(template).items()}
    found = {name: "{}{}".format(*said) for name, said in meta["arrays"].get(part, {}).items()}
    for name in sorted({*expected, *found}):
        ours, theirs = expected.get(name, "no"), found.get(name, "no")
        if ours != theirs:
            return f"{part} has {theirs} {name}, this run {ours}"
    return ""


def load_named(
    folder: Path, meta: Mapping[str, Any], part: str, template: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Load one part of a checkpoint as arrays by name; random keys are loaded as their numbers.

    The arrays have the shardings of `template`, or else are NumPy arrays. Raises CheckpointError.
    """
    import orbax.checkpoint as ocp

    path = (folder / part).absolute()
    described = {name: _as_stored(*said) for name, said in meta["arrays"].get(part, {}).items()}
    arguments = dict.fromkeys(described, ocp.RestoreArgs(restore_type=np.ndarray))
    for name, leaf in template.items():
        if getattr(leaf, "sharding", None) is not None:
            arguments[name] = ocp.ArrayRestoreArgs(sharding=leaf.sharding)
    try:
        with _checkpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
            if {name: _describe(leaf) for name, leaf in stored.items()} != described:
                raise TypeError("not what meta.json says")  # loading would convert it
            restored: dict[str, Any] = checkpointer.restore(path, restore_args=arguments)
    except Exception as error:  # its checksums are right, but Orbax cannot read it
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from error
    return restored


def check_best(folder: Path, score: Any, chunk: Any, params: Any) -> None:
    """Raise CheckpointError if a best policy is not finite, or newer than the checkpoint.

    All processes of a run must call this function.
    """
    leaves = jax.tree.leaves(params)
    finite = jax.jit(lambda xs: jnp.stack([jnp.isfinite(x).all() for x in xs]).all())(leaves)
    late = (np.asarray(chunk) < 0) | (np.asarray(chunk) > int(folder.name))
    if np.isnan(score).any() or late.any() or not finite:
        raise CheckpointError(f"{folder}: a parameter, score or chunk is out of range")


def _checkpointer() -> Any:
    """Make a checkpointer whose processes wait for each other without using their devices."""
    import orbax.checkpoint as ocp  # imported late, because it takes a second

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax raises the errors that it logs
    together = ocp.options.MultiprocessingOptions(active_processes=processes.everyone())
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=together)
    return ocp.Checkpointer(handler, multiprocessing_options=together)


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, in the tree's order."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any) -> Any:
    """Return an array as Orbax stores it; random keys become their numbers."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _describe(leaf: Any) -> list[Any]:
    """Return an array's [dtype, shape], as JSON reads it back."""
    return [str(leaf.dtype), list(leaf.shape)]


def _as_stored(dtype: str, shape: list[int]) -> list[Any]:
    """Return the description of an array after `_stored`, given its dtype and shape."""
    if not dtype.startswith("key<"):
        return [dtype, shape]
    return ["uint32", [*shape, *jax.random.key_data(jax.random.key(0)).shape]]


def _files(folder: Path) -> list[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
