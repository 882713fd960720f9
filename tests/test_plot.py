"""Figures and tables of runs on disk: the pooling, the statistics and the written files."""

import csv
import json
import re
import struct
import sys

import numpy as np
import pytest
import yaml

from magpo import commands, published
from magpo.plot import __main__ as plot
from magpo.plot import aggregate, draw, read, table

STEPS = (0, 1000, 2000)
TASK = "2s-8x8-2p-2f-coop"
OFF = {"advantage": "gpae", "trace": "dt", "eta": 1.05, "reuse": 4}  # off-policy GPAE


def write(
    root,
    system,
    finals,
    *,
    suite="lbf",
    task=TASK,
    name="a",
    steps=STEPS,
    absolute=None,
    **settings,
):
    """Write a run whose curves rise linearly to `finals`, by seed; `absolute` has the seeds'
    absolute metrics."""
    folder = root / system / suite / task / name
    folder.mkdir(parents=True)
    config = {"seeds": list(finals), "num_envs": 4, "eval_episodes": 32, "system": {"lr": 0.5}}
    config["system"] |= settings
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
            rows += [row | {"name": "eval/episode_length", "value": 77.0 - seed}]
            rows += [row | {"name": "loss/actor", "value": -1000.0}]
    for seed, value in (absolute or {}).items():
        row = head | {"seed": seed, "env_steps": steps[-1], "wall_s": 1.0}
        rows += [row | {"name": f"absolute/{headline}", "value": value}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def table_of(file):
    with file.open() as rows:
        return list(csv.DictReader(rows))


def plot_runs(root, **keys):
    """Plot all runs; return the rows of summary.csv, by system and task."""
    plot.main(root, out=root / "out", **{"reps": 20, "formats": ()} | keys)
    rows = table_of(root / "out" / "summary.csv")
    return {(row["system"], row["task"]): row for row in rows}


def lines(root, *arguments):
    return read.pool(read.find([root]), *arguments)


def by_label(root):
    return {line.label: line for line in lines(root)}


def slow_iqm(scores):
    """Return the mean without a quarter of the values, rounded down, at each end."""
    values = sorted(float(x) for row in scores for x in row)
    cut = len(values) // 4
    kept = values[cut : len(values) - cut]
    return sum(kept) / len(kept)


def text_of(figure):
    """Return all words in a figure."""
    found = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return " ".join(" ".join(found).split())


def test_aggregates_of_two_systems_match_values_computed_by_hand(tmp_path):
    # With six scores of two tasks, the IQM leaves out the smallest and the largest.
    write(tmp_path, "magpo", {0: 0.1, 1: 0.2, 2: 0.3}, absolute={0: 0.9, 1: 0.86, 2: 0.84})
    write(tmp_path, "mappo", {0: 0.4, 1: 0.5, 2: 0.6}, absolute={0: 0.95, 1: 0.9, 2: 0.8})
    other = {"task": "8x8-2p-2f-coop"}
    write(tmp_path, "magpo", {0: 0.1, 1: 0.2, 2: 0.3}, absolute={0: 0.5, 1: 0.9, 2: 1.0}, **other)
    write(tmp_path, "mappo", {0: 0.4, 1: 0.5, 2: 0.6}, absolute={0: 0.9, 1: 0.894, 2: 1.0}, **other)
    plot_runs(tmp_path)
    rows = table_of(tmp_path / "out" / "aggregates.csv")
    found = {(row["system"], row["aggregate"]): float(row["point"]) for row in rows}
    assert found["MAGPO", "iqm"] == pytest.approx((0.84 + 0.86 + 0.9 + 0.9) / 4)  # 0.875
    assert found["MAPPO", "iqm"] == pytest.approx((0.894 + 0.9 + 0.9 + 0.95) / 4)  # 0.911
    assert found["MAGPO", "mean"] == pytest.approx((0.9 + 0.86 + 0.84 + 0.5 + 0.9 + 1.0) / 6)
    assert found["MAGPO", "median"] == pytest.approx(((0.86 + 0.84 + 0.9) / 3 + 2.4 / 3) / 2)
    assert found["MAPPO", "optimality_gap"] == pytest.approx(1 - 5.444 / 6)


def test_aggregates_match_the_slow_model():
    generator = np.random.default_rng(3)
    scores = {
        "A": {t: generator.random(5) for t in "xyz"},
        "B": {t: generator.random(7) for t in "xy"},
    }
    found = aggregate.aggregates(scores, 400)
    for label, tasks in scores.items():
        point, low, high = (dict(zip(aggregate.AGGREGATES, x, strict=True)) for x in found[label])
        assert np.isclose(point["iqm"], slow_iqm(tasks.values()))
        assert np.isclose(point["mean"], np.mean(list(tasks.values())))
        assert np.isclose(point["median"], np.median([x.mean() for x in tasks.values()]))
        assert np.isclose(point["optimality_gap"], 1 - point["mean"])  # no score above 1
        assert all(low[name] < point[name] < high[name] for name in point)


def test_the_bootstrap_resamples_within_each_task():
    # Each task's seeds agree, so resampling within tasks changes nothing; across tasks it would.
    constant = np.array([[0.0, 0.25, 1.0]] * 4)
    assert aggregate.estimate(np.mean, [constant], 100) == pytest.approx((1.25 / 3,) * 3)
    # Two tasks resampled separately have an interval 1 / sqrt(2) as wide as that of one.
    x = np.linspace(0, 1, 30)[:, None]
    wide = np.subtract(*aggregate.estimate(np.mean, [x], 4000)[1:])
    narrow = np.subtract(*aggregate.estimate(np.mean, [np.hstack([x, x])], 4000)[1:])
    assert narrow / wide == pytest.approx(0.5**0.5, rel=0.06)
    assert wide == pytest.approx(-2 * 1.96 * x.std() / 30**0.5, rel=0.06)


def test_probability_of_improvement():
    equal = np.array([0.25, 0.5, 0.75])
    scores = {
        "A": {"x": equal + 1, "y": equal + 1},
        "B": {"x": equal, "y": equal},
        "C": {"x": equal[::-1].copy(), "z": equal},
    }
    found = aggregate.improvement(scores, 200)
    assert found["A", "B"] == (1, 1, 1)
    assert found["B", "C"].point == 0.5 and found["A", "C"].point == 1
    assert found["B", "C"].low < 0.5 < found["B", "C"].high


def test_the_fast_probability_of_improvement_equals_rliables():
    metric = pytest.importorskip("rliable.metrics").probability_of_improvement
    generator = np.random.default_rng(1)
    for sizes in ((3, 2), (6, 4), (1, 5)):
        x, y = (generator.integers(3, size=(n, 4)) / 2 for n in sizes)  # with ties
        assert np.isclose(aggregate.beats(x, y), metric(x, y))


def test_systems_without_a_task_in_common_are_not_compared():
    scores = {"A": {"x": np.ones(2)}, "B": {"y": np.ones(2)}}
    assert aggregate.improvement(scores, 10) == {}


def test_a_profile_is_the_share_of_scores_above_each_threshold():
    scores = {"A": {"x": np.array([0.0, 0.255]), "y": np.array([0.5, 1.0])}}
    point, low, high = aggregate.profiles(scores, 200)["A"]
    at = dict(zip(aggregate.THRESHOLDS.round(2).tolist(), point.tolist(), strict=True))
    assert (at[0.0], at[0.25], at[0.26], at[0.5], at[0.99]) == (0.75, 0.75, 0.5, 0.25, 0.25)
    assert at[1.0] == 0
    assert (low <= point).all() and (point <= high).all() and low[10] == 0.5 and high[10] == 1


def test_the_iqm_over_steps_interpolates_between_a_tasks_evaluations(tmp_path):
    finals = {0: 0.2, 1: 0.6, 2: 0.8, 3: 1.0}
    write(tmp_path, "magpo", finals)
    write(tmp_path, "magpo", dict.fromkeys(range(4), 0.4), task="x", steps=(0, 500, 1500))
    (steps, found), *_ = aggregate.over_steps(lines(tmp_path), 50).values()
    assert steps.tolist() == [0, 500, 1000, 1500]  # the other task has one more evaluation
    for k, step in enumerate(steps):
        scores = [[final * step / 2000 for final in finals.values()], [0.4 * step / 2000] * 4]
        assert np.isclose(found.point[k], slow_iqm(scores))
    assert (found.low <= found.point).all() and found.low[3] < found.high[3]


def test_seeds_of_several_runs_are_pooled_and_the_newest_counts(tmp_path):
    write(tmp_path, "magpo", {0: 0.1, 1: 0.2}, name="2026-01-02")
    write(tmp_path, "magpo", {1: 0.6, 2: 0.9}, name="2026-01-10")
    (line,) = by_label(tmp_path).values()
    assert line.label == "MAGPO"
    np.testing.assert_allclose(line.values[-1], [0.1, 0.6, 0.9])
    assert line.steps.tolist() == list(STEPS)


def test_a_run_found_twice_counts_once(tmp_path):
    write(tmp_path, "magpo", {0: 0.1})
    assert len(read.find([tmp_path, tmp_path / "magpo"])) == 1


def test_different_settings_get_separate_lines(tmp_path):
    write(tmp_path, "magpo", {0: 0.1}, name="a", lr=0.5, kl=1)
    write(tmp_path, "magpo", {1: 0.2}, name="b", lr=0.5, kl=1)
    write(tmp_path, "magpo", {0: 0.8}, name="c", lr=0.25, kl=1)
    write(tmp_path, "mappo", {0: 0.3}, name="d", lr=0.125)
    found = by_label(tmp_path)
    assert set(found) == {"MAGPO (lr=0.5)", "MAGPO (lr=0.25)", "MAPPO"}
    np.testing.assert_allclose(found["MAGPO (lr=0.5)"].values[-1], [0.1, 0.2])
    np.testing.assert_allclose(found["MAGPO (lr=0.25)"].values[-1], [0.8])


def test_a_curve_ends_with_its_shortest_seed(tmp_path):
    write(tmp_path, "magpo", {0: 0.4}, name="a")
    folder = write(tmp_path, "magpo", {1: 0.8}, name="b", steps=(0, 1000))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"run": "b", "system": "magpo", "name": "eval/epi')  # still being written
    (line,) = by_label(tmp_path).values()
    assert line.steps.tolist() == [0, 1000]
    np.testing.assert_allclose(line.values, [[0, 0], [0.2, 0.4]])


def test_systems_that_ended_early_are_marked_in_the_aggregates(tmp_path, capsys):
    write(tmp_path, "magpo", {0: 0.4}, steps=(0, 1000))
    write(tmp_path, "mappo", {0: 0.4})
    labels = ["MAGPO", "MAPPO"]
    assert draw.marked(labels, lines(tmp_path)) == {"MAGPO": "MAGPO†", "MAPPO": "MAPPO"}
    write(tmp_path, "sable", {0: 0.4}, steps=(0, 1990))  # rounded to whole chunks
    assert draw.marked(["Sable"], lines(tmp_path)) == {"Sable": "Sable"}
    plot_runs(tmp_path)
    assert "1000 to 2000 steps" in capsys.readouterr().err


def test_the_last_evaluation_replaces_an_absolute_metric_that_some_seed_lacks(tmp_path, capsys):
    write(tmp_path, "magpo", {0: 0.4, 1: 0.6}, absolute={0: 0.9, 1: 0.8})
    write(tmp_path, "mappo", {0: 0.4, 1: 0.6}, absolute={0: 0.9})
    found = plot_runs(tmp_path)
    assert found["MAGPO", TASK]["scores"] == "absolute metric"
    assert float(found["MAGPO", TASK]["mean"]) == pytest.approx(0.85)
    assert found["MAPPO", TASK]["scores"] == "last evaluation"
    assert float(found["MAPPO", TASK]["mean"]) == pytest.approx(0.5)
    assert (
        "no absolute metric, the last evaluation is used: MAPPO on lbf" in capsys.readouterr().err
    )
    pooled = lines(tmp_path)
    scores = aggregate.normalised(pooled)
    colours = draw.colours_of(pooled)
    words = text_of(draw.aggregates(aggregate.aggregates(scores, 5), pooled, colours))
    assert "MAPPO* " in words and "MAGPO " in words
    assert (
        "absolute metric (320 episodes per seed); * no absolute metric: the last evaluation"
        in words
    )
    only = [line for line in pooled if line.label == "MAPPO"]
    words = text_of(draw.profiles(aggregate.profiles({"MAPPO": scores["MAPPO"]}, 5), only, colours))
    assert "last evaluation, because no run has an absolute metric" in words and "*" not in words


def test_a_seed_run_again_has_the_newest_runs_absolute_metric_or_none(tmp_path):
    write(tmp_path, "magpo", {0: 0.1, 1: 0.2}, name="a", absolute={0: 0.7, 1: 0.8})
    write(tmp_path, "magpo", {1: 0.3}, name="b", absolute={1: 0.9})
    assert by_label(tmp_path)["MAGPO"].score.tolist() == [0.7, 0.9]
    write(tmp_path, "magpo", {1: 0.4}, name="c")
    np.testing.assert_allclose(by_label(tmp_path)["MAGPO"].score, [0.1, 0.4])


def test_win_rates_and_lbf_are_normalised_by_their_own_bounds(tmp_path):
    write(tmp_path, "magpo", {0: 0.875, 1: 0.875}, absolute={0: 0.875, 1: 0.875})
    write(tmp_path, "other", {0: 0.911, 1: 0.911})
    write(tmp_path, "other", {0: 0.25, 1: 0.5}, suite="smax", task="3m")
    suites = {line.suite: [] for line in lines(tmp_path)}
    for line in lines(tmp_path):
        suites[line.suite].append(line)
    scores = aggregate.normalised(suites["lbf"])
    np.testing.assert_allclose(scores["MAGPO"][TASK], [0.875] * 2)
    np.testing.assert_allclose(scores["OTHER"][TASK], [0.911] * 2)
    np.testing.assert_allclose(aggregate.normalised(suites["smax"])["OTHER"]["3m"], [0.25, 0.5])
    assert f"the task's own bounds, 0 to 1 ({TASK})" in draw.bounds_in_words(suites["lbf"])


def test_other_bounds_are_the_extremes_of_all_runs_and_are_printed(tmp_path):
    task = {"suite": "coordsum", "task": "3x10-30"}  # MAGPO published: 153.13
    write(tmp_path, "magpo", {0: 40.0, 1: 80.0}, absolute={0: 50.0, 1: 90.0}, **task)
    write(tmp_path, "mappo", {0: -20.0, 1: 20.0}, **task)
    write(tmp_path, "mappo", {0: 0.0, 1: 0.0}, suite="coordsum", task="constant")
    pooled = lines(tmp_path)
    scores = aggregate.normalised(pooled)  # of -20 .. 90
    np.testing.assert_allclose(scores["MAGPO"]["3x10-30"], [70 / 110, 1])
    np.testing.assert_allclose(scores["MAPPO"]["3x10-30"], [0, 40 / 110])
    assert scores["MAPPO"]["constant"].tolist() == [0, 0]
    words = text_of(
        draw.over_steps(aggregate.over_steps(pooled, 5), pooled, draw.colours_of(pooled))
    )
    assert "smallest and largest evaluation of all runs (3x10-30: -20 to 90" in words
    # Evaluations that other seeds do not have yet count, too.
    write(tmp_path, "mappo", {2: -60.0}, **task, name="b", steps=(0, 2000, 4000))
    assert aggregate.bounds(lines(tmp_path))["3x10-30"][:2] == (-120, 90)


def test_rewards_beyond_a_tasks_own_bounds_replace_them(tmp_path):
    write(tmp_path, "magpo", {0: 1.0}, absolute={0: 1.0000001})  # a rounding error
    assert aggregate.bounds(lines(tmp_path))[TASK] == (0, 1, True)
    write(tmp_path, "mappo", {0: 3.0})
    assert aggregate.bounds(lines(tmp_path))[TASK] == (0, 3, False)


def test_suites_without_the_metric_are_left_out_with_a_note(tmp_path, capsys):
    write(tmp_path, "magpo", {0: 0.25}, suite="smax", task="3m")
    write(tmp_path, "magpo", {0: 0.25})
    assert set(plot_runs(tmp_path, metric="win_rate")) == {("MAGPO", "3m")}
    assert "left out, no win_rate: lbf" in capsys.readouterr().err


def test_another_metric_can_be_plotted(tmp_path):
    write(
        tmp_path, "magpo", {0: 0.25, 1: 0.5}, suite="smax", task="5m_vs_6m", absolute={0: 1, 1: 1}
    )
    (line,) = lines(tmp_path)
    assert line.metric == "win_rate" and line.reference.mean == 0.34
    (line,) = lines(tmp_path, "episode_length")
    assert line.values.tolist() == [[77, 76]] * 3 and line.extremes == (76, 77)
    assert line.absolute is None and line.reference is None  # published is the win rate


def test_systems_appear_in_the_requested_order(tmp_path):
    for system in ("ctds", "magpo", "mappo", "sable"):
        write(tmp_path, system, {0: 0.5})
    pooled = lines(tmp_path, None, ["sable", "magpo"])
    order = ["Sable", "MAGPO", "CTDS", "MAPPO"]
    assert list(draw.colours_of(pooled)) == order
    assert draw.colours_of(pooled)["Sable"] == draw.COLOURS[0]
    assert list(aggregate.normalised(pooled)) == order
    assert " & ".join(order) in "\n".join(table.latex(pooled))
    entries = draw.task(pooled, draw.colours_of(pooled)).legends[0].get_texts()
    assert [entry.get_text().split(",")[0] for entry in entries[:4]] == order


def test_the_published_line_names_table_and_steps(tmp_path):
    write(tmp_path, "magpo", {0: 0.5}, suite="smax", task="5m_vs_6m")
    pooled = lines(tmp_path)
    words = text_of(draw.task(pooled, draw.colours_of(pooled)))
    assert "published: MAGPO, Table 1, after 20M steps" in words
    folder = write(tmp_path / "other", "magpo", {0: 0.5}, suite="smax", task="5m_vs_6m")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("published: true", "published: false"))
    pooled = lines(tmp_path / "other")
    assert "published" not in text_of(draw.task(pooled, draw.colours_of(pooled)))


def test_published_values_are_in_the_runs_units(tmp_path):
    def run(system, suite, task, **settings):
        gpae = {"advantage": "gpae", "trace": "dt", "eta": 1.05} if system == "gpae_mappo" else {}
        dotted = {f"system.{key}": value for key, value in (gpae | settings).items()}
        settings = {"run.published": True} | dotted
        row = read.reference_of(read.Run(system, suite, task, "a", settings, 320, {}, {}))
        return row and (row.mean, row.std, row.source)

    assert run("magpo", "smax", "3s5z_vs_3s6z")[:2] == (0.95, 0.02)
    off = run("gpae_mappo", "smax", "5m_vs_6m", reuse=4)
    assert off[:2] == pytest.approx((0.937, 0.01)) and off[2].startswith("GPAE")
    assert run("gpae_mappo", "smax", "5m_vs_6m", reuse=1)[:2] == pytest.approx((0.088, 0.009))
    assert run("gpae_mappo", "mabrax", "humanoid-9-8", reuse=4)[:2] == (445, 4)
    ablation = run("gpae_mappo", "smax", "5m_vs_6m", reuse=4, trace="st")
    assert ablation == (0.444, None, "GPAE, Table 3")
    assert run("gpae_mappo", "smax", "5m_vs_6m", reuse=1, trace="st") is None
    assert run("gpae_mappo", "smax", "5m_vs_6m", reuse=1, advantage="gae")[0] == 0.031
    assert run("gpae_mappo", "mabrax", "ant-4x2", reuse=1, advantage="gae")[:2] == (1379, 124)
    other_game = {"run.published": False, "run.system": "magpo", "run.env": "smax/3s5z_vs_3s6z"}
    assert published.find(other_game) is None
    assert run("magpo", "lbf", "of-my-own") is None


def test_the_summary_has_means_intervals_and_published_values(tmp_path):
    finals = {seed: 0.1 * seed for seed in range(6)}
    write(tmp_path, "magpo", finals)
    write(tmp_path, "gpae_mappo", {3: 0.5, 4: 0.75}, suite="smax", task="5m_vs_6m", **OFF)
    write(tmp_path, "mine", {0: 0.5}, suite="smax", task="5m_vs_6m")
    found = plot_runs(tmp_path)
    many = found["MAGPO", TASK]
    assert (many["suite"], many["seeds"], many["env_steps"]) == ("lbf", "6", "2000")
    assert float(many["mean"]) == pytest.approx(0.25)
    assert 0.1 < float(many["low"]) < 0.2 < 0.3 < float(many["high"]) < 0.4
    assert "95 %" in many["low_to_high"]
    assert (float(many["published_mean"]), float(many["published_std"])) == (1, 0)
    few = found["GPAE-MAPPO", "5m_vs_6m"]
    assert [float(few[key]) for key in ("mean", "low", "high")] == [0.625, 0.5, 0.75]
    assert "smallest" in few["low_to_high"]
    assert float(few["published_mean"]) == pytest.approx(0.937)
    one = found["MINE", "5m_vs_6m"]
    empty = ("low", "high", "low_to_high", "published_mean", "published_std", "published_in")
    assert [one[key] for key in empty] == [""] * 6
    assert (many["scores"], one["metric"]) == ("last evaluation", "win_rate")
    assert float(few["std"]) == pytest.approx(0.125 * 2**0.5, rel=1e-5)


def test_the_latex_table(tmp_path):
    write(
        tmp_path,
        "magpo",
        {0: 0.5, 1: 0.75},
        suite="smax",
        task="5m_vs_6m",
        absolute={0: 0.75, 1: 1},
    )
    write(tmp_path, "mappo", {0: 0.875}, suite="smax", task="5m_vs_6m")
    write(tmp_path, "gpae_mappo", {0: 0.5}, suite="smax", task="5m_vs_6m", **OFF | {"trace": "st"})
    write(tmp_path, "a_b", {0: 0.25}, suite="smax", task="100%")
    plot_runs(tmp_path)
    text = (tmp_path / "out" / "table.tex").read_text()
    assert text.count("\\begin{tabular}{llrrrr}") == text.count("\\end{tabular}") == 1
    assert all(f"\\{name}rule" in text for name in ("top", "mid", "bottom"))
    rows = [re.split(r" & | \\\\", row) for row in text.splitlines() if " & " in row]
    assert all(len(row) == 7 for row in rows)
    assert rows[0][2:6] == ["A-B", "GPAE-MAPPO", "MAGPO", "MAPPO"]
    assert rows[1][:6] == ["smax/100\\%", "ours, 1 seed", "$\\mathbf{0.25}^*$", "--", "--", "--"]
    assert rows[2][:3] == ["smax/5m\\_vs\\_6m", "ours, 1 to 2 seeds", "--"]
    best = ["$\\mathbf{0.88 \\pm 0.18}$", "$\\mathbf{0.88}^*$"]  # equal as printed
    assert rows[2][3:6] == ["$0.50^*$", *best]
    assert rows[3][1:6] == ["GPAE, Table 3, 10M steps", "--", "$0.44$", "--", "--"]
    magpo = ["MAGPO, Table 1, 20M steps", "--", "--", r"$0.34 \pm 0.35$", r"$0.28 \pm 0.37$"]
    assert rows[4][1:6] == magpo
    assert len(rows) == 5
    label = lines(tmp_path)[0]._replace(label="A (x_y=50%)")
    assert "A (x\\_y=50\\%)" in "\n".join(table.latex([label]))


def test_pictures_are_written_in_every_format(tmp_path):
    write(tmp_path, "magpo", {0: 0.4, 1: 0.5})
    write(tmp_path, "mappo", {0: 0.4})
    write(tmp_path, "magpo", {0: 0.5}, suite="connector", task="con-5x5x3a")
    plot_runs(tmp_path, formats=("png", "pdf", "svg"))
    kinds = ("aggregates", "profiles", "iqm_over_steps")
    names = {f"{kind}_{suite}" for kind in kinds for suite in ("lbf", "connector")}
    names |= {f"lbf_{TASK}", "connector_con-5x5x3a"}
    names |= {"probability_of_improvement_lbf"}  # nothing to compare on connector
    starts = {".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF-", ".svg": b"<?xml"}
    files = [file for file in (tmp_path / "out").iterdir() if file.suffix in starts]
    assert {file.name for file in files} == {name + suffix for name in names for suffix in starts}
    for file in files:
        data = file.read_bytes()
        assert data.startswith(starts[file.suffix]) and len(data) > 5_000
        if file.suffix == ".png":
            width, height = struct.unpack(">II", data[16:24])
            assert width > 1000 and height > 250
        if file.suffix == ".pdf":
            assert b"/Type3" not in data


def test_the_command_line_accepts_several_folders(tmp_path, monkeypatch):
    for system in ("magpo", "mappo", "sable"):
        write(tmp_path, system, {0: 0.4})
    words = [
        str(tmp_path / "magpo"),
        str(tmp_path / "sable"),
        f"out='{tmp_path}/out'",
        "formats=[]",
    ]
    monkeypatch.setattr(sys, "argv", ["plot", *words, "reps=5", "order=[sable]"])
    commands.run(plot.__doc__, plot.main)
    rows = table_of(tmp_path / "out" / "summary.csv")
    assert [row["system"] for row in rows] == ["Sable", "MAGPO"]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".png"] == []


@pytest.mark.parametrize("wrong", ["missing", "empty", "untrained", "no config", "garbage"])
def test_bad_input_gives_a_one_line_error(wrong, tmp_path, error_of):
    root = tmp_path / "results"
    if wrong != "missing":
        root.mkdir()
    if wrong == "untrained":
        write(root, "magpo", {0: 0.4}, steps=())
    if wrong == "no config":
        (write(root, "magpo", {0: 0.4}) / "config.yaml").unlink()
    if wrong == "garbage":
        (write(root, "magpo", {0: 0.4}) / "metrics.jsonl").write_text('"eval/episode_return"\n')
    assert str(root) in error_of(plot, root, f"out='{tmp_path / 'out'}'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("metrics.jsonl", b'"run"', b'"\xff"'),
        ("metrics.jsonl", b'"value": 0.4', b'"value": "x"'),
        ("metrics.jsonl", b'"value": 0.4', b'"value": [1]'),
        ("metrics.jsonl", b'"value": 0.4', b'"value": NaN'),
        ("metrics.jsonl", b'"seed": 0', b'"seed": "x"'),
        ("metrics.jsonl", b'"seed": 0', b'"seed": null'),
        ("metrics.jsonl", b'"env_steps": 0', b'"env_steps": "x"'),
        ("metrics.jsonl", b'"env_steps": 0', b'"env_steps": 0.5'),
        ("metrics.jsonl", b'"env": "lbf"', b'"env": 3'),
        ("metrics.jsonl", b'"seed": 0', b'"seed": ' + b"[" * 100_000),
        ("config.yaml", b"eval_episodes: 32", b"eval_episodes: x"),
        ("config.yaml", b"system:", b"- system"),
        ("config.yaml", b"num_envs: ", b"num_envs: " + b"[" * 3000),
        ("config.yaml", b"num_envs: 4", b"num_envs: &a {b: *a}"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_a_damaged_file_is_named_in_a_one_line_error(name, old, new, tmp_path, error_of):
    file = write(tmp_path, "magpo", {0: 0.4}) / name
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))
    line = error_of(plot, tmp_path, f"out='{tmp_path / 'out'}'")
    assert str(file.parent) in line and name in line


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (
            "metric=episode_lenght",
            "metric: no run has 'episode_lenght': did you mean 'episode_length'",
        ),
        ("metric=x", "metric: no run has 'x': there are episode_length, episode_return"),
        ("order=[mago]", "order: no run has 'mago': did you mean 'magpo'? there are magpo"),
        ("order=[magpo,happo]", "order: no run has 'happo'"),
        ("order=magpo", "order must be a list"),
        ("formats=[png,jpg]", "formats.1 must be 'png', 'pdf' or 'svg', not 'jpg'"),
        ("reps=0", "reps must be greater than 0"),
        ("metrics=win_rate", "unknown key 'metrics': did you mean 'metric'?"),
    ],
)
def test_a_wrong_key_gives_a_one_line_error(key, line, tmp_path, error_of):
    write(tmp_path, "magpo", {0: 0.4})
    assert line in error_of(plot, tmp_path, f"out='{tmp_path / 'out'}'", key)
    assert not (tmp_path / "out").exists()


def test_a_figure_that_cannot_be_written_gives_a_one_line_error(tmp_path, error_of):
    write(tmp_path, "magpo", {0: 0.4})
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / f"lbf_{TASK}.png").mkdir(parents=True)
    for out in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "out"):
        assert f"{out} cannot be written" in error_of(plot, tmp_path, f"out='{out}'", "reps=5")


def test_without_rliable_the_command_says_how_to_install_it(tmp_path, error_of, monkeypatch):
    write(tmp_path, "magpo", {0: 0.4})
    monkeypatch.setitem(sys.modules, "rliable", None)
    monkeypatch.setitem(sys.modules, "rliable.metrics", None)
    line = error_of(plot, tmp_path, f"out='{tmp_path / 'out'}'")
    assert "pip install 'magpo[plot]'" in line and not (tmp_path / "out").exists()


def test_a_damaged_marl_eval_json_changes_nothing(tmp_path):
    folder = write(tmp_path, "magpo", {0: 0.4}, absolute={0: 0.75})
    (folder / "marl_eval.json").write_text('{"lbf": [')
    assert float(plot_runs(tmp_path)["MAGPO", TASK]["mean"]) == 0.75
