"""Runs that vary hyperparameters: members train side by side, each as if it were alone."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import yaml
from signing import sign
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import magpo
from experiment import counting
from experiment.counting import (
    HYPER,
    SEEDS,
    SYSTEM,
    Config,
    Count,
    K,
    U,
    expected_returns,
    records,
    run,
    with_plot,
)
from experiment.test_resume import arrays, assert_same_logs, save_every_chunk, stop_after
from magpo import commands, evaluate, experiment, export, render
from magpo import config as configuration
from magpo.config import members
from magpo.errors import ConfigError
from magpo.plot import read
from magpo.report import measurements, trackers
from magpo.runs import checkpoint, listing, policy

VARY = {"system.shift": (0.0, 3.0), "system.bound": (None, 4.0, 1.5)}
SETTINGS = [
    {"system.shift": shift, "system.bound": bound}
    for shift in VARY["system.shift"]
    for bound in VARY["system.bound"]
]


def varied(config):
    return dataclasses.replace(config, vary=VARY, seeds=SEEDS[:2])


@pytest.fixture
def vary(config):
    return varied(config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a finished run, which tests only read."""
    return run(varied(counting.settings(tmp_path_factory.mktemp("whole"))))


def run_alone(config, setting, **changes):
    """Run one setting without `vary`."""
    values = {key.removeprefix("system."): value for key, value in setting.items()}
    algorithm = Config(4, dataclasses.replace(HYPER, **values))
    return run(config, vary={}, algorithm=algorithm, **changes)


def test_members_are_ordered_by_setting_then_seed(vary):
    assert list(vary.settings) == SETTINGS
    expected = [(seed, setting) for setting in SETTINGS for seed in SEEDS[:2]]
    assert list(vary.members) == expected
    hyper = vary.member_hyper()
    np.testing.assert_array_equal(hyper.shift, np.float32([0] * 6 + [3] * 6))
    np.testing.assert_array_equal(hyper.bound, np.float32([np.inf, np.inf, 4, 4, 1.5, 1.5] * 2))
    assert hyper.shift.dtype == np.float32 and hyper.repeats == 1
    assert vary.algorithm_of(SETTINGS[4]).hyper == dataclasses.replace(HYPER, shift=3.0, bound=4.0)


def test_without_vary_there_is_one_setting(config):
    assert config.settings == ({},)
    assert config.members == tuple((seed, {}) for seed in SEEDS)
    np.testing.assert_array_equal(config.member_hyper().shift, np.zeros(3))


def test_a_member_equals_a_run_of_its_setting_alone(vary, whole):
    together = whole
    for i, setting in enumerate(SETTINGS):
        places = slice(2 * i, 2 * i + 2)
        single = run_alone(vary, setting)
        for ours, theirs in zip(together.measurements, single.measurements, strict=True):
            for name, values in theirs.evaluation.items():
                np.testing.assert_array_equal(ours.evaluation[name][places], values)
        of_member = jax.tree.map(lambda x: x[places], (together.best, together.params))  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, of_member, (single.best, single.params))
        absolute = together.absolute.evaluation["episode_return"][places]
        np.testing.assert_array_equal(absolute, single.absolute.evaluation["episode_return"])
    finals = together.measurements[-1].evaluation["episode_return"].mean(-1)
    assert len(set(finals)) > 2  # the settings make a difference


def test_members_in_batches_give_the_same_run(vary, whole):
    together, apart = whole, run(vary, seeds_per_batch=3)
    jax.tree.map(np.testing.assert_array_equal, together.params, apart.params)
    assert_same_logs(together.folder, apart.folder)
    with pytest.raises(ConfigError, match="must divide the 12 members, not 5"):
        run(vary, seeds_per_batch=5)


ON_DEVICES = """
import sys
from experiment import counting
from magpo import config, envs, experiment
from magpo.hardware import devices
envs.register("test/count", counting.Count, walls=2)
run = config.load(counting, sys.argv[1:])
print(dict(devices.layout(run).mesh.shape))
experiment.run(counting, run)
"""


def test_members_spread_over_devices_give_the_same_run(tmp_path):
    overrides = ["env=test/count", "vary.system.shift=[0,3]", "seeds=[3,11]", "num_envs=4"]
    overrides += ["total_steps=120", f"num_evaluations={K}", "eval_episodes=3"]
    here = configuration.load(SYSTEM, [*overrides, f"results_dir={tmp_path / 'here'}"])
    one = experiment.run(SYSTEM, here).folder
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", ON_DEVICES, *overrides, f"results_dir={tmp_path / 'there'}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "{'member': 4, 'env': 2}" in done.stdout
    (spread,) = (tmp_path / "there").glob("*/*/*/*")
    assert_same_logs(spread, one)


def programs_of(config):
    setup = experiment.make_setup(SYSTEM, Count(), config)
    programs, arguments = experiment.build_programs(SYSTEM, setup, Count(), config)
    lowered = map(lambda program, given: program.lower(*given).as_text(), programs, arguments)
    return dict(zip(programs._fields, lowered, strict=True))


def test_programs_contain_no_hyperparameter_values(vary, config):
    other = {"system.shift": (1.0, 2.0), "system.bound": (7.0, 8.0, None)}
    assert programs_of(vary) == programs_of(dataclasses.replace(vary, vary=other))
    changed = dataclasses.replace(config, algorithm=Config(4, hyper_of(shift=5.0, bound=2.0)))
    assert programs_of(config) == programs_of(changed)
    static = dataclasses.replace(config, algorithm=Config(4, hyper_of(nan="loss/policy")))
    assert programs_of(config)["train_chunk"] != programs_of(static)["train_chunk"]


def hyper_of(**values):
    return dataclasses.replace(HYPER, **values)


def test_make_sees_every_setting(vary):
    with pytest.raises(ConfigError, match=r"system\.shift must not be 13 on test/count"):
        run(vary, vary={"system.shift": (0.0, 13.0)})


def test_records_carry_the_varied_values(vary, config, whole):
    result = whole
    lines = records(result.folder)
    found = {(r["seed"], r["system.shift"], r["system.bound"]) for r in lines}
    assert found == {(seed, *setting.values()) for seed, setting in vary.members}
    peaks = result.params["peak"]
    for place, (seed, setting) in enumerate(vary.members):
        if setting != {"system.shift": 3.0, "system.bound": None}:
            continue
        mine = [r for r in lines if r["seed"] == seed and setting.items() <= r.items()]
        returns = [r["value"] for r in mine if r["name"] == "eval/episode_return"]
        np.testing.assert_array_equal(returns[1:], expected_returns(peaks[place] + 3)[1:])
    plain = records(run(config).folder)
    assert not any("system." in key for record in plain for key in record)


def test_marl_eval_has_an_algorithm_for_each_setting(whole):
    data = json.loads((whole.folder / "marl_eval.json").read_text())["test"]["count"]
    assert list(data) == [
        f"counting shift={shift} bound={bound}"
        for shift in ("0", "3")
        for bound in ("null", "4", "1.5")
    ]
    for seeds in data.values():
        assert list(seeds) == [f"seed_{seed}" for seed in SEEDS[:2]]
        assert list(seeds["seed_3"]) == [f"step_{i}" for i in range(K + 1)] + ["absolute_metrics"]


def test_tensorboard_has_a_folder_for_each_member(vary):
    folder = run(vary, logger=dataclasses.replace(vary.logger, tensorboard=True)).folder
    names = {path.name for path in (folder / "tensorboard").iterdir()}
    assert len(names) == 12 and "shift=3,bound=1.5,seed_11" in names
    events = EventAccumulator(str(folder / "tensorboard" / "shift=3,bound=1.5,seed_11"))
    events.Reload()
    lines = [r for r in records(folder) if (r["seed"], r["system.shift"]) == (11, 3)]
    expected = [
        r["value"] for r in lines if r["name"] == "eval/episode_return" and r["system.bound"] == 1.5
    ]
    assert [event.value for event in events.Scalars("eval/episode_return")] == expected


def test_neptune_gets_each_members_values(vary, monkeypatch, tmp_path):
    written = []

    class Recorded(dict):
        def __getitem__(self, key):
            return self.get(key) or mock.MagicMock()

        def stop(self):
            written.append((self.name, self["config"]))

    def init_run(name, **_):
        recorded = Recorded()
        recorded.name = name
        return recorded

    neptune = pytest.importorskip("neptune")
    monkeypatch.setattr(neptune, "init_run", init_run)
    monkeypatch.setattr(neptune.utils, "stringify_unsupported", lambda config: config)
    setting = {"system.shift": (0.0, 3.0)}
    info = measurements.Run(Path("x"), "counting", "a", "b", vary.members, "episode_return", 1, "x")
    varied = dataclasses.replace(vary, vary=setting)
    configs = [configuration.dump_setting(varied, m.setting) for m in varied.members]
    run = info._replace(members=varied.members, folder=tmp_path)
    sink = trackers.Neptune(run, "id", vary.logger, configs)
    sink.write(measurements.Measurement(0, (0,) * 4, 0.0, {}, {}, {}))
    sink.close()
    assert [name for name, _ in written] == [
        "counting a/b seed 3 shift=0",
        "counting a/b seed 11 shift=0",
        "counting a/b seed 3 shift=3",
        "counting a/b seed 11 shift=3",
    ]
    values = [(config["seed"], config["system"]["shift"]) for _, config in written]
    assert values == [(3, 0.0), (11, 0.0), (3, 3.0), (11, 3.0)]
    assert all("vary" not in config or not config["vary"] for _, config in written)


def test_a_divergence_is_reported_and_ends_only_its_setting(vary, capsys):
    algorithm = Config(4, hyper_of(nan="loss/policy"))
    shifts = {"system.shift": (2.0, 20.0)}
    result = run(vary, algorithm=algorithm, vary=shifts, seeds=SEEDS[:1])
    peak = int(result.params["peak"][0])
    out = " ".join(capsys.readouterr().out.split())
    assert ", seed 3 shift=2: loss/policy not finite; the other settings continue" in out
    returns = np.array([m.evaluation["episode_return"].mean(-1) for m in result.measurements])
    lost = np.arange(K + 1) >= -(-(peak + 2) // U)
    np.testing.assert_array_equal(np.isnan(returns), np.stack([lost, lost & False], 1))
    np.testing.assert_allclose(returns[1:, 1], expected_returns(peak + 20)[1:])
    (_, first), (setting, second) = result.scores
    assert np.isnan(first) and setting == {"system.shift": 20.0}
    assert result.objective == second == result.absolute.evaluation["episode_return"][1].mean()
    with pytest.raises(experiment.DivergenceError, match="shift=2: loss/policy not finite"):
        run(vary, algorithm=algorithm, vary={"system.shift": (2.0, 3.0)}, seeds=SEEDS[:1])


def test_a_diverged_member_stays_diverged_in_a_resumed_run(vary):
    algorithm = Config(4, hyper_of(nan="parameters"))
    shifts = {"system.shift": (0.0, 40.0)}
    whole = run(vary, algorithm=algorithm, vary=shifts, seeds=SEEDS[:1])
    last = sorted((whole.folder / "checkpoints").glob("0*"))[-1]
    shutil.rmtree(last)  # as if the run had stopped one chunk earlier
    again = run(vary, algorithm=algorithm, vary=shifts, seeds=SEEDS[:1], resume=str(whole.folder))
    assert len(again.measurements) == K + 1
    np.testing.assert_array_equal(again.best.chunk, whole.best.chunk)
    np.testing.assert_array_equal(
        again.absolute.evaluation["episode_return"], whole.absolute.evaluation["episode_return"]
    )
    assert np.isnan(again.scores[0][1]) and np.isfinite(again.scores[1][1])


def test_vary_in_step_pairs_the_values(vary):
    values = {"system.shift": (1.0, 1.0, 2.0), "system.bound": (None, 3.0, 3.0)}
    result = run(vary, vary=values, vary_in_step=True, seeds=SEEDS[:2])
    assert [m.seed for m in result.members] == [*SEEDS[:2]] * 3
    pairs = [tuple(setting.values()) for setting, _ in result.scores]
    assert pairs == [(1.0, None), (1.0, 3.0), (2.0, 3.0)]
    np.testing.assert_array_equal(result.params["shift"], [1, 1, 1, 1, 2, 2])
    assert (result.params["bound"] == 3).tolist() == [False] * 2 + [True] * 4
    trained = policy.read(result.folder, SYSTEM)
    assert trained.places(SEEDS[1], {"system.shift": 1.0, "system.bound": 3.0}).tolist() == [3]
    with pytest.raises(ConfigError, match="has no setting"):
        trained.places(None, {"system.shift": 2.0, "system.bound": None})


def test_the_console_shows_the_best_setting_and_a_row_for_each_member(vary, capsys):
    run(vary, vary={"system.shift": (0.0, 40.0)})
    out = capsys.readouterr().out
    assert "shift  0, 40" in out and "members  4" in out and "120 per member" in out
    lines = [line for line in out.splitlines() if " of 120 steps" in line]
    assert "shift=0 (best of 2 settings): return" in lines[-1]
    assert "steps/s over 4 members" in lines[-1]
    table = out[out.index("shift  seed") :].splitlines()
    assert [line.split()[:2] for line in table[1:5]] == [
        ["0", "3"],
        ["0", "11"],
        ["40", "3"],
        ["40", "11"],
    ]
    means = [line.split() for line in table if "mean" in line.split()]
    assert [row[0] for row in means] == ["0", "40"] and all("±" in row for row in means)


def test_the_learning_curve_is_drawn(vary):
    data = (run(with_plot(vary)).folder / "learning_curve.png").read_bytes()
    assert data.startswith(b"\x89PNG")


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(vary, monkeypatch, chunk):
    save_every_chunk(monkeypatch)
    finished = run(vary)
    folder = stop_after(monkeypatch, vary, chunk)
    run(vary, resume=str(folder))
    ours, theirs = arrays(folder), arrays(finished.folder)
    assert ours.keys() == theirs.keys() and "state.hyper.shift" in ours
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert_same_logs(folder, finished.folder)


@pytest.mark.parametrize(
    "vary_now", [{}, {"system.shift": (0.0, 4.0)}, VARY | {"system.bound": (2.0,)}]
)
def test_members_cannot_change_even_if_allowed(vary, whole, vary_now):
    folder = whole.folder
    changes = ("vary.system.shift", "vary.system.bound", "vary")
    with pytest.raises(ConfigError, match=r"cannot change: vary\.") as error:
        run(vary, resume=str(folder), vary=vary_now, allow_changes=changes)
    assert "allow_changes" not in str(error.value)


def test_a_resumed_run_can_change_a_hyperparameter(config, monkeypatch):
    save_every_chunk(monkeypatch)
    folder = stop_after(monkeypatch, config, 3)
    algorithm = Config(4, hyper_of(shift=2.0))
    with pytest.raises(ConfigError, match=r"system.shift: 0.0, now 2.0.*\[system.shift\]"):
        run(config, resume=str(folder), algorithm=algorithm)
    changes = ("system.shift",)
    result = run(config, resume=str(folder), algorithm=algorithm, allow_changes=changes)
    np.testing.assert_array_equal(result.params["shift"], [2, 2, 2])


def test_resume_auto_finds_the_run_with_the_same_vary(vary, monkeypatch):
    first = stop_after(monkeypatch, vary, 2)
    other = dataclasses.replace(vary, vary={"system.shift": (0.0, 3.0)})
    stop_after(monkeypatch, other, 2)
    assert run(vary, resume="auto").folder == first


def test_the_list_of_runs_has_members_and_varied_keys(whole, monkeypatch, capsys):
    result = whole
    (summary,) = listing.summaries(result.folder)
    assert (summary.num_members, summary.varied) == (12, ("system.shift", "system.bound"))
    last = result.measurements[-1].evaluation["episode_return"].mean(-1)
    assert summary.last_return == pytest.approx(last.reshape(6, 2).mean(1).max())
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["runs", str(result.folder.parents[3])])
    commands.run(listing.__doc__, listing.main)
    header, row = capsys.readouterr().out.splitlines()
    assert "settings" in header and "members" in header
    assert "shift=[" in row and "bound=[" in row and " 12 " in row


@pytest.fixture
def trained(whole, monkeypatch):
    monkeypatch.setattr(policy, "_system", lambda folder: SYSTEM)
    return whole, policy.read(whole.folder, SYSTEM)


def test_a_policy_is_loaded_by_member(trained, vary):
    result, read = trained
    folder = result.folder
    assert read.config == dataclasses.replace(vary, results_dir=read.config.results_dir)
    best = magpo.load_policy(folder, system=SYSTEM)
    at = int(np.argmax(result.best.score))
    jax.tree.map(
        np.testing.assert_array_equal,
        best.params,
        jax.tree.map(lambda x: x[at], result.best.params),
    )
    setting = {"system.shift": 3, "system.bound": None}
    one = magpo.load_policy(folder, seed=11, setting=setting, system=SYSTEM)
    assert one.params["shift"] == 3 and one.params["bound"] == np.float32(1e9)
    assert one.setup.hyper.shift == 3
    place = vary.members.index((11, SETTINGS[3]))
    assert one.params["peak"] == result.best.params["peak"][place]
    partly = magpo.load_policy(folder, setting={"system.bound": 1.5}, system=SYSTEM)
    of_bound = [i for i, m in enumerate(vary.members) if m.setting["system.bound"] == 1.5]
    assert read.score[of_bound].max() == read.score[read.best(of_bound)]
    assert partly.params["peak"] == read.params["peak"][read.best(of_bound)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"system.shift": 4}, r"vary.system.shift=4: the run has vary.system.shift=\[0,3\]; vary"),
        ({"system.nan": 4}, r"vary.system.nan=4: the run has vary.system.shift=\[0,3\]"),
        ({"system.bound": "x"}, r'vary.system.bound="x": .*vary.system.bound=\[null,4,1.5\]'),
    ],
)
def test_a_setting_that_the_run_lacks_is_refused(trained, setting, message):
    with pytest.raises(ConfigError, match=message):
        magpo.load_policy(trained[0].folder, setting=setting, system=SYSTEM)


def output_of(monkeypatch, capsys, module, *arguments):
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    commands.run(module.__doc__, module.main)
    return capsys.readouterr().out


def test_evaluate_plays_all_members_or_those_with_a_value(trained, monkeypatch, capsys):
    result, _ = trained
    folder = f"run={result.folder}"
    rows = output_of(
        monkeypatch, capsys, evaluate, folder, "episodes=2", "greedy=true"
    ).splitlines()
    assert rows[1].split()[:3] == ["shift", "bound", "seed"]
    assert len(rows) == 2 + 12 + 6
    assert sum("mean" in row.split() for row in rows) == 6
    for row, score in zip(rows[2:14], result.best.score, strict=True):
        assert float(row.split()[4]) == score
    arguments = (folder, "episodes=2", "vary.system.shift=3", "vary.system.bound=null")
    few = output_of(monkeypatch, capsys, evaluate, *arguments).splitlines()
    assert [row.split()[:3] for row in few[2:]] == [
        ["3", "null", "3"],
        ["3", "null", "11"],
        ["3", "null", "mean"],
    ]
    assert few[2].split() == rows[8].split()
    with pytest.raises(SystemExit):
        output_of(monkeypatch, capsys, evaluate, folder, "vary.system.shift=2")
    assert "vary.system.shift=2.0: the run has" in capsys.readouterr().err


def test_export_and_render_use_the_chosen_member(trained, monkeypatch, capsys, tmp_path):
    folder = trained[0].folder
    chosen = []
    build = policy.build
    monkeypatch.setattr(
        policy, "build", lambda *args, **kw: chosen.append(args[1]) or build(*args, **kw)
    )
    arguments = (f"run={folder}", "vary.system.shift=3", f"out={tmp_path / 'out'}")
    output_of(monkeypatch, capsys, export, *arguments, "seed=11")
    description = json.loads((tmp_path / "out/policy.json").read_text())
    assert next(iter(description["inputs"])) == "carry_0"
    assert description["carry_at_the_start"] == "zeros"
    monkeypatch.setattr(render, "write_gif", lambda *args: None)
    output_of(monkeypatch, capsys, render, *arguments[:2], f"out={tmp_path / 'a.gif'}")
    # Reading a run rehearses its first member each time.
    assert chosen[::2] == [0, 0] and chosen[1] in (7, 9, 11) and chosen[3] in range(6, 12)


def test_a_run_that_varies_is_plotted_by_setting(vary, whole):
    result = whole
    lines = {line.label: line for line in read.pool(read.find([result.folder]))}
    assert len(lines) == 6 and "COUNTING (shift=3, bound=null)" in lines
    finals = result.measurements[-1].evaluation["episode_return"].mean(-1)
    for setting, places in members.by_setting(vary.members):
        name = f"COUNTING (shift={setting['system.shift']:g}, bound=%s)"
        line = lines[name % ("null" if (b := setting["system.bound"]) is None else f"{b:g}")]
        np.testing.assert_array_equal(line.values[-1], finals[places])


def test_an_old_checkpoint_gives_a_one_line_error(config, capsys):
    folder = run(config).folder
    for path in checkpoint.checkpoints(folder / "checkpoints"):
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps(meta | {"format": 1}))
        sign(path)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    del saved["vary"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    capsys.readouterr()
    message = "no checkpoint can be used: .*: format must be 2, not 1"
    with pytest.raises(ConfigError, match=message):
        run(config, resume=str(folder))
    with pytest.raises(ConfigError, match=message):
        magpo.load_policy(folder, system=SYSTEM)
    assert capsys.readouterr().err == ""


def test_settings_are_labelled_with_their_values():
    assert members.label({"system.delta": 1.2, "system.lr": 0.0001}) == "delta=1.2 lr=0.0001"
    assert members.label({"system.delta": None, "system.x": 2.0}, ",") == "delta=null,x=2"
    assert members.label({}) == ""
