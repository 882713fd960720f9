"""Damaged checkpoints: the previous one is used, or a one-line error says why none can be."""

import dataclasses
import json
import random
import shutil
from functools import partial

import numpy as np
import pytest
from signing import sign

from experiment.counting import SEEDS, SYSTEM, Count, K, run
from magpo import config as configuration
from magpo import experiment
from magpo.errors import ConfigError
from magpo.runs import checkpoint, listing, resume


@pytest.fixture
def folder(config, monkeypatch):
    """Finish a run with its last two checkpoints; return its folder."""
    offer = resume.Saver.offer

    def always(self, *args):
        self.idle.wait()
        self.next = 0.0
        offer(self, *args)

    monkeypatch.setattr(resume.Saver, "offer", always)
    return run(config).folder


@pytest.fixture
def load_start(config, folder):
    """Return a function that loads the chunk and the arrays from which a resumed run starts."""
    config = dataclasses.replace(config, resume=str(folder))
    programs, shapes = experiment.build_programs(SYSTEM, config.algorithm, Count(), config)
    evaluation = programs.evaluate.eval_shape(*shapes.evaluate)
    wanted = *shapes.train_chunk, shapes.keep_best[0], evaluation
    return partial(resume.start, folder, config, *wanted)


def damage(path, rng):
    """Flip a bit in a file; cut, empty or remove it; or remove or swap folders."""
    files = [*checkpoint._files(path), "manifest.json"]
    file = path / rng.choice(files)
    kind = rng.choice(["flip", "cut", "empty", "remove", "folder", "swap"])
    data = file.read_bytes()
    if kind == "flip" and data:
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
    elif kind == "cut" and data:
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "empty" and data:
        file.write_bytes(b"")
    elif kind == "folder":
        shutil.rmtree(path / rng.choice(["state", "record"]))
    elif kind == "swap":
        (path / "state").rename(path / "other")
        (path / "record").rename(path / "state")
        (path / "other").rename(path / "record")
    else:
        file.unlink()


KINDS = ("shape", "dtype", "name", "run", "format", "chunk", "part", "arrays", "gone", "type")
KINDS = (*KINDS, "nested", "steps", "value", "double", "metric")


def falsify(path, other, rng, kind):
    """Turn a checkpoint into an intact one with wrong contents."""
    meta = json.loads((path / "meta.json").read_text())
    arrays = meta["arrays"]["state"]
    name = rng.choice(list(arrays))
    if kind == "shape":
        arrays[name][1] = [rng.randrange(9), 3]
    elif kind == "dtype":
        arrays[name][0] = "float16"
    elif kind == "name":
        arrays["params.new"] = arrays.pop(name)
    elif kind == "run":
        meta["run"] = "0" * 32
    elif kind == "format":
        meta["format"] = rng.choice([0, 1, None, "2", [2]])
    elif kind == "chunk":
        meta["chunk"] = rng.randrange(K)
    elif kind == "part":
        shutil.rmtree(path / "state")
        shutil.copytree(path / "record", path / "state")
    elif kind == "arrays":
        shutil.rmtree(path / "state")
        shutil.copytree(other / "state", path / "state")
        meta["arrays"] = json.loads((other / "meta.json").read_text())["arrays"]
    elif kind == "gone":
        del meta["arrays"][rng.choice(["state", "record"])]
    elif kind == "type":
        key = rng.choice(list(meta))
        meta[key] = rng.choice([None, [], "x", -1.5, "gone"])
        if meta[key] == "gone":
            del meta[key]
    elif kind == "nested":
        (path / "meta.json").write_text("[" * 200_000)
    elif kind == "steps":
        meta["steps_per_chunk"] += 1
    elif kind in ("value", "double"):
        record = checkpoint.load_named(path, meta, "record")
        name = rng.choice([name for name in record if name.startswith("best.")])
        record[name] = record[name] * 1e9 if name == "best.chunk" else record[name] * np.nan
        if kind == "double":
            record[name] = np.zeros(record[name].shape, np.float64)
        rewrite(path, "record", record)
    else:
        record = checkpoint.load_named(path, meta, "record")
        record["history.new"] = record.pop("history.episode_return")
        meta["arrays"]["record"] = {n: checkpoint._describe(x) for n, x in record.items()}
        rewrite(path, "record", record)
    if kind != "nested":
        (path / "meta.json").write_text(json.dumps(meta))
    sign(path)


def rewrite(path, part, arrays):
    shutil.rmtree(path / part)
    with checkpoint._checkpointer() as checkpointer:
        checkpointer.save(path / part, arrays)


def test_the_previous_checkpoint_replaces_a_damaged_one(load_start, folder, tmp_path):
    newest, before = checkpoint.checkpoints(folder / "checkpoints")
    kept, rng = shutil.copytree(newest, tmp_path / "kept"), random.Random(0)
    whole = load_start()
    assert whole.chunk == K
    for _ in range(100):
        damage(newest, rng)
        start = load_start()
        assert start.chunk == int(before.name) == K - 1
        np.testing.assert_array_equal(start.state.params["updates"], [2.0 * (K - 1)] * len(SEEDS))
        shutil.rmtree(newest, ignore_errors=True)  # or set aside
        shutil.copytree(kept, newest)
    again = load_start()
    np.testing.assert_array_equal(again.state.params["peak"], whole.state.params["peak"])


def test_intact_but_wrong_checkpoints_are_never_used(config, load_start, folder, tmp_path):
    newest, before = checkpoint.checkpoints(folder / "checkpoints")
    kept, rng = shutil.copytree(newest, tmp_path / "kept"), random.Random(0)
    fewer = run(dataclasses.replace(config, seeds=SEEDS[:2])).folder
    (other, *_) = checkpoint.checkpoints(fewer / "checkpoints")
    for kind in 7 * KINDS:
        falsify(newest, other, rng, kind)
        assert load_start().chunk == int(before.name), kind
        shutil.rmtree(newest, ignore_errors=True)  # or set aside
        shutil.copytree(kept, newest)


def test_nothing_in_a_folder_is_executed(load_start, folder, tmp_path):
    """Plant pickles and YAML that would run code if loaded unsafely."""
    owned = tmp_path / "owned"
    attack = f"!!python/object/apply:pathlib.Path.touch [{owned}]"
    (folder / "config.yaml").write_text(f"run: {attack}\n_target_: os.system\n")
    pickle = b"cos\nsystem\n(S'touch " + str(owned).encode() + b"'\ntR."
    for path in checkpoint.checkpoints(folder / "checkpoints"):
        for file in ("state/_METADATA", "record/_METADATA"):
            (path / file).write_bytes(pickle)
        sign(path)
    with pytest.raises(ConfigError):
        configuration.plain_values(folder / "config.yaml")
    with pytest.raises(ConfigError):
        load_start()
    assert [found.system for found in listing.summaries(folder)] == ["?"]
    assert not owned.exists()
