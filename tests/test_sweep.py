"""Searches: trials side by side, killed and resumed, pruned, reported, refused."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import optuna
import pytest
import yaml
from hydra.experimental.callback import Callback
from optuna.trial import TrialState, create_trial

from magpo import commands, config, experiment, plugins
from magpo.envs import registry
from magpo.runs import policy
from magpo.sweep import __main__ as sweep
from magpo.sweep import space, study, training

ROOT = Path(__file__).parents[1]
SYSTEM = """
rollout_length: 3
system: {shift: 0.0, bound: null, repeats: 1, nan: ""}
"""
REGISTER = "\n\nregistry.register('test/count', Count, walls=2)\n"
TINY = (
    *("import=counting.py", "env=test/count", "num_envs=4", "total_steps=120", "eval_episodes=2"),
    *("num_evaluations=5", "logger.plot=false", "checkpoint_share=1"),
)
KEYS = ("number", "state", "value", "params")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Work in a folder with the counting system, which is not imported yet."""
    monkeypatch.setattr(plugins, "_plugins", [])
    monkeypatch.setattr(plugins, "_modules", {})
    monkeypatch.setattr(registry, "registered", {})
    text = (ROOT / "tests/experiment/counting.py").read_text()
    (tmp_path / "counting.py").write_text(text + REGISTER)
    (tmp_path / "counting.yaml").write_text(SYSTEM)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    commands.run(sweep.__doc__, sweep.main)


def search(monkeypatch, *arguments, tiny=TINY):
    """Call `python -m magpo.sweep` with the folder `study`; return its trials."""
    call(monkeypatch, "counting", *tiny, "study=study", *arguments)
    return trials("study")


def trials(folder, storage=None):
    found = study.load(Path(folder), storage).trials
    return [{key: getattr(trial, key) for key in KEYS} for trial in found]


def last_values(folder):
    """Return the last evaluation's mean return over seeds, by shift."""
    found = {}
    for line in Path(folder, "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["name"] == "eval/episode_return" and record["env_steps"] == 120:
            found.setdefault(record.get("system.shift"), []).append(record["value"])
    return {shift: sum(values) / len(values) for shift, values in found.items()}


def test_a_grid_is_covered_once_by_one_run_for_each_structure(monkeypatch, capsys):
    space_ = ("space.system.shift=[0,0.5,4]", "space.system.repeats=[1,2]")
    arguments = ("sampler=grid", "trials=9", "parallel=6", "seeds=[3,11]", "absolute_metric=false")
    found = search(monkeypatch, *arguments, *space_)
    pairs = [(t["params"]["system.shift"], t["params"]["system.repeats"]) for t in found]
    assert sorted(pairs) == [(0, 1), (0, 2), (0.5, 1), (0.5, 2), (4, 1), (4, 2)]
    assert {t["state"] for t in found} == {TrialState.COMPLETE}
    runs = sorted(Path("study/counting/test/count").iterdir())
    assert len(runs) == 2
    for run in runs:
        values = yaml.safe_load((run / "config.yaml").read_text())
        of_run = [t for t in found if t["params"]["system.repeats"] == values["system"]["repeats"]]
        expected = last_values(run)
        assert {t["params"]["system.shift"]: t["value"] for t in of_run} == pytest.approx(expected)
        module = plugins.system("counting")
        trained = policy.read(run, module)
        (place,) = trained.places(3, {"system.shift": 4.0})
        assert trained.config.members[place] == (3, {"system.shift": 4.0})

    top = max(found, key=lambda t: t["value"])
    values = yaml.safe_load(Path("study/best.yaml").read_text())
    assert config.flat(values) == top["params"]
    for name in ("history.png", "importances.png", "best.yaml"):
        Path("study", name).unlink()
    capsys.readouterr()
    call(monkeypatch, "--report", "study")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "complete" in line]
    assert [row[:2] for row in rows] == [[str(number), "complete"] for number in range(6)]
    assert rows[0][-1] in [f"counting/test/count/{run.name}" for run in runs]
    for name in ("history.png", "importances.png", "best.yaml"):
        assert Path("study", name).stat().st_size > 0


def batches(sampler, searched, size, trials):
    """Draw all batches of a study in memory; return the parameters of each batch's trials."""
    plugins.load(["counting.py"])
    distributions = space.distributions(searched, config.load("counting", TINY))
    found = optuna.create_study(direction="maximize")
    drawn = []
    arguments = (found, sampler, distributions, {"system.shift"})
    while batch := study.batch(*arguments, worker=0, size=size, trials=trials):
        drawn.append([(t.params["system.repeats"], t.params["system.shift"]) for t in batch])
        for trial in batch:
            found.tell(trial.number, 0.0)
    return drawn


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("repeats", [[1, 2, 3, 4, 5], "1..5"])
def test_a_batch_shares_its_structure(sampler, repeats):
    drawn = batches(sampler, {"system.repeats": repeats, "system.shift": "0..5"}, 4, 18)
    assert [len(batch) for batch in drawn] == [4, 4, 4, 4, 2]
    assert all(len({count for count, _ in batch}) == 1 for batch in drawn)
    assert len({count for batch in drawn for count, _ in batch}) > 1
    assert len({shift for batch in drawn for _, shift in batch}) == 18


def test_no_more_trials_share_a_structure_than_there_are_other_values():
    searched = {"system.repeats": "log:1..1000", "system.shift": [0.0, 1.0]}
    (batch,) = batches("random", searched, 6, 6)
    counts = [count for count, _ in batch]
    assert counts[::2] == counts[1::2] and len(set(counts)) == 3


def test_a_grid_is_ordered_by_structure():
    searched = {"system.shift": [0.0, 1.0, 4.0], "system.repeats": [2, 1]}
    expected = [[(2, 0), (2, 1), (2, 4), (1, 0)], [(1, 1), (1, 4)]]
    assert batches("grid", searched, 4, 6) == expected


def test_trials_side_by_side_equal_each_trial_alone(monkeypatch):
    several = search(monkeypatch, "trials=3", "parallel=3", "space.system.shift=0..5", "seeds=[3]")
    assert len({t["params"]["system.shift"] for t in several}) == 3
    for trial in several:
        alone = config.load(
            plugins.system("counting"),
            [*TINY, f"system.shift={trial['params']['system.shift']!r}", "seeds=[3]"],
        )
        result = experiment.run(plugins.system("counting"), alone)
        assert result.objective == pytest.approx(trial["value"])


def test_a_trial_that_diverges_or_is_refused_fails_and_the_others_continue(monkeypatch, capsys):
    found = search(
        monkeypatch,
        *("sampler=grid", "parallel=4", "system.nan=loss/policy", "seeds=[3]"),
        "space.system.shift=[0,13,50,90]",
    )
    states = {t["params"]["system.shift"]: t["state"].name for t in found}
    assert states == {0: "FAIL", 13: "FAIL", 50: "COMPLETE", 90: "COMPLETE"}
    out = capsys.readouterr().out
    assert "failed: diverged" in out and "shift must not be 13 on test/count" in out
    assert len(list(Path("study/counting/test/count").iterdir())) == 1


def test_a_batch_that_diverges_as_a_whole_does_not_fail_the_sweep(monkeypatch):
    nan = ("system.nan=parameters", "seeds=[3]", "space.system.shift=[0]", "sampler=grid")
    (trial,) = search(monkeypatch, *nan)
    assert trial["state"] is TrialState.FAIL


def kill(arguments, until):
    """Start a sweep; kill it and the run that it started once `until` returns true."""
    code = "from magpo import commands; from magpo.sweep import __main__ as main; "
    code += "commands.run(main.__doc__, main.main)"
    with subprocess.Popen([sys.executable, "-c", code, *arguments]) as process:
        deadline = time.monotonic() + 300
        while not until():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        process.kill()
        for pid in listed.split():
            os.kill(int(pid), signal.SIGKILL)


def rows(table, where="1"):
    """Return the number of rows in the killed study's database."""
    try:
        with sqlite3.connect("killed/study.db") as connection:
            return connection.execute(f"select count(*) from {table} where {where}").fetchone()[0]
    except sqlite3.OperationalError:  # no database yet
        return 0


@pytest.mark.skipif(sys.platform != "linux", reason="finds a process's children in /proc")
def test_a_killed_search_ends_with_the_same_trials(monkeypatch):
    arguments = ("trials=3", "parallel=2", "space.system.shift=0..5", "seeds=[3,4]", "prune=true")
    call(monkeypatch, "counting", *TINY, "study=alone", *arguments)
    killed = ("counting", *TINY, "study=killed", *arguments)
    kill(killed, lambda: rows("trials") == 1)  # in the middle of a batch
    kill(killed, lambda: list(Path("killed").rglob("metrics.jsonl")))
    kill(killed, lambda: rows("trials", "state = 'COMPLETE'") >= 2)
    call(monkeypatch, *killed)
    assert trials("killed") == trials("alone")
    assert [t["number"] for t in trials("killed")] == [0, 1, 2]
    before = list(Path("killed").rglob("metrics.jsonl"))
    call(monkeypatch, *killed)  # nothing is trained again
    assert trials("killed") == trials("alone")
    assert list(Path("killed").rglob("metrics.jsonl")) == before


def test_workers_share_a_journal(monkeypatch):
    common = ("storage=journal.log", "parallel=2", "space.system.shift=0..5", "seeds=[3]")
    search_ = ("counting", *TINY, "study=study", *common)
    call(monkeypatch, *search_, "trials=2")
    call(monkeypatch, *search_, "trials=4", "worker=1")
    found = trials("study", "journal.log")
    assert [t["state"].name for t in found] == ["COMPLETE"] * 4
    assert len({t["params"]["system.shift"] for t in found}) == 4


def make_study(*overrides):
    """Return a search, and a study in memory: five finished trials, all 0, and two running."""
    plugins.load(["counting.py"])
    given = config.load("counting", [*TINY, "seeds=[3]", *overrides])
    made = sweep.make_search("counting", [*TINY, "seeds=[3]", *overrides], given, "study")
    found = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner())
    of_shift = space.distributions({"system.shift": [0.0, 50.0, 90.0]}, given)
    for _ in range(5):
        zeros = dict.fromkeys(range(1, 6), 0.0)
        params = {"system.shift": 0.0}
        found.add_trial(
            create_trial(
                value=0.0, params=params, distributions=of_shift, intermediate_values=zeros
            )
        )
    for shift in (50.0, 90.0):
        params = {"system.shift": shift}
        running = TrialState.RUNNING
        found.add_trial(create_trial(state=running, params=params, distributions=of_shift))
    return made, found


@pytest.mark.parametrize("prune", [True, False])
def test_trials_below_the_median_are_pruned(prune):
    made, found = make_study()
    batch = found.trials[5:]
    assert training.train_all(made, found, batch, 8, prune, lambda: None) == 0
    ended = found.trials[5:]
    if prune:
        assert {t.state for t in ended} == {TrialState.PRUNED}
        assert [list(t.intermediate_values) for t in ended] == [[1], [1]]
    else:
        assert {t.state for t in ended} == {TrialState.COMPLETE}
        assert [list(t.intermediate_values) for t in ended] == [[1, 2, 3, 4, 5]] * 2
    assert all(Path("study", t.user_attrs["run"], "config.yaml").is_file() for t in ended)


class Keep(Callback):
    """A callback that keeps the values that Hydra's jobs return to its sweepers."""

    returned: ClassVar[list[float]] = []

    def on_job_end(self, config, job_return, **_):
        self.returned.append(job_return.return_value)


def test_a_hydra_sweeper_receives_the_objective(monkeypatch):
    plugins.load(["counting.py"])
    keep = f"+hydra.callbacks.keep._target_={__name__}.Keep"
    arguments = (keep, "system.shift=9,0.5", "absolute_metric=false", "seeds=[3,11]")
    monkeypatch.setattr(sys, "argv", ["counting", "--multirun", *TINY, *arguments])
    experiment.main(plugins.system("counting"))
    runs = sorted(Path("results/counting/test/count").iterdir())
    expected = [last_values(run)[None] for run in runs]
    assert Keep.returned == pytest.approx(expected)
    assert expected[0] != expected[1]


BAD = {
    "no_system": ((), "needs one system"),
    "unknown_system": (("nobody", "env=test/count"), "unknown system 'nobody'"),
    "unknown_key": (("space.system.shft=[1]",), "did you mean 'space.system.shift'"),
    "not_searchable": (("space.env.walls=[1]",), "unknown key 'space.env.walls'"),
    "nothing_to_search": ((), "nothing to search"),
    "empty_list": (("space.system.shift=[]",), "one or more different values"),
    "duplicate_value": (("space.system.shift=[1,1]",), "one or more different values"),
    "reversed_range": (("space.system.shift=3..1",), "the first number must be the smaller"),
    "log_of_0": (("space.system.shift=log:0..1",), "must be above 0"),
    "not_a_range": (("space.system.shift=3",), "a range low..high"),
    "range_of_words": (("space.system.nan=1..2",), "is not a number"),
    "fractional_count": (("space.system.repeats=0.5..2",), "must be whole numbers"),
    "out_of_range": (("space.system.shift=-1..1",), "space.system.shift: system.shift must be"),
    "wrong_choice": (("space.system.nan=[often]",), "space.system.nan: system.nan must be"),
    "parallel_0": (("space.system.shift=0..1", "parallel=0"), "parallel must be greater"),
    "unknown_sampler": (("space.system.shift=0..1", "sampler=tpee"), "sampler must be"),
    "grid_of_a_range": (("space.system.shift=0..1", "sampler=grid"), "sampler=grid: needs a list"),
    "one_range": (("space.system.shift=0..1", "sampler=cmaes"), "needs two ranges or more"),
    "unreachable_storage": (
        ("space.system.shift=0..1", "storage=postgresql://nowhere/x"),
        "storage=postgresql://nowhere/x: cannot be used",
    ),
    "no_driver": (
        ("space.system.shift=0..1", "storage=postgresql+pg8000://nowhere/x"),
        "cannot be used: No module named 'pg8000'",
    ),
    "unknown_storage": (("space.system.shift=0..1", "storage=what://x"), "cannot be used"),
    "reserved_key": (("space.system.shift=0..1", "resume=auto"), "resume: the sweep sets this key"),
    "no_study": (("--report", "nowhere"), "nowhere: no study there"),
}


def refusal(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert not list(Path().rglob("config.yaml"))
    return err


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_a_one_line_error(monkeypatch, capsys, name):
    arguments, expected = BAD[name]
    complete = name in ("no_system", "unknown_system", "no_study")
    before = () if complete else ("counting", *TINY, "study=study")
    if name == "no_system":
        before = TINY
    assert expected in refusal(monkeypatch, capsys, *before, *arguments)


def test_a_study_of_another_search_is_refused(monkeypatch, capsys):
    plugins.load(["counting.py"])
    given = config.load("counting", TINY)
    study.load(Path("study"), None, sweep.facts(given, {"system.shift": [1, 2]}))
    other = ("counting", *TINY, "study=study")
    err = refusal(monkeypatch, capsys, *other, "space.system.shift=[1,3]")
    assert "is another search: space.system.shift: [1, 2], now [1, 3]" in err
    err = refusal(monkeypatch, capsys, *other, "space.system.shift=[1,2]", "num_envs=5")
    assert "num_envs: 4, now 5" in err


def test_a_run_that_does_not_fit_is_refused_before_training(monkeypatch):
    plugins.load(["counting.py"])
    monkeypatch.setattr("magpo.hardware.devices.memory_needed", lambda train_chunk: 10**15)
    given = config.load("counting", TINY)
    with pytest.raises(config.compose.ConfigError, match=r"1 members need 1,0.*: train fewer"):
        experiment.run(plugins.system("counting"), given, must_fit=True)
    assert not list(Path().rglob("checkpoints/0*"))


@pytest.mark.parametrize("name", plugins.of_package())
def test_each_system_accepts_its_search_space(name):
    overrides = ["env=coordsum/3x10-30", "tuned=false"]
    found, others = sweep.read_space(name, overrides)
    distributions = space.distributions(found, config.load(name, others))
    assert set(distributions) == set(found) and len(found) >= 2
    space.check_values(name, others, distributions)


def test_a_key_set_to_one_value_is_not_searched():
    found, _ = sweep.read_space("magpo", ["system.delta=1.2", "space.system.gamma=0.9..1"])
    assert found == {"system.rl_coef": [0, 1, 2, 4, 8], "system.gamma": "0.9..1"}


def test_ranges_become_distributions(monkeypatch):
    plugins.load(["counting.py"])
    given = config.load("counting", TINY)
    texts = {"system.shift": "log:1e-3..2", "system.bound": "1.5..3", "system.repeats": "log:1..8"}
    found = space.distributions(texts, given)
    assert [(d.low, d.high, d.log) for d in found.values()] == [
        (1e-3, 2, True),
        (1.5, 3, False),
        (1, 8, True),
    ]
    assert isinstance(found["system.repeats"], optuna.distributions.IntDistribution)


def test_cmaes_searches_ranges(monkeypatch):
    ranges = ("space.system.shift=0..5", "space.system.bound=2..9")
    found = search(monkeypatch, "sampler=cmaes", "trials=4", "parallel=2", "seeds=[3]", *ranges)
    assert [t["state"].name for t in found] == ["COMPLETE"] * 4
    assert len({t["params"]["system.shift"] for t in found}) == 4
