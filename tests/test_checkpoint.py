"""Checkpoints: loading returns what was saved, or refuses."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from signing import sign

from magpo.runs import checkpoint
from magpo.runs.checkpoint import CheckpointError
from magpo.types import EnvSpec

META = {
    "run": "x",
    "config": {},
    "with": {"jax": "0"},
    "env": asdict(EnvSpec("x/y", 3, 5, None, 10, "discrete", 9, False, "episode_return", None)),
    "steps_per_chunk": 24,
    "log_bytes": 0,
}


class State(NamedTuple):
    params: dict
    key: jax.Array
    step: jax.Array
    absent: None = None


@pytest.fixture(scope="module")
def state():
    keys = jax.vmap(jax.random.key)(np.arange(2))
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": (jnp.ones((2, 4), bool),)}
    return State(params, keys, jnp.int32([3, 4]))


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    record = {"score": np.float32([1.5, -np.inf])}
    checkpoint.save(root, 12, {"state": state, "record": record}, META)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """Copy a checkpoint that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copy") / "00000012"


def test_loading_returns_what_was_saved(saved, state):
    (folder,) = checkpoint.checkpoints(saved)
    meta = checkpoint.read_meta(folder)
    assert meta["run"] == "x" and meta["chunk"] == 12
    template = jax.eval_shape(lambda: state)
    loaded = checkpoint.load(folder, meta, "state", template)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert new.dtype == old.dtype
        new, old = map(checkpoint._stored, (new, old))
        np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(
        checkpoint.load_named(folder, meta, "record")["score"], [1.5, -np.inf]
    )


def test_a_relative_path_works(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint.save(Path("here"), 3, {"state": state}, META)
    loaded = checkpoint.load(folder, checkpoint.read_meta(folder), "state", state)
    np.testing.assert_array_equal(loaded.step, state.step)


def test_a_leaf_is_loaded_with_its_sharding(saved, state):
    (folder,) = checkpoint.checkpoints(saved)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )
    loaded = checkpoint.load(folder, checkpoint.read_meta(folder), "state", template)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(loaded))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_every_damaged_file_is_detected(folder, damage):
    for name in [*checkpoint._files(folder), "manifest.json"]:
        path = folder / name
        before = path.read_bytes()
        if damage == "flip":
            middle = len(before) // 2
            path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        elif damage == "truncate":
            path.write_bytes(before[:-1])
        else:
            path.unlink()
        with pytest.raises(CheckpointError, match="00000012"):
            checkpoint.read_meta(folder)
        path.write_bytes(before)
    checkpoint.read_meta(folder)


def test_a_file_added_by_another_program_is_not_damage(folder, state):
    for place in (folder, folder / "state"):
        (place / ".DS_Store").write_bytes(b"icons")
    checkpoint.load(folder, checkpoint.read_meta(folder), "state", state)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 1}, "format must be 2, not 1"), ({"chunk": 7}, "chunk 7")],
)
def test_a_checkpoint_of_another_format_or_name_is_refused(folder, change, message):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | change))
    sign(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_meta(folder)


def test_another_shape_dtype_or_structure_is_refused(saved, state):
    (folder,) = checkpoint.checkpoints(saved)
    meta = checkpoint.read_meta(folder)
    others = [
        (state._replace(step=jnp.zeros(3, jnp.int32)), "step"),
        (state._replace(step=jnp.zeros(2)), "step"),
        (state._replace(absent=jnp.zeros(2)), "absent"),
        (state._replace(params={"a": state.params["a"]}), "params.b.0"),
    ]
    for other, name in others:
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(folder, meta, "state", other)


def test_arrays_that_differ_from_meta_are_refused(folder, state):
    (folder / "record").rename(folder / "old")
    shutil.copytree(folder / "state", folder / "record")
    sign(folder)
    meta = checkpoint.read_meta(folder)
    with pytest.raises(CheckpointError, match="record: cannot be read"):
        checkpoint.load_named(folder, meta, "record")
    shutil.rmtree(folder / "state")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(folder, meta, "state", state)


def test_the_newest_checkpoints_come_first_and_survive_pruning(folder):
    root = folder.parent
    for chunk in (3, 100000000 - 1):
        shutil.copytree(folder, root / f"{chunk:08d}")
    (root / ".00000013.tmp").mkdir()
    (root / "notes").mkdir()
    names = [path.name for path in checkpoint.checkpoints(root)]
    assert names == ["99999999", "00000012", "00000003"]
    checkpoint.prune(root, keep=2)
    assert sorted(path.name for path in root.iterdir()) == ["00000012", "99999999", "notes"]
    assert checkpoint.checkpoints(root / "none") == []
