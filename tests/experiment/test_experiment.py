"""The experiment loop, driven by a system whose parameters count its updates."""

import dataclasses
import json
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from experiment.counting import (
    HYPER,
    LENGTH,
    SEEDS,
    SYSTEM,
    Config,
    Count,
    K,
    N,
    U,
    expected_returns,
    records,
    run,
    with_plot,
)
from magpo import config as configuration
from magpo import envs, experiment
from magpo.config.schema import EnvConfig, LoggerConfig
from magpo.errors import ConfigError
from magpo.experiment import interrupts, loop, recorder
from magpo.experiment.programs import Best
from magpo.report import sinks, writer
from magpo.report.console import Console
from magpo.runs import folders


def test_evaluated_parameters_are_those_of_the_logged_step(config):
    result = run(config)
    peaks = np.asarray(result.params["peak"])
    assert len(set(peaks)) > 1
    logged = [r for r in records(result.folder) if r["name"] == "eval/episode_return"]
    assert len(logged) == len(SEEDS) * (K + 1)
    for record in logged:
        updates = record["env_steps"] / config.steps_per_update
        peak = peaks[SEEDS.index(record["seed"])]
        assert record["value"] == -LENGTH * abs(updates - peak)


def test_best_is_the_latest_highest_score_with_its_parameters(config):
    result = run(config)
    peaks = np.asarray(result.params["peak"])
    assert any(peak % U for peak in peaks)  # a peak between two evaluations: they tie
    for s, peak in enumerate(peaks):
        returns = expected_returns(peak)
        chunk = max(np.flatnonzero(returns == returns.max()))
        assert result.best.chunk[s] == chunk
        assert result.best.score[s] == returns.max()
        assert result.best.params["updates"][s] == chunk * U
        assert result.best.params["peak"][s] == peak
        absolute = result.absolute.evaluation["episode_return"][s]
        np.testing.assert_array_equal(absolute, np.full(30, returns.max()))
        assert result.absolute.env_steps[s] == chunk * U * config.steps_per_update


def test_a_nan_return_is_never_best(config):
    programs, _ = experiment.build_programs(SYSTEM, config.algorithm, Count(), config)
    old = Best(np.float32([1, 1, 1]), np.int32([4, 4, 4]), np.int32([40, 50, 60]))
    returns = np.float32([[np.nan, 9, 9], [1, 1, 1], [0, 0, 1]])
    best = programs.keep_best(old, np.int32([41, 51, 61]), returns, np.int32([5, 5, 5]))
    np.testing.assert_array_equal(best.chunk, [4, 5, 4])
    np.testing.assert_array_equal(best.params, [40, 51, 60])


def test_snapshot_outlives_the_donated_state(config):
    programs, _ = experiment.build_programs(SYSTEM, config.algorithm, Count(), config)
    inputs = experiment.member_inputs(config)
    state = programs.init(inputs.train_keys, inputs.hyper)
    params, finite = programs.snapshot(state)
    following, _ = programs.train_chunk(state)
    taken = state.params["updates"], state.params["peak"], state.hyper, state.walked
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(taken))
    np.testing.assert_array_equal(params["updates"], [0, 0, 0])
    np.testing.assert_array_equal(following.params["updates"], [U, U, U])
    assert finite.all()


def test_next_chunk_is_dispatched_before_metrics_are_read(config, monkeypatch):
    events = []
    compile_programs, record = experiment.compile_programs, recorder.Recorder.record

    def spy_compile(*args):
        programs = compile_programs(*args)

        def train_chunk(state):
            events.append("train")
            return programs.train_chunk(state)

        return programs._replace(train_chunk=train_chunk)

    def spy_record(self, index, *args):
        events.append(index)
        record(self, index, *args)

    monkeypatch.setattr(loop, "compile_programs", spy_compile)
    monkeypatch.setattr(loop.devices, "memory_needed", lambda train_chunk: 0)
    monkeypatch.setattr(recorder.Recorder, "record", spy_record)
    run(config)
    assert events == [event for index in range(K) for event in ("train", index)] + [K]


def test_a_seed_trained_alone_gives_the_same_run(config):
    together, alone = run(config), run(config, seeds=(SEEDS[1],))
    assert together.params["peak"][1] == alone.params["peak"][0]
    for a, b in zip(together.measurements, alone.measurements, strict=True):
        np.testing.assert_array_equal(
            a.evaluation["episode_return"][1], b.evaluation["episode_return"][0]
        )


def test_the_absolute_metric_causes_no_extra_trace(config, monkeypatch):
    calls, unpatched = [], SYSTEM.act

    def counted(*args):
        calls.append(1)
        return unpatched(*args)

    monkeypatch.setattr(SYSTEM, "act", counted)
    run(config, absolute_metric=False)
    without = len(calls)
    run(config)
    assert len(calls) == 2 * without


def test_every_evaluation_has_its_own_keys(config, monkeypatch):
    def random(setup, params, carry, observation, key, greedy):
        return jax.random.randint(key, (*observation.step_count.shape, N), 0, 1000), carry

    monkeypatch.setattr(SYSTEM, "act", random)
    result = run(config)
    returns = [m.evaluation["episode_return"] for m in result.measurements]
    returns += np.split(result.absolute.evaluation["episode_return"], 10, axis=1)
    rows = np.concatenate(returns)  # one for each evaluation and seed
    assert len(np.unique(rows, axis=0)) == len(rows) == (K + 1 + 10) * len(SEEDS)


def test_metrics_are_complete_and_in_order(config):
    result = run(config)
    lines = records(result.folder)
    first = lines[0]
    assert first["run"] == result.folder.name
    assert (first["system"], first["env"], first["task"]) == ("counting", "test", "count")
    logged = [line for line in lines if not line["name"].startswith("absolute/")]
    steps = [line["env_steps"] for line in logged]
    assert steps == sorted(steps)
    assert steps[-1] == config.trained_steps == U * K * 12
    for seed in SEEDS:
        mine = [line for line in logged if line["seed"] == seed]
        loss = [(r["env_steps"], r["value"]) for r in mine if r["name"] == "loss/policy"]
        assert loss == [(12 * u, u) for u in range(1, U * K + 1)]
        # every other update finishes no episode: it logs a count but no mean
        means = [r["value"] for r in mine if r["name"] == "rollout/episode_return"]
        assert means == [u for u in range(1, U * K + 1) if u % 2 == 0]
        assert sum(r["name"] == "rollout/episodes" for r in mine) == U * K
        assert sum(r["name"] == "time/steps_per_s" for r in mine) == K
    walls = [line["wall_s"] for line in lines]
    assert walls == sorted(walls)


def test_marl_eval_has_every_episode(config):
    result = run(config)
    data = json.loads((result.folder / "marl_eval.json").read_text())
    seeds = data["test"]["count"]["counting"]
    assert list(seeds) == [f"seed_{seed}" for seed in SEEDS]
    for s, seed in enumerate(seeds.values()):
        assert list(seed) == [f"step_{i}" for i in range(K + 1)] + ["absolute_metrics"]
        for i in range(K + 1):
            step = seed[f"step_{i}"]
            assert step["step_count"] == i * config.steps_per_chunk
            assert step["elapsed_time"] >= 0
            expected = expected_returns(result.params["peak"][s])[i]
            assert step["episode_return"] == [expected] * 3
            assert step["episode_length"] == [LENGTH] * 3
        assert len(seed["absolute_metrics"]["episode_return"]) == 30


def test_the_whole_config_is_saved_as_plain_yaml(config):
    result = run(config)
    saved = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert saved == configuration.dump(config)
    assert saved["run"] == {
        "system": "counting",
        "env": "test/count",
        "budget": "paper",
        "tuned": False,
        "published": False,
        "imports": {},
    }
    assert saved["env"] == {"walls": 2} and saved["seeds"] == list(SEEDS)
    assert result.folder.parent == result.folder.parents[3] / "counting" / "test" / "count"


def test_runs_started_in_the_same_second_get_separate_folders(config):
    created = [folders.create(config) for _ in range(3)]
    assert len(set(created)) == 3
    assert created == sorted(created)


def test_the_first_nan_is_reported(config):
    reading = recorder.Recorder(config, None, None)
    nan = np.nan
    metrics = {
        "loss/a": np.array([[1, nan], [nan, nan], [1, nan]]),
        "loss/b": np.array([[1, nan], [1, nan], [1, 1]]),
        "rollout/episode_return": np.array([[nan, 1], [1, 1], [1, 1]]),
        "rollout/episodes": np.array([[0, 1], [1, 1], [1, 1]]),
    }
    what = reading._diverged(3, np.ones(3, bool), metrics)
    assert "update 5 of 10, seed 11: loss/a not" in what
    assert reading.diverged.tolist() == [True, True, True]
    reading = recorder.Recorder(config, None, None)
    metrics["loss/a"][1, 0] = 1
    what = reading._diverged(3, np.ones(3, bool), metrics)
    assert "update 6 " in what and "seed 3: loss/a, loss/b " in what
    assert reading._diverged(4, np.ones(3, bool), metrics) is None  # already reported


@pytest.mark.parametrize("what", ["loss/policy", "parameters"])
def test_a_nan_stops_the_run_and_is_reported(config, what, capsys):
    peaks = np.asarray(run(config).params["peak"]).astype(int)
    chunks = -(-peaks // U)
    if what == "parameters":  # checked at the end of a chunk
        seed, update = SEEDS[chunks.argmin()], chunks.min() * U
    else:
        seed, update = SEEDS[peaks.argmin()], peaks.min()
    with pytest.raises(experiment.DivergenceError) as error:
        run(config, algorithm=Config(4, dataclasses.replace(HYPER, nan=what)))
    assert f"update {update} of {U * K}, seed {seed}: {what} " in str(error.value)
    lines = records(Path(capsys.readouterr().out.rsplit("so far are in ", 1)[1].partition("\n")[0]))
    assert max(line["env_steps"] for line in lines) == chunks.min() * config.steps_per_chunk
    if what == "loss/policy":
        nulls = [line for line in lines if line["value"] is None]
        assert nulls[0]["seed"] == seed
        assert nulls[0]["env_steps"] == update * config.steps_per_update


def test_interruption_leaves_complete_files(config, monkeypatch, capsys):
    update = Console.update

    def interrupted(self, measurement):
        update(self, measurement)
        if measurement.chunk == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Console, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(with_plot(config))
    folder = Path(capsys.readouterr().out.rsplit("so far are in ", 1)[1].partition("\n")[0])
    assert max(line["env_steps"] for line in records(folder)) == 2 * config.steps_per_chunk
    data = json.loads((folder / "marl_eval.json").read_text())
    assert list(data["test"]["count"]["counting"]["seed_3"]) == ["step_0", "step_1", "step_2"]
    png = (folder / "learning_curve.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert folders.status(folder) == "interrupted"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "learning_curve.png",
        "marl_eval.json",
        "metrics.jsonl",
        "run.json",
    ]


LOST = """
import contextlib, gc, runpy, signal, sys, time

stop = runpy.run_path(sys.argv[1])["stop"]
signal.signal(signal.SIGTERM, stop)

def collect(*args):
    gc.callbacks.remove(collect)
    signal.raise_signal(signal.SIGTERM)

gc.callbacks.append(collect)
try:
    gc.collect()
    time.sleep(60)
except KeyboardInterrupt:
    with contextlib.suppress(ValueError):
        time.sleep(0.5)  # to complete files: not interrupted again
    print("interrupted", flush=True)
"""


def test_an_interrupt_lost_in_a_garbage_collection_is_raised_again():
    command = [sys.executable, "-c", LOST, interrupts.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout == "interrupted\n" and "Exception ignored" not in done.stderr


def test_an_unresponsive_process_is_terminated(monkeypatch):
    monkeypatch.setattr(interrupts, "_deadline", 0.0)
    monkeypatch.setattr(interrupts, "received", [signal.SIGTERM])
    monkeypatch.setattr(interrupts.os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="143"):
        interrupts._end_at_deadline()


def test_a_failing_writer_is_reported_and_does_not_stop_the_run(config, monkeypatch, capsys):
    def full(self, measurement):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks.MarlEval, "write", full)
    with pytest.raises(writer.LoggingError, match=r"MarlEval: .*No space left on device"):
        run(config)
    out = capsys.readouterr().out
    assert out.count("warning: MarlEval") == 1
    (folder,) = Path(config.results_dir).glob("*/*/*/*")
    assert any(line["name"] == "absolute/episode_return" for line in records(folder))
    assert folders.status(folder) == "failed"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (experiment.DivergenceError("update 3"), 1, "error: update 3\n"),
        (writer.LoggingError("disk full"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(config, monkeypatch, capsys, error, code, line):
    def fail(*args, must_fit):
        raise error

    monkeypatch.setattr(loop, "run", fail)
    monkeypatch.setattr(loop.cli, "main", lambda system, run: run(system, config))
    monkeypatch.setattr(loop.os, "_exit", sys.exit)
    monkeypatch.setattr(loop.signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as stop:
        experiment.main(SYSTEM)
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_a_launchers_job_exits_with_the_signals_code(monkeypatch):
    monkeypatch.setattr(loop, "run", lambda *args, must_fit: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(interrupts, "received", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.raises(SystemExit) as stop:
        loop._job(None, None)
    signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143


def test_unwritable_results_are_refused_before_compiling(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loop, "compile_programs", None)
    with pytest.raises(ConfigError, match=r"/file/.*: cannot write there: Not a directory"):
        run(config, results_dir=str(tmp_path / "file"))


def test_an_unknown_environment_option_is_refused(config):
    bad = dataclasses.replace(config, env=EnvConfig("coordsum/3x10-30", {"walls": 2}))
    with pytest.raises(ConfigError, match="walls"):
        experiment.run(SYSTEM, bad)


@pytest.mark.parametrize(("system", "has"), [("mappo", False), ("happo", False), ("sable", True)])
def test_an_environment_without_the_right_global_state_is_refused(system, has):
    env = envs.make("coordsum/3x10-30", global_state=has)
    module = import_module(f"magpo.systems.{system}")
    config = configuration.load(system, ["env=coordsum/3x10-30"])
    with pytest.raises(ConfigError, match=f"{system} as configured needs .*global_state={not has}"):
        experiment.run(module, config, env)


def test_the_console_prints_one_line_per_evaluation_and_the_folder(config, capsys):
    result = run(config)
    out = capsys.readouterr().out
    assert sum(" of 120 steps" in line for line in out.splitlines()) == K + 1
    assert "memory: " in out and "more memory than" not in out
    assert "120 per member, 127 rounded down to whole chunks" in out
    assert "Rewards are sparse" not in out
    assert out.rstrip().endswith(f"results: {result.folder}")


def test_console_can_be_turned_off(config, capsys):
    run(config, logger=LoggerConfig(False, False, False, False, None, False, False, ()))
    assert capsys.readouterr().out == ""


def test_a_missing_platform_is_refused(config):
    missing = "tpu" if jax.default_backend() != "tpu" else "gpu"
    with pytest.raises(ConfigError, match=f"platform={missing}: .* allowed: auto, "):
        run(config, platform=missing)


def test_precision_and_cache_are_set(config, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    experiment.set_up_jax(dataclasses.replace(config, precision="bfloat16"))
    assert jax.config.jax_default_matmul_precision == "bfloat16"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "magpo" / "xla")
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    experiment.set_up_jax(config)
    assert jax.config.jax_compilation_cache_dir == "elsewhere"


def test_the_import_loads_no_slow_library():
    """Check that slow imports wait until they are needed."""
    program = "import sys, magpo.experiment; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"matplotlib", "jumanji", "scipy"} & set(run.stdout.split())
