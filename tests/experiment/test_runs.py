"""The list of runs."""

import dataclasses
import json
import sys

import pytest

from experiment.counting import SEEDS, run
from magpo import commands
from magpo.runs import folders, listing

RECORD = '{"name": "eval/episode_return", "env_steps": 5, "value": 2}\n'


@pytest.fixture
def listed(monkeypatch, capsys):
    def call(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["runs", *map(str, arguments)])
        commands.run(listing.__doc__, listing.main)
        return capsys.readouterr().out

    return call


def test_a_run_is_listed_with_its_end_and_how_to_resume_it(config, listed):
    result = run(config)
    folder = result.folder
    (summary,) = listing.summaries(folder.parents[3])
    assert (summary.folder, summary.system, summary.task) == (folder, "counting", "test/count")
    assert (summary.num_members, summary.varied, summary.status) == (len(SEEDS), (), "finished")
    assert summary.steps == summary.total_steps == config.trained_steps
    last = result.measurements[-1].evaluation["episode_return"].mean()
    assert summary.last_return == pytest.approx(last)
    assert summary.resume is None
    assert "finished" in listed(folder.parents[3])

    folders._set_status(folder, "interrupted")
    assert f"python counting.py resume={folder}" in listed(folder.parents[3])
    with folders.working(folder):
        assert "running" in listed(folder.parents[3])
        assert "resume=" not in listed(folder.parents[3])


def test_a_run_listed_from_inside_has_a_name(config, listed, monkeypatch):
    folder = folders.create(config)
    monkeypatch.chdir(folder)
    assert folder.name in listed(".")


def test_a_killed_run_is_stopped(config):
    folder = folders.create(config)
    (folder / "metrics.jsonl").write_text("")
    (summary,) = listing.summaries(folder)
    assert (summary.status, summary.steps, summary.last_return) == ("stopped", 0, None)
    with (folder / "metrics.jsonl").open("w") as file:
        file.write('{"name": "eval/episode_return", "env_steps": 5, "value": 2}\n{"half')
    assert listing.summaries(folder)[0].last_return == 2


def test_what_is_no_run_is_left_out(config, tmp_path, listed):
    folder = folders.create(dataclasses.replace(config, results_dir=str(tmp_path)))
    (folder / "config.yaml").unlink()
    assert listed(tmp_path) == f"no runs under {tmp_path}\n"
    with pytest.raises(SystemExit) as stop:
        listed(tmp_path / "none")
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        listed("x" * 5000)
    assert stop.value.code == 2


def test_the_last_returns_are_found_in_a_log_of_any_length(config, listed):
    folder = folders.create(config)
    other = json.dumps({"name": "loss/policy", "value": 1}) + "\n"
    for rows in (0, 10, 500, 50_000):  # around the ends that are read first
        text = "".join(RECORD.replace("2}", f"{value}}}") for value in (7, 2, 3, 4))
        (folder / "metrics.jsonl").write_text(text + other * rows)
        (summary,) = listing.summaries(folder)
        assert (summary.steps, summary.last_return) == (5, 3)


@pytest.mark.parametrize(
    ("name", "old", "new", "shown"),
    [
        ("config.yaml", "num_envs:", "num_envs: 0\nwas:", "test/count"),
        ("config.yaml", "num_envs:", "num_envs: [2]\nwas:", "test/count"),
        ("config.yaml", "run:", "run: foo\nwas:", "unknown"),
        ("config.yaml", "run:", "run: [", "unknown"),
        ("config.yaml", "run:", "run: !!int ''\nwas:", "unknown"),
        ("config.yaml", "run:", "run: " + "[" * 3000, "unknown"),
        ("config.yaml", "run:", "run: " + "[" * 2_000_000, "unknown"),
        ("config.yaml", "system: counting", "system: 3", "stopped"),
        ("run.json", '"running"', '"[/x]"', "[/x]"),
        ("run.json", '"running"', '"\\ud800\\u001b[2J"', "??[2J"),
        ("run.json", '"running"', "[" * 100_000, "unknown"),
        ("metrics.jsonl", "2}", '"x"}', "stopped"),
        ("metrics.jsonl", "5", "null", "stopped"),
        ("metrics.jsonl", "5", '"x"', "stopped"),
    ],
    ids=lambda text: text[:30],
)
def test_a_damaged_run_is_listed_and_so_are_the_others(
    name, old, new, shown, config, tmp_path, listed
):
    config = dataclasses.replace(config, results_dir=str(tmp_path))
    damaged, intact = folders.create(config), folders.create(config)
    for folder in (damaged, intact):
        (folder / "metrics.jsonl").write_text(RECORD)
    text = (damaged / name).read_text()
    assert text.count(old) == 1
    (damaged / name).write_text(text.replace(old, new))
    rows = {line.split()[0]: line for line in listed(tmp_path).splitlines()[1:3]}
    assert shown in rows[damaged.name]
    assert "stopped" in rows[intact.name] and rows[intact.name].split()[-1] == "2"
