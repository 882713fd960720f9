"""The list of runs."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest

from experiment.counting import HYPER, SEEDS, Config, run
from magpo import commands
from magpo.config import schema
from magpo.config.schema import EnvConfig
from magpo.runs import folders, listing

RECORD = '{"name": "eval/episode_return", "env_steps": 5, "value": 2}\n'


@pytest.fixture
def list_runs(monkeypatch, capsys):
    def call(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["runs", *map(str, arguments)])
        commands.run(listing.__doc__, listing.main)
        return capsys.readouterr().out

    return call


def test_a_run_is_listed_with_its_status_and_how_to_resume_it(config, list_runs):
    result = run(config)
    folder = result.folder
    (summary,) = listing.summaries(folder.parents[3])
    assert (summary.folder, summary.system, summary.task) == (folder, "counting", "test/count")
    assert (summary.num_members, summary.varied, summary.status) == (len(SEEDS), (), "finished")
    assert summary.steps == summary.total_steps == config.trained_steps
    last = result.measurements[-1].evaluation["episode_return"].mean()
    assert summary.last_return == pytest.approx(last)
    assert summary.resume is None
    assert "finished" in list_runs(folder.parents[3])

    folders._set_status(folder, "interrupted")
    assert f"python counting.py resume={folder}" in list_runs(folder.parents[3])
    with folders.working(folder):
        assert "running" in list_runs(folder.parents[3])
        assert "resume=" not in list_runs(folder.parents[3])


def test_a_run_listed_from_inside_its_folder_has_its_name(config, list_runs, monkeypatch):
    folder = folders.create(config)
    monkeypatch.chdir(folder)
    assert folder.name in list_runs(".")


def test_a_killed_run_is_listed_as_stopped(config):
    folder = folders.create(config)
    (folder / "metrics.jsonl").write_text("")
    (summary,) = listing.summaries(folder)
    assert (summary.status, summary.steps, summary.last_return) == ("stopped", 0, None)
    with (folder / "metrics.jsonl").open("w") as file:
        file.write('{"name": "eval/episode_return", "env_steps": 5, "value": 2}\n{"half')
    assert listing.summaries(folder)[0].last_return == 2


def test_folders_without_a_run_are_left_out(config, tmp_path, list_runs):
    folder = folders.create(dataclasses.replace(config, results_dir=str(tmp_path)))
    config_yaml = (folder / "config.yaml").rename(tmp_path / "kept")
    assert list_runs(tmp_path) == f"no runs under {tmp_path}\n"
    (folder / "metrics.jsonl").write_text(RECORD)  # two of its files are enough
    assert "unknown" in list_runs(tmp_path)
    config_yaml.rename(folder / "config.yaml")
    (folder / "run.json").unlink()
    assert "unknown  " in list_runs(tmp_path) and "test/count" in list_runs(tmp_path)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit) as stop:
        list_runs(tmp_path / "none")
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        list_runs("x" * 5000)
    assert stop.value.code == 2


def test_the_last_returns_are_found_in_a_log_of_any_length(config, list_runs):
    folder = folders.create(config)
    other = json.dumps({"name": "loss/policy", "value": 1}) + "\n"
    for rows in (0, 10, 500, 50_000):  # shorter and longer than the part that is read first
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
    name, old, new, shown, config, tmp_path, list_runs
):
    config = dataclasses.replace(config, results_dir=str(tmp_path))
    damaged, intact = folders.create(config), folders.create(config)
    for folder in (damaged, intact):
        (folder / "metrics.jsonl").write_text(RECORD)
    text = (damaged / name).read_text()
    assert text.count(old) == 1
    (damaged / name).write_text(text.replace(old, new))
    rows = {line.split()[0]: line for line in list_runs(tmp_path).splitlines()[1:3]}
    assert shown in rows[damaged.name]
    assert {"stopped", "2"} <= set(rows[intact.name].split())
    records = json.loads(list_runs(tmp_path, "--json"), parse_constant=pytest.fail)
    lines = list(csv.DictReader(list_runs(tmp_path, "--csv").splitlines()))
    for rows in (records, lines):
        (found,) = [row for row in rows if row["run"] == intact.name]
        assert (found["state"], float(found["return"]), len(rows)) == ("stopped", 2, 2)


@pytest.fixture
def study(config, tmp_path):
    """Create four runs of two systems on two tasks; map each run's return to its folder."""
    found = {}

    def create(value, status, **changes):
        run = dataclasses.replace(config, results_dir=str(tmp_path), **changes)
        folder = folders.create(run)
        folder = found[value] = folder.rename(folder.with_name(f"run_{len(found)}"))
        record = RECORD.replace("2}", f'{value}, "system.shift": 1}}')
        (folder / "metrics.jsonl").write_text(record)
        folders._set_status(folder, status)

    hyper, task = dataclasses.replace(HYPER, shift=2.5), EnvConfig("test/other", {"walls": 7})
    create(8, "finished")
    create(-3, "failed", algorithm=Config(4, hyper), num_envs=8, total_steps=10**6)
    create(5, "finished", vary={"system.shift": (1.0, 2.0)}, keep=5)
    create(1, "interrupted", env=task, system="own")
    return found


def test_settings_in_which_runs_of_a_task_differ_are_shown(study, tmp_path, list_runs):
    header, *rows = list_runs(tmp_path).splitlines()
    assert header.split()[-1] == "settings"
    shown = {row.split()[0]: row.split("  ")[-1].strip() for row in rows}
    assert [shown[study[value].name] for value in (8, -3, 5, 1)] == [
        "num_envs=4 shift=0.0",
        "num_envs=8 shift=2.5",
        "num_envs=4 shift=[1.0,2.0]",
        "-",
    ]


def test_equal_names_are_distinguished_and_many_settings_are_counted():
    base = listing.Summary(Path(), "own", "a/b", 1, (), "finished", 0, 0, None, None, {})
    changes = {f"system.x{i}": i for i in range(9)}
    runs = [
        base._replace(settings={"network.actor.width": 1, "network.critic.width": 3}),
        base._replace(settings={"network.actor.width": 2, "network.critic.width": 4} | changes),
    ]
    assert listing._settings(runs) == [
        "network.actor.width=1 network.critic.width=3",
        "network.actor.width=2 network.critic.width=4 x0=0 x1=1 x2=2 x3=3 and 5 more",
    ]


@pytest.mark.parametrize(
    ("arguments", "returns"),
    [
        ([], {8, -3, 5, 1}),
        (["system=own"], {1}),
        (["env=test/count"], {8, -3, 5}),
        (["state=finished"], {8, 5}),
        (["env=test/count", "state=failed"], {-3}),
        (["system=own", "state=running"], set()),
    ],
)
def test_runs_are_filtered(study, tmp_path, list_runs, arguments, returns):
    records = json.loads(list_runs(tmp_path, *arguments, "--json"))
    assert {record["return"] for record in records} == returns
    table = list_runs(tmp_path, *arguments)
    assert {value for value, folder in study.items() if folder.name in table} == returns


def test_runs_are_sorted(study, tmp_path, list_runs):
    def returns(*arguments):
        return [
            record["return"] for record in json.loads(list_runs(tmp_path, *arguments, "--json"))
        ]

    assert returns() == returns("sort=time") == list(study)
    assert returns("sort=return") == [-3, 5, 8, 1]  # by task, the highest last


def test_records_are_complete(study, config, tmp_path, list_runs):
    records = {record["return"]: record for record in json.loads(list_runs(tmp_path, "--json"))}
    rows = {
        float(row["return"]): row
        for row in csv.DictReader(list_runs(tmp_path, "--csv").splitlines())
    }
    for value, folder in study.items():
        record, row = records[value], rows[value]
        assert record["settings"] == schema.flat(schema.plain_values(folder / "config.yaml"))
        assert (record["folder"], record["steps"]) == (row["folder"], 5) == (str(folder), 5)
        for key, setting in record["settings"].items():
            text = row[f"settings.{key}"]
            assert text == (setting if isinstance(setting, str) else json.dumps(setting)) or (
                text == "" and setting is None
            )
    assert records[5]["varied"] == ["system.shift"] and records[5]["members"] == 2 * len(SEEDS)
    assert records[1]["resume"] == f"python own.py resume={study[1]}"
    assert rows[8]["resume"] == "" and records[8]["resume"] is None


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "system=ow",
            "unknown system of these runs 'ow': did you mean 'own'? allowed: counting, own",
        ),
        ("env=test/cuont", "did you mean 'test/count'? allowed: test/count, test/other"),
        ("state=done", "state must be 'running', 'finished', 'stopped'"),
        ("sort=steps", "sort must be 'time' or 'return', not 'steps'"),
        ("steps=3", "unknown key 'steps'"),
    ],
)
def test_bad_requests_give_a_one_line_error(study, tmp_path, monkeypatch, capsys, argument, line):
    for arguments in ([argument], ["--json", argument]):
        monkeypatch.setattr(sys, "argv", ["runs", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as stop:
            commands.run(listing.__doc__, listing.main)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and err.count("\n") == 1 and line in err and out == ""


def test_json_and_csv_exclude_each_other(study, tmp_path, error_of):
    assert "--json and --csv" in error_of(listing, tmp_path, "--json", "--csv")
