"""Runs on disk to pictures: the pooling, the statistics and the files written."""

import csv
import importlib.util
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from magpo import published

SCRIPT = Path(__file__).parents[1] / "scripts" / "plot.py"
spec = importlib.util.spec_from_file_location("plot_script", SCRIPT)
plot = importlib.util.module_from_spec(spec)
sys.modules["plot_script"] = plot
spec.loader.exec_module(plot)

STEPS = (0, 1000, 2000)
TASK = "2s-8x8-2p-2f-coop"
OFF = {"advantage": "gpae", "trace": "dt", "eta": 1.05, "reuse": 4}  # the paper's off-policy GPAE


def write(root, system, finals, *, suite="lbf", task=TASK, name="a", steps=STEPS, **settings):
    """A run whose curves rise in a line to `finals`, by seed."""
    folder = root / system / suite / task / name
    folder.mkdir(parents=True)
    config = {"seeds": list(finals), "num_envs": 4, "system": {"lr": 0.5} | settings}
    config["run"] = {"published": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    headline = "win_rate" if suite in ("smax", "connector") else "episode_return"
    head = {"run": name, "system": system, "env": suite, "task": task}
    rows = []
    for step in steps:
        for seed, final in finals.items():
            row = head | {"seed": seed, "env_steps": step, "wall_s": 1.0}
            value = final * step / STEPS[-1]
            rows += [row | {"name": f"eval/{headline}", "value": value}]
            rows += [row | {"name": f"absolute/{headline}", "value": 99.0}]
            rows += [row | {"name": "eval/episode_length", "value": 77.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drawn(root):
    plot.main(root, out=root / "out", reps=50)
    with (root / "out" / "summary.csv").open() as file:
        return {(row["system"], row["task"]): row for row in csv.DictReader(file)}


def lines(root):
    return {line.label: line for line in plot.pool(plot.find([root]))}


def slow_iqm(scores):
    """The mean of the values left when a quarter of them, rounded down, is cut off either end."""
    values = sorted(float(x) for row in scores for x in row)
    cut = len(values) // 4
    kept = values[cut : len(values) - cut]
    return sum(kept) / len(kept)


def test_iqm_is_the_trimmed_mean_over_tasks_and_seeds():
    draw = np.random.default_rng(3)
    scores = {"A": {t: draw.random(5) for t in "xyz"}, "B": {t: draw.random(7) for t in "xy"}}
    rows = plot.iqm(scores, dict.fromkeys("AB", "k"), 400)
    found = {row.label[0]: row for row in rows}
    for label, tasks in scores.items():
        row = found[label]
        assert np.isclose(row.point, slow_iqm(tasks.values()))
        assert row.low < row.point < row.high
    assert "3 tasks x 5 seeds" in found["A"].label and "2 tasks x 7 seeds" in found["B"].label
    assert rows[0].point >= rows[1].point


def test_the_bootstrap_keeps_tasks_apart():
    # Each task's seeds agree: a draw within tasks changes nothing, one across them would.
    constant = np.array([[0.0, 0.25, 1.0]] * 4)
    assert plot.estimate(np.mean, [constant], 100) == pytest.approx((1.25 / 3,) * 3)
    # The mean's own error: two tasks drawn apart have 1 / sqrt(2) of the interval of one.
    x = np.linspace(0, 1, 30)[:, None]
    wide = np.subtract(*plot.estimate(np.mean, [x], 4000)[1:])
    narrow = np.subtract(*plot.estimate(np.mean, [np.hstack([x, x])], 4000)[1:])
    assert narrow / wide == pytest.approx(0.5**0.5, rel=0.06)
    assert wide == pytest.approx(-2 * 1.96 * x.std() / 30**0.5, rel=0.06)


def test_probability_of_improvement():
    equal = np.array([0.25, 0.5, 0.75])
    scores = {
        "A": {"x": equal + 1, "y": equal + 1},
        "B": {"x": equal, "y": equal},
        "C": {"x": equal[::-1].copy(), "z": equal},
    }
    found = {row.label: row for row in plot.improvement(scores, 200)}
    better = found["A  >  B"]
    assert (better.low, better.point, better.high) == (1, 1, 1)
    assert found["B  >  C"].point == 0.5 and found["A  >  C"].point == 1
    assert found["B  >  C"].low < 0.5 < found["B  >  C"].high


def test_the_quick_probability_is_rliables():
    metric = pytest.importorskip("rliable.metrics").probability_of_improvement
    draw = np.random.default_rng(1)
    for sizes in ((3, 2), (6, 4), (1, 5)):
        x, y = (draw.integers(3, size=(n, 4)) / 2 for n in sizes)  # with ties
        assert np.isclose(plot.beats(x, y), metric(x, y))


def test_systems_without_a_task_in_common_are_not_compared():
    scores = {"A": {"x": np.ones(2)}, "B": {"y": np.ones(2)}}
    assert plot.improvement(scores, 10) == []


def test_seeds_of_several_runs_are_pooled_and_the_newest_counts(tmp_path):
    write(tmp_path, "magpo", {0: 0.1, 1: 0.2}, name="2026-01-02")
    write(tmp_path, "magpo", {1: 0.6, 2: 0.9}, name="2026-01-10")
    (line,) = lines(tmp_path).values()
    assert line.label == "MAGPO"
    np.testing.assert_allclose(line.values[-1], [0.1, 0.6, 0.9])
    assert line.steps.tolist() == list(STEPS)


def test_a_run_found_twice_counts_once(tmp_path):
    write(tmp_path, "magpo", {0: 0.1})
    assert len(plot.find([tmp_path, tmp_path / "magpo"])) == 1


def test_different_settings_have_lines_of_their_own(tmp_path):
    write(tmp_path, "magpo", {0: 0.1}, name="a", lr=0.5, kl=1)
    write(tmp_path, "magpo", {1: 0.2}, name="b", lr=0.5, kl=1)
    write(tmp_path, "magpo", {0: 0.8}, name="c", lr=0.25, kl=1)
    write(tmp_path, "mappo", {0: 0.3}, name="d", lr=0.125)
    found = lines(tmp_path)
    assert set(found) == {"MAGPO (lr=0.5)", "MAGPO (lr=0.25)", "MAPPO"}
    np.testing.assert_allclose(found["MAGPO (lr=0.5)"].values[-1], [0.1, 0.2])
    np.testing.assert_allclose(found["MAGPO (lr=0.25)"].values[-1], [0.8])


def test_a_curve_goes_as_far_as_all_its_seeds(tmp_path):
    write(tmp_path, "magpo", {0: 0.4}, name="a")
    folder = write(tmp_path, "magpo", {1: 0.8}, name="b", steps=(0, 1000))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"run": "b", "system": "magpo", "name": "eval/epi')  # still being written
    (line,) = lines(tmp_path).values()
    assert line.steps.tolist() == [0, 1000]
    np.testing.assert_allclose(line.values, [[0, 0], [0.2, 0.4]])


def test_what_ended_early_is_marked_in_the_aggregates(tmp_path, capsys):
    write(tmp_path, "magpo", {0: 0.4}, steps=(0, 1000))
    write(tmp_path, "mappo", {0: 0.4})
    found = plot.marked(list(lines(tmp_path).values()))
    assert found == {"MAGPO": "MAGPO*", "MAPPO": "MAPPO"}
    drawn(tmp_path)
    assert "1000 to 2000 steps" in capsys.readouterr().err


def test_scores_span_everything_plotted_and_published(tmp_path):
    write(tmp_path, "magpo", {0: 0.25, 1: 0.5})  # published: 1.0
    write(tmp_path, "other", {0: 0.75, 1: 0.0})
    write(tmp_path, "other", {0: 3.0, 1: 3.0}, task="same")
    scores = plot.normalised(list(plot.pool(plot.find([tmp_path]))))
    np.testing.assert_allclose(scores["MAGPO"][TASK], [0.25, 0.5])
    np.testing.assert_allclose(scores["OTHER"][TASK], [0.75, 0.0])
    np.testing.assert_allclose(scores["OTHER"]["same"], [1, 1])


def test_published_values_are_in_the_runs_units(tmp_path):
    def run(system, suite, task, **settings):
        gpae = {"advantage": "gpae", "trace": "dt", "eta": 1.05} if system == "gpae_mappo" else {}
        dotted = {f"system.{key}": value for key, value in (gpae | settings).items()}
        return plot.published(
            plot.Run(system, suite, task, "a", {"run.published": True} | dotted, {})
        )

    assert run("magpo", "smax", "3s5z_vs_3s6z")[:2] == (0.95, 0.02)
    off = run("gpae_mappo", "smax", "5m_vs_6m", reuse=4)
    assert off[:2] == pytest.approx((0.937, 0.01)) and off.source.startswith("GPAE")
    assert run("gpae_mappo", "smax", "5m_vs_6m", reuse=1)[:2] == pytest.approx((0.088, 0.009))
    assert run("gpae_mappo", "mabrax", "humanoid-9-8", reuse=4)[:2] == (445, 4)
    ablation = run("gpae_mappo", "smax", "5m_vs_6m", reuse=4, trace="st")
    assert (ablation.mean, ablation.source) == (0.444, "GPAE, Table 3")
    assert run("gpae_mappo", "smax", "5m_vs_6m", reuse=1, trace="st") is None
    assert run("gpae_mappo", "smax", "5m_vs_6m", reuse=1, advantage="gae")[0] == 0.031
    assert run("gpae_mappo", "mabrax", "ant-4x2", reuse=1, advantage="gae")[:2] == (1379, 124)
    other_game = {"run.published": False, "run.system": "magpo", "run.env": "smax/3s5z_vs_3s6z"}
    assert published.find(other_game) is None
    assert run("magpo", "lbf", "of-my-own") is None


def test_summary(tmp_path):
    finals = {seed: 0.1 * seed for seed in range(6)}
    write(tmp_path, "magpo", finals)
    write(tmp_path, "gpae_mappo", {3: 0.5, 4: 0.75}, suite="smax", task="5m_vs_6m", **OFF)
    write(tmp_path, "mine", {0: 0.5}, suite="smax", task="5m_vs_6m")
    table = drawn(tmp_path)
    many = table["MAGPO", TASK]
    assert (many["suite"], many["seeds"], many["env_steps"]) == ("lbf", "6", "2000")
    assert float(many["mean"]) == pytest.approx(0.25)
    assert 0.1 < float(many["low"]) < 0.2 < 0.3 < float(many["high"]) < 0.4
    assert "95 %" in many["low_to_high"]
    assert (float(many["published_mean"]), float(many["published_std"])) == (1, 0)
    few = table["GPAE-MAPPO", "5m_vs_6m"]
    assert [float(few[key]) for key in ("mean", "low", "high")] == [0.625, 0.5, 0.75]
    assert "smallest" in few["low_to_high"]
    assert float(few["published_mean"]) == pytest.approx(0.937)
    one = table["MINE", "5m_vs_6m"]
    empty = ("low", "high", "low_to_high", "published_mean", "published_std", "published_in")
    assert [one[key] for key in empty] == [""] * 6


def test_pictures_are_written(tmp_path):
    write(tmp_path, "magpo", {0: 0.4, 1: 0.5})
    write(tmp_path, "mappo", {0: 0.4})
    write(tmp_path, "magpo", {0: 0.5}, suite="connector", task="con-5x5x3a")
    drawn(tmp_path)
    pictures = {file.name: file for file in (tmp_path / "out").glob("*.png")}
    one_system = {"connector_con-5x5x3a.png", "iqm_connector.png"}  # nothing to compare
    two = {f"lbf_{TASK}.png", "iqm_lbf.png", "probability_of_improvement_lbf.png"}
    assert set(pictures) == one_system | two
    for file in pictures.values():
        data = file.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 250
        assert len(data) > 10_000


@pytest.mark.parametrize("wrong", ["missing", "empty", "untrained", "no config", "garbage"])
def test_bad_input_is_one_line(wrong, tmp_path, refused):
    root = tmp_path / "results"
    if wrong != "missing":
        root.mkdir()
    if wrong == "untrained":
        write(root, "magpo", {0: 0.4}, steps=())
    if wrong == "no config":
        (write(root, "magpo", {0: 0.4}) / "config.yaml").unlink()
    if wrong == "garbage":
        (write(root, "magpo", {0: 0.4}) / "metrics.jsonl").write_text('"eval/episode_return"\n')
    assert str(root) in refused(plot, root, f"out='{tmp_path / 'out'}'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("metrics.jsonl", b'"run"', b'"\xff"'),
        ("metrics.jsonl", b'"value": 0.4', b'"value": "x"'),
        ("metrics.jsonl", b'"value": 0.4', b'"value": [1]'),
        ("metrics.jsonl", b'"seed": 0', b'"seed": "x"'),
        ("metrics.jsonl", b'"seed": 0', b'"seed": null'),
        ("metrics.jsonl", b'"env_steps": 0', b'"env_steps": "x"'),
        ("metrics.jsonl", b'"env_steps": 0', b'"env_steps": 0.5'),
        ("metrics.jsonl", b'"env": "lbf"', b'"env": 3'),
        ("metrics.jsonl", b'"seed": 0', b'"seed": ' + b"[" * 100_000),
        ("config.yaml", b"num_envs", b"3"),
        ("config.yaml", b"lr", b"3"),
        ("config.yaml", b"num_envs: ", b"num_envs: " + b"[" * 3000),
        ("config.yaml", b"num_envs: 4", b"num_envs: &a {b: *a}"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_a_damaged_file_is_one_line_that_names_it(name, old, new, tmp_path, refused):
    file = write(tmp_path, "magpo", {0: 0.4}) / name
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))
    line = refused(plot, tmp_path, f"out='{tmp_path / 'out'}'")
    assert str(file.parent) in line and name in line


def test_an_output_that_cannot_be_a_folder_is_one_line(tmp_path, refused):
    write(tmp_path, "magpo", {0: 0.4})
    (tmp_path / "out").write_text("")
    assert "out" in refused(plot, tmp_path, f"out='{tmp_path / 'out'}'")


def test_no_bootstrap_draws_is_one_line(tmp_path, refused):
    write(tmp_path, "magpo", {0: 0.4})
    assert "reps must be greater than 0" in refused(
        plot, tmp_path, f"out='{tmp_path / 'out'}'", "reps=0"
    )
