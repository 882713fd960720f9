"""The papers' ablations: trained, stopped, drawn, and written down."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from reading import table_of

from magpo.reproduce import __main__ as reproduce
from magpo.reproduce import ablations, training

TASK = "coordsum/3x10-30"
SMALL = (
    "mappo env=coordsum/3x10-30 tuned=false env.time_limit=5 num_envs=4 rollout_length=16 "
    "total_steps=128 num_evaluations=2 eval_episodes=2 network.critic.hidden_dim=8 "
)
ENTRY = {"source": "MAGPO, Figure 9", "about": "nothing much", "shows": "Little."}
TINY = {
    "figure-9": ENTRY
    | {
        "metrics": [None, "policy/entropy"],
        "runs": [SMALL + "network.actor.hidden_dim=8 vary.system.gamma=[0.5,0.9]"],
        "laptop": {"words": "total_steps=256 num_evaluations=4"},
    },
    "figure-10": ENTRY
    | {
        "metrics": [None, "memory", "time/steps_per_s"],
        "axis": "width",
        "positions": [4, 8],
        "runs": [SMALL + "network.actor.hidden_dim={4,8}"],
        "laptop": {"words": "total_steps=6400 num_evaluations=100"},
    },
}
QUIET = ("logger.plot=false", "logger.console=false")
IN_THESE_ABLATIONS = (
    "from pathlib import Path; from magpo import commands; "
    "from magpo.reproduce import ablations; ablations.TABLE = Path({table!r}); "
    "from magpo.reproduce import __main__ as main; commands.run(main.__doc__, main.main)"
)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Replace the ablations with tiny ones; work in an empty folder."""
    file = tmp_path / "ablations.yaml"
    file.write_text(yaml.safe_dump(TINY))
    monkeypatch.setattr(ablations, "TABLE", file)
    monkeypatch.chdir(tmp_path)
    ablations.entries.cache_clear()
    yield file
    ablations.entries.cache_clear()


@pytest.fixture
def call(table, output_of):
    """Return a function that calls `magpo.reproduce` and returns its output."""
    return partial(output_of, reproduce)


def records(folder, name):
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, texts) if x["name"] == name]


def test_a_figure_of_curves_has_every_setting_metric_and_step(call):
    out = call("figure-9", "budget=laptop", "seeds=[0,2]", *QUIET)
    assert "MAGPO, Figure 9: nothing much. In the paper: Little." in out
    assert Path("figures/figure-9_laptop.png").stat().st_size > 10_000
    rows = table_of("figures/figure-9_laptop.csv")
    (run,) = Path("results/reproduce/figure-9_laptop/mappo/coordsum/3x10-30").iterdir()
    for metric, name in {"episode_return": "eval/episode_return", "policy/entropy": None}.items():
        found = {
            (row["line"], int(row["seed"]), int(row["env_steps"])): float(row["value"])
            for row in rows
            if row["metric"] == metric
        }
        expected = {
            (f"MAPPO (gamma={r['system.gamma']:g})", r["seed"], r["env_steps"]): r["value"]
            for r in records(run, name or metric)
        }
        assert len(expected) == 4 * (5 if name else 4)
        assert found == pytest.approx(expected, rel=1e-4)
    call("figure-9", "budget=laptop", "seeds=[0,2,1]", *QUIET)
    (more,) = {*run.parent.iterdir()} - {run}  # finished seeds are not trained again
    assert {r["seed"] for r in records(more, "eval/episode_return")} == {1}
    assert {row["seed"] for row in table_of("figures/figure-9_laptop.csv")} == {"0", "1", "2"}


def test_a_figure_over_an_axis_is_stopped_and_continued(call, table):
    code = IN_THESE_ABLATIONS.format(table=str(table))
    words = ["figure-10", "budget=laptop", *QUIET, "checkpoint_share=1"]
    runs = Path("results/reproduce/figure-10_laptop/mappo/coordsum/3x10-30")
    with subprocess.Popen([sys.executable, "-c", code, *words]) as process:
        deadline = time.monotonic() + 120
        while not list(runs.glob("*/checkpoints/0*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert {row["position"] for row in table_of("figures/figure-10_laptop.csv")} == {"4"}

    call(*words)
    first, second = sorted(runs.iterdir())
    rows = table_of("figures/figure-10_laptop.csv")
    for run, width in ((first, "4"), (second, "8")):
        (score,) = [r["value"] for r in records(run, "absolute/episode_return")]
        memory = int(json.loads((run / "run.json").read_text())["memory_bytes"])
        found = {r["metric"]: float(r["value"]) for r in rows if r["position"] == width}
        assert found["episode_return"] == pytest.approx(score, rel=1e-4)
        assert found["memory"] == pytest.approx(memory, rel=1e-4)
        speeds = sorted(r["value"] for r in records(run, "time/steps_per_s"))
        assert speeds[0] < found["time/steps_per_s"] < speeds[-1]
    assert Path("figures/figure-10_laptop.png").stat().st_size > 10_000


def test_a_run_that_fails_does_not_keep_the_others_from_training(call, monkeypatch, capfd):
    trained = []

    def fail(command, *_):
        trained.append(command)
        return 1

    monkeypatch.setattr(training, "train", fail)
    with pytest.raises(SystemExit) as stopped:
        call("figure-10")
    assert stopped.value.code == 1 and len(trained) == 2
    assert "nothing to draw: no run has an evaluation yet" in capfd.readouterr().out


def test_runs_without_an_evaluation_are_not_drawn(call, table):
    ablation = ablations.find("figure-10", "paper")
    call("figure-10", *QUIET)
    (table.parent / "figures/figure-10_paper.csv").unlink()
    _, second = sorted(Path("results/reproduce/figure-10_paper/mappo", TASK).iterdir())
    (second / "metrics.jsonl").write_text("")
    ablations.write(ablation, "results/reproduce/figure-10_paper", Path("figures/figure-10_paper"))
    rows = table_of("figures/figure-10_paper.csv")
    assert {row["position"] for row in rows if row["metric"] == "episode_return"} == {"4"}
    assert {row["metric"] for row in rows} == {"episode_return", "memory", "time/steps_per_s"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["figure-99"], "no published row or ablation 'figure-99': did you mean 'figure-9'?"),
        (["figure-8", "budget=laptop"], "no published row or ablation 'figure-8': did you mean"),
        (["figure-9", "mappo"], "figure-9: takes no system, paper"),
        (["figure-9", "buget=laptop"], "buget: cannot be set for a published experiment: did you"),
        (["figure-10", "seeds=[0,1]"], "seeds: figure-10 measures runs of one seed"),
        (["figure-9", "budget=phone"], "budget must be 'paper' or 'laptop'"),
        (
            ["figure-9", "system.gamma=0.5"],
            "system.gamma: cannot be set for a published experiment",
        ),
        (["figure-9", "keep=-1"], "keep must be greater than or equal to 0"),
        (["coordsum/3x10-30", "budget=laptop"], "budget: is for ablations"),
    ],
    ids=str,
)
def test_bad_arguments_give_a_one_line_error(table, error_of, arguments, line):
    assert line in error_of(reproduce, *arguments)


def test_all_ablations_are_in_the_usage_and_have_valid_commands():
    words = set(reproduce.__doc__.split())
    for name in ablations.entries():
        assert name in words
        for budget in ("paper", "laptop"):
            ablation = ablations.find(name, budget)
            settings = [reproduce.load(x.words, [], [0]) for x in ablation.commands]
            assert len(set(map(repr, settings))) == len(settings)
            for config in settings:
                assert config.published or config.env.options["ends"] == "released"


def test_alternatives_are_combined():
    assert ablations.expanded("{a,b} env=x n={1,2}") == [
        *("a env=x n=1", "a env=x n=2", "b env=x n=1", "b env=x n=2")
    ]
    assert ablations.expanded("a vary.b=[1,2]") == ["a vary.b=[1,2]"]


def test_the_guide_lists_all_ablations():
    guide = (Path(__file__).parents[1] / "docs/guides/figures.md").read_text()
    for name, entry in ablations.entries().items():
        assert f"| `{name}` | {entry['source']} | {entry['about']} |\n" in guide
