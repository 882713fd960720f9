"""Published rows: trained, interrupted and resumed, collected, listed, reported."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from reading import table_of

from magpo import config, published
from magpo.envs import registry
from magpo.reproduce import __main__ as reproduce
from magpo.reproduce import report, results
from magpo.reproduce.results import Seed
from magpo.runs import folders

ROOT = Path(__file__).parents[1]
TINY = (
    "mappo env=coordsum/3x10-30 published=true tuned=false env.time_limit=5 num_envs=4 "
    "rollout_length=16 total_steps=32000 num_evaluations=100 eval_episodes=2 "
    "network.actor.hidden_dim=8 network.critic.hidden_dim=8"
)
SHORT = TINY.replace("32000 num_evaluations=100", "128 num_evaluations=2")
TASK = "coordsum/3x10-30"
ROWS = [
    ("magpo", "1", "coordsum", "3x10-30", "mappo", "6.00", "1.50", TINY, "paper"),
    ("gpae", "2", "coordsum", "3x10-30", "off", "9", "2", f"{SHORT} system.gamma=0.9", "gpae"),
    ("gpae", "3", "coordsum", "3x10-30", "off", "9", "", f"{SHORT} system.gamma=0.9", "gpae"),
]
QUIET = ("logger.plot=false", "logger.console=false", "checkpoint_share=1")
FACTS = dict.fromkeys(results.FACTS, "")
IN_THIS_TABLE = (
    "from pathlib import Path; from magpo import commands, published; "
    "published.TABLE = Path({table!r}); from magpo.reproduce import __main__ as main; "
    "commands.run(main.__doc__, main.main)"
)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Replace the published table with one of tiny rows; work in an empty folder."""
    file = tmp_path / "published.csv"
    columns = ("paper", "table", "suite", "task", "system", "mean", "std", "command", "budget")
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *ROWS])
    monkeypatch.setattr(published, "TABLE", file)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    published.rows.cache_clear()
    yield file
    published.rows.cache_clear()


@pytest.fixture
def call(output_of):
    """Return a function that calls `magpo.reproduce` with `out=out` and returns its output."""
    return partial(output_of, reproduce, "out=out")


def values(file, kind):
    """Return a CSV's evaluations or absolute metrics, as `kind` says, by seed."""
    found = {}
    for line in table_of(file):
        if line["name"].startswith(f"{kind}/"):
            found.setdefault(int(line["seed"]), []).append(float(line["value"]))
    return found


def state(listing, system):
    (line,) = [line for line in listing.splitlines() if re.search(rf"\b{system}\b.*±", line)]
    return line


def interrupt(process, folder):
    """Send SIGTERM once the first chunk is trained and saved."""
    deadline = time.monotonic() + 120
    while not list(folder.glob("*/checkpoints/0*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)  # not to the run's process, which has its own group


def test_a_row_is_interrupted_resumed_and_not_run_again(table, call):
    code = IN_THIS_TABLE.format(table=str(table))
    row = ["coordsum/3x10-30", "mappo", *QUIET]
    with subprocess.Popen([sys.executable, "-c", code, "out=out", *row]) as process:
        interrupt(process, Path("results/reproduce/mappo/coordsum/3x10-30"))
        assert process.wait() == 128 + signal.SIGTERM
    (file,) = Path("out").rglob("*.csv")
    assert file == Path("out/magpo/coordsum_3x10-30/mappo.csv")
    assert not values(file, "absolute")
    some = values(file, "eval")[0]
    assert 2 <= len(some) < 101
    steps = f"{(len(some) - 1) * 320:,}"
    assert f"interrupted at {steps} steps" in state(call(), "mappo")
    assert f"unfinished at {steps} steps" in call("--report")

    call(*row)
    (folder,) = Path("results/reproduce/mappo/coordsum/3x10-30").iterdir()
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kinds = {"eval": [], "absolute": []}
    for record in records:
        kind, _, name = record["name"].partition("/")
        if name == "episode_return" and kind in kinds:
            kinds[kind].append(record["value"])
    assert len(kinds["eval"]) == 101 and kinds["eval"][: len(some)] == some
    assert {kind: values(file, kind)[0] for kind in kinds} == kinds
    facts = {line["name"]: line["value"] for line in table_of(file) if not line["env_steps"]}
    assert tuple(facts) == results.FACTS and all(facts.values())
    assert facts["command"] == f"python -m magpo.systems.{TINY} seeds=[0]"
    assert facts["steps"] == "32000" and facts["devices"] == "1 x cpu"
    assert "done, 1 seed" in state(call(), "mappo")
    assert f"{kinds['absolute'][0]:.2f}" in state(call(), "mappo")

    before = file.read_bytes()
    call(*row)
    assert file.read_bytes() == before
    assert list(folder.parent.iterdir()) == [folder]


def test_only_missing_seeds_are_trained_and_tables_share_a_run(table, call, monkeypatch):
    call(TASK, "paper=gpae", "seeds=[0,4]", *QUIET)
    call(TASK, "off", "seeds=[4,7,9]", *QUIET)
    folders_ = sorted(Path("results/reproduce/mappo", TASK).iterdir())
    seeds = [yaml.safe_load((folder / "config.yaml").read_text())["seeds"] for folder in folders_]
    assert seeds == [[0, 4], [7, 9]]
    (file,) = Path("out").rglob("*.csv")
    assert {seed: len(found) for seed, found in values(file, "eval").items()} == {
        0: 3,
        4: 3,
        7: 3,
        9: 3,
    }

    last = f"{np.mean([found[-1] for found in values(file, 'eval').values()]):.0f}"
    printed = [line for line in call("--report").splitlines() if f"| {TASK} | off |" in line]
    assert [line.strip("| ").split(" | ")[2:] for line in printed] == [
        [last, "9 ± 2", "below", "4", "128", "-"],
        [last, "9", "-", "4", "128", "-"],
    ]

    with folders.working(folders_[1]):  # as if the run were still training
        assert f"another process trains it: {folders_[1]}" in call(TASK, "off", "seeds=[7]", *QUIET)

    monkeypatch.setattr(sys, "executable", "false")  # a run that fails
    with pytest.raises(SystemExit) as stop:
        call(TASK, "off", "seeds=[8]", *QUIET)
    assert stop.value.code == 1
    assert sorted(values(file, "absolute")) == [0, 4, 7, 9]

    assert "no runs of these rows" in call("--collect", "results_dir=elsewhere")
    file.unlink()
    call("--collect")
    assert sorted(values(file, "absolute")) == [0, 4, 7, 9]


@pytest.mark.parametrize(
    ("change", "belongs"),
    [
        ({"seeds": [5], "seeds_per_batch": 1, "logger": {}, "keep": 9}, True),
        ({"system.of_another_version": 1}, True),
        ({"system.gae_lambda": None}, True),  # None: a version without this key
        ({"system.gamma": None}, False),  # but the command sets it
        ({"system.gae_lambda": 0.5}, False),
        ({"vary": {"system.gae_lambda": [0.5, 0.9]}}, False),
        ({"total_steps": 256}, False),
        ({"precision": "bfloat16"}, False),
        ({"env.opponent_history": "other"}, False),
        ({"run.published": None}, False),
    ],
    ids=str,
)
def test_a_run_is_matched_to_a_row_by_its_configuration(table, call, change, belongs):
    row = results.rows()["gpae", TASK, "off"]
    flat = config.flat(config.dump(config.load(row.command[0], row.command[1:])))
    flat |= {"vary": {}} | change
    folder = Path("results/mappo", TASK, "1")
    folder.mkdir(parents=True)
    kept = config.nested({name: value for name, value in flat.items() if value is not None})
    (folder / "config.yaml").write_text(yaml.safe_dump(kept))
    assert [run.folder for run in results.runs(row.command, "results")] == [folder] * belongs
    reported = f"runs in results that belong to no row: 1, such as {folder}" in call(
        "results_dir=results"
    )
    assert reported != belongs


def seed(*values, absolute=None, **facts):
    records = [(i * 64, "eval/episode_return", value) for i, value in enumerate(values)]
    if absolute is not None:
        records.append((64, "absolute/episode_return", absolute))
    return Seed(FACTS | facts, records)


def test_a_csv_keeps_the_longest_run_of_each_seed():
    old = {0: seed(1.0, 2.0, absolute=3.0), 1: seed(1.0), 2: seed(1.0, hours="1"), 3: seed(1.0)}
    new = {0: seed(4.0, 5.0), 1: seed(4.0, 5.0), 2: seed(1.0, hours="2"), 4: seed(6.0)}
    assert results.merged(old, new) == {0: old[0], 1: new[1], 2: old[2], 3: old[3], 4: new[4]}
    again = {0: seed(7.0, 8.0, absolute=9.0)}
    assert results.merged(old, again)[0] == again[0]


def test_a_csv_is_read_as_it_was_written(tmp_path):
    seeds = {7: seed(0.1, -1e-9, absolute=1 / 3, command='a,b "c"'), 10: seed(2.0)}
    results.write(tmp_path / "a.csv", seeds)
    assert results.read(tmp_path / "a.csv") == seeds


def check_report(text, out):
    """Compare every printed row with values computed from the CSVs; return their number."""
    number = 0
    for line in re.findall(r"^\| \w+/.*\|$", text, re.M):
        task, system, ours, _, verdict, num_seeds, steps, _ = line.strip("| ").split(" | ")
        before = text[: text.index(line)]
        paper = re.findall(r"^## (\w+), Table", before, re.M)[-1].lower()
        file = out / paper / task.replace("/", "_") / f"{system}.csv"
        last, absolute = values(file, "eval"), values(file, "absolute")
        shown = absolute if absolute and paper == "magpo" else last
        chosen = [found[-1] for key, found in shown.items() if key in (absolute or last)]
        half_a_digit = 0.5 * 10.0 ** -len(ours.partition(".")[2])
        assert float(ours) == pytest.approx(np.mean(chosen), abs=half_a_digit * 1.001)
        assert int(num_seeds) == len(chosen)
        assert ("unfinished" in verdict) == (not absolute)
        reached = [
            max(
                int(x["env_steps"])
                for x in table_of(file)
                if x["seed"] == str(key) and x["env_steps"]
            )
            for key in (absolute or last)
        ]
        assert int(steps.replace(",", "")) == min(reached)
        number += 1
    return number


def test_the_committed_report_matches_the_committed_csvs():
    out = ROOT / "scripts" / "results" / "published"
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert text == report.markdown(out)
    assert "no finding yet" not in text  # a row outside ± 2 std is explained in findings.csv
    printed = {*re.findall(r"^\| (\w+/\S+ \| \S+) \|", text, re.M)}
    assert check_report(text, out) >= len(printed)
    assert len({*out.glob("*/*/*.csv")}) >= len(printed) or not printed


@pytest.mark.parametrize(
    ("absolutes", "cells"),
    [
        ((4.0, 5.0), "4.50 | 6.00 ± 1.50 | inside | 2 | 64 | -"),
        ((9.0,), "9.00 | 6.00 ± 1.50 | inside | 1 | 64 | -"),
        ((9.004,), "9.00 | 6.00 ± 1.50 | inside | 1 | 64 | -"),
        ((9.006,), "9.01 | 6.00 ± 1.50 | above | 1 | 64 | -"),
        ((2.99,), "2.99 | 6.00 ± 1.50 | below | 1 | 64 | -"),
        ((4.0, None), "4.00 | 6.00 ± 1.50 | inside | 1 | 64 | -"),
        ((None, None), "1.00 | 6.00 ± 1.50 | unfinished at 0 steps | 2 | 0 | -"),
    ],
)
def test_the_report_gives_each_row_a_verdict(table, call, absolutes, cells):
    row = results.rows()["magpo", TASK, "mappo"]
    seeds = {
        i: seed(1.0, *[2.0] * (value is not None), absolute=value)
        for i, value in enumerate(absolutes)
    }
    results.write(results.path(Path("out"), row), seeds)
    text = call("--report")
    assert f"| {TASK} | mappo | {cells} |\n" in text
    assert ("mappo: no finding yet." in text) == bool({"above", "below"} & {*cells.split()})
    assert check_report(text, Path("out")) == 1
    assert "Not run: 1 rows (coordsum 1)." in text

    Path("out/findings.csv").write_text(f"paper,task,system,finding\nmagpo,{TASK},mappo,because\n")
    assert f"\n- {TASK}, mappo: because\n" in call("--report")


def test_rows_of_five_seeds_have_an_interval(table, call):
    row = results.rows()["magpo", TASK, "mappo"]
    scores = np.array([1.0, 2.0, 4.0, 8.0, 9.0])
    for number, interval in ((4, False), (5, True)):
        seeds = {i: seed(0.0, absolute=score) for i, score in enumerate(scores[:number])}
        results.write(results.path(Path("out"), row), seeds)
        found = re.search(r" \| ([\d.]+) to ([\d.]+) \|\n", call("--report"))
        assert bool(found) == interval
    draws = np.random.default_rng(5).choice(scores, (100_000, 5)).mean(1)
    assert list(map(float, found.groups())) == pytest.approx(
        np.percentile(draws, [2.5, 97.5]), abs=0.3
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["coordsum/3x10-31"],
            "no published row or ablation 'coordsum/3x10-31': did you mean 'coordsum/3",
        ),
        (
            [TASK, "mapo"],
            "has no row 'mapo': did you mean 'mappo'? allowed: mappo, off",
        ),
        ([TASK, "mappo", "paper=gpae"], f"{TASK} has no row 'mappo': allowed: off"),
        ([TASK, "paper=mapgo"], "paper must be 'magpo' or 'gpae'"),
        ([TASK, "system.gamma=0.5"], "system.gamma: cannot be set for a published experiment"),
        ([TASK, "total_steps=64"], "total_steps: cannot be set for a published experiment"),
        ([TASK, "published=false"], "published: cannot be set for a published experiment"),
        (
            [TASK, "seed=[1]"],
            "for a published experiment: did you mean 'seeds'?",
        ),
        ([TASK, "seeds=[1,1]"], "seeds must be one or more different numbers"),
        ([TASK, "seeds=[]"], "seeds must be one or more different numbers"),
        ([TASK, "keep=-1"], "keep must be greater than or equal to 0"),
        (["keep=1"], "keep=1: needs a task"),
        ([TASK, "--report"], "--report takes no rows"),
    ],
    ids=str,
)
def test_bad_arguments_give_a_one_line_error(table, error_of, arguments, line):
    assert line in error_of(reproduce, *arguments)


HEAD = "seed,env_steps,name,value\n"
WHOLE = HEAD + "".join(f"0,,{name},\n" for name in results.FACTS) + "0,0,eval/episode_return,0.5\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("magpo/coordsum_3x10-30/mappo.csv", ""),
        ("magpo/coordsum_3x10-30/mappo.csv", HEAD),
        ("magpo/coordsum_3x10-30/mappo.csv", WHOLE.replace("value", "value,card", 1)),
        ("magpo/coordsum_3x10-30/mappo.csv", WHOLE.replace("0,,jax,\n", "")),
        ("magpo/coordsum_3x10-30/mappo.csv", WHOLE + "0,,card,h100\n"),
        ("magpo/coordsum_3x10-30/mappo.csv", WHOLE + "0,64,eval/episode_return,x\n"),
        ("magpo/coordsum_3x10-30/mappo.csv", WHOLE + "0\n"),
        ("magpo/coordsum_3x10-30/qmix.csv", WHOLE),
        ("magpo/coordsum_3x10/mappo.csv", WHOLE),
        ("findings.csv", f"paper,task,system,finding\nmagpo,{TASK},qmix,because\n"),
        ("findings.csv", "paper,task,finding\nmagpo,a/b,because\n"),
    ],
)
def test_malformed_results_give_a_one_line_error(table, error_of, file, text):
    path = Path("out", file)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert str(path) in error_of(reproduce, "out=out", "--report")
    if file != "findings.csv":
        assert str(path) in error_of(reproduce, "out=out", TASK, "mappo")  # before it trains


def test_a_damaged_log_gives_a_one_line_error(table, error_of):
    row = results.rows()["magpo", TASK, "mappo"]
    folder = Path("results/reproduce/mappo", TASK, "1")
    folder.mkdir(parents=True)
    values = config.dump(config.load(row.command[0], row.command[1:]))
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "metrics.jsonl").write_text('{"name": "eval/episode_return", "env_steps": 3}\n')
    assert "metrics.jsonl: line 1 is not a record" in error_of(reproduce, "out=out", "--collect")


def test_the_headline_metrics_match_the_environments(table):
    for suite, name in registry.SUITES.items():
        if suite != "mabrax":  # needs brax
            module = import_module(f"magpo.envs.{suite}")
            row = published.rows()[0]._replace(task=f"{suite}/x")
            (field,) = [f for f in fields(getattr(module, name)) if f.name == "headline"]
            assert row.metric == field.default
