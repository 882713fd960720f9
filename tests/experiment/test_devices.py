"""Seeds and environments over several devices: the same run as on one device."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiment.counting import run
from magpo import config as configuration
from magpo import experiment
from magpo.errors import ConfigError
from magpo.hardware import devices
from magpo.report.console import Console
from magpo.report.measurements import Run

SMALL = [
    *("env=coordsum/3x10-30", "env.time_limit=5", "tuned=false", "seeds=[0,1]", "num_envs=8"),
    *("rollout_length=16", "total_steps=512", "num_evaluations=2", "eval_episodes=4", "keep=1"),
    *("network.actor.hidden_dim=8", "network.critic.hidden_dim=8", "logger.plot=false"),
]
CHILD = """
import sys
from magpo import config, experiment
from magpo.experiment import loop
from magpo.hardware import devices
from magpo.systems import mappo
run = config.load("mappo", sys.argv[2:])
print("mesh", dict(devices.layout(run).mesh.shape))
compile_programs = loop.compile_programs
def checked(*arguments):
    compiled = compile_programs(*arguments)
    text = compiled.train_chunk.as_text()
    print("flops", compiled.train_chunk.cost_analysis()["flops"])
    print("communication", any(word in text for word in ("all-reduce", "all-gather", "permute(")))
    return compiled
loop.compile_programs = checked
print("folder", experiment.run(mappo, run).folder)
"""


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    values = {}
    for record in map(json.loads, lines):
        if not record["name"].startswith("time/") and record["value"] is not None:
            values[record["seed"], record["env_steps"], record["name"]] = record["value"]
    return values


def run_on_devices(number, *overrides):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={number}"
    command = [sys.executable, "-c", CHILD, "-", *overrides]
    env = os.environ | {"XLA_FLAGS": flags}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    from magpo.systems import mappo

    results = f"results_dir={tmp_path_factory.mktemp('alone')}"
    return metrics(experiment.run(mappo, configuration.load("mappo", [*SMALL, results])).folder)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """Run on two devices; return the results folder and the printed text."""
    results = tmp_path_factory.mktemp("two")
    return results, run_on_devices(2, *SMALL, f"results_dir={results}")


def flops(out):
    return float(re.search(r"^flops (.*)$", out, re.M)[1])


def test_a_run_spread_over_devices_gives_the_same_metrics(alone, on_two, tmp_path):
    out = run_on_devices(8, *SMALL, f"results_dir={tmp_path}")
    assert "'member': 2, 'env': 4" in out and "communication True" in out
    assert flops(out) < 0.5 * flops(on_two[1])  # per device: devices share the work of a member
    (folder,) = tmp_path.glob("*/*/*/*")
    spread = metrics(folder)
    assert spread.keys() == alone.keys()
    names = list(alone)
    np.testing.assert_allclose(
        [spread[name] for name in names], [alone[name] for name in names], rtol=1e-3, atol=1e-4
    )


def test_seeds_on_separate_devices_do_not_communicate(alone, on_two):
    results, out = on_two
    assert "'member': 2, 'env': 1" in out and "communication False" in out
    (folder,) = results.glob("*/*/*/*")
    names = list(alone)
    spread = metrics(folder)
    np.testing.assert_allclose(
        [spread[name] for name in names], [alone[name] for name in names], rtol=1e-3, atol=1e-4
    )


@pytest.fixture
def one_device(monkeypatch):
    """Lay out runs as on one GPU."""
    gpu = jax.devices()[:1]
    monkeypatch.setattr(devices, "_cpu_is_split", lambda: True)
    monkeypatch.setattr(devices.jax, "devices", lambda: gpu)


def test_seeds_batched_in_turn_or_in_threads_give_the_same_run(config, one_device, monkeypatch):
    batched = run(config)
    in_turns = run(config, seeds_per_batch=1)
    monkeypatch.undo()
    in_threads = run(config)
    for other in (in_turns, in_threads):
        for name in ("updates", "peak"):
            np.testing.assert_array_equal(batched.params[name], other.params[name])
        assert metrics(batched.folder) == metrics(other.folder)


@pytest.mark.parametrize(
    ("seeds", "cores", "together"),
    [(1, 8, 1), (2, 2, 2), (3, 2, 3), (4, 2, 2), (10, 2, 2), (10, 4, 5), (10, 64, 10)],
)
def test_on_a_cpu_enough_seeds_train_at_once_to_keep_its_cores_busy(
    config, monkeypatch, seeds, cores, together
):
    monkeypatch.setattr(devices.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(devices.jax, "devices", lambda: jax.local_devices()[:1] * 64)
    monkeypatch.setattr(devices.jax, "make_mesh", lambda shape, *_, **__: shape)
    lay = devices.layout(replace(config, seeds=tuple(range(seeds))))
    assert lay.mesh == (together, 1) and lay.members_at_once == 1
    one = devices.layout(replace(config, seeds=tuple(range(seeds)), seeds_per_batch=1))
    assert one.mesh == (1, 1)


@pytest.mark.parametrize(
    ("overrides", "runs_both"),
    [({"seeds": (7,)}, False), ({"seeds_per_batch": 1}, False), ({"seeds_per_batch": 3}, True)],
)
def test_training_one_seed_at_a_time_runs_one_branch_of_a_cond(
    config, one_device, overrides, runs_both
):
    each_member = devices.layout(replace(config, **overrides)).each_member

    def one(x):
        return jax.lax.cond(x > 0, jnp.sin, jnp.cos, x)

    traced = str(jax.make_jaxpr(each_member(one))(jnp.zeros(3)))
    assert ("select_n" in traced) == runs_both


def test_sizes_that_do_not_divide_are_refused(config, one_device, monkeypatch):
    with pytest.raises(ConfigError, match="seeds_per_batch must divide the 3 members of a device"):
        run(config, seeds_per_batch=2)
    gpus = 15 * devices.jax.devices()
    monkeypatch.setattr(devices.jax, "devices", lambda: gpus)
    with pytest.raises(ConfigError, match="num_envs must be a multiple of 5, not 4"):
        run(config)


def test_an_excessive_memory_footprint_is_reported(tmp_path, capsys):
    run = configuration.load("mappo", SMALL)
    info = Run(tmp_path, "mappo", "a", "b", run.members, "episode_return", 1, "x")
    Console(info, run).footprint(needed=3_000_000_000, available=2_000_000_000)
    printed = capsys.readouterr().out
    assert printed.startswith("memory: 3.0 GB of 2.0 GB on each device\nwarning: training needs")
    Console(info, run).footprint(needed=1, available=2)
    assert "warning" not in capsys.readouterr().out
