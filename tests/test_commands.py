"""Functions as command lines: keys, words, other arguments, errors; the help of scripts."""

import csv
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

from magpo import commands
from magpo.values import PositiveInt

SCRIPTS = sorted((Path(__file__).parents[1] / "scripts").glob("*.py"))
WHOLE = (Path("a.csv"), "magpo", ("env=lbf/x", "system.lr=[1]"), 3, True)
found = []


def main(
    table: Path, system: str, *overrides: str, rounds: PositiveInt = 20, quick: bool = False
) -> None:
    found.append((table, system, overrides, rounds, quick))


def closed(folder: Path = Path("results"), *, rounds: PositiveInt = 20) -> None:
    found.append(list(folder.iterdir()) * rounds)


def call(monkeypatch, function, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    found.clear()
    commands.run("the usage", function)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("a.csv", "magpo", "env=lbf/x", "system.lr=[1]", "rounds=3", "quick=true"),
        ("--quick", "env=lbf/x", "rounds=3", "system=magpo", "a.csv", "system.lr=[1]"),
        (
            "table=b.csv",
            "table=a.csv",
            "magpo",
            "env=lbf/x",
            "system.lr=[1]",
            "--quick",
            "rounds=3",
        ),
    ],
)
def test_own_keys_are_taken_out_and_the_rest_is_passed_through(monkeypatch, arguments):
    assert call(monkeypatch, main, *arguments) == [WHOLE]


def test_arguments_are_passed_through_as_written(monkeypatch):
    others = ("happo", "num_envs=4,16", "results_dir='a b'", "overrides=3", "x={")
    ((*_, through, rounds, quick),) = call(monkeypatch, main, "a.csv", "magpo", *others)
    assert (through, rounds, quick) == (others, 20, False)


@pytest.mark.parametrize(
    ("function", "arguments", "line"),
    [
        (main, ["a.csv"], "system is missing"),
        (main, ["a.csv", "magpo", "rounds=0"], "rounds must be greater than 0, not 0"),
        (main, ["a.csv", "magpo", "quick=1"], "quick must be a valid boolean, not 1"),
        (closed, ["here", "there"], "cannot read 'there': write key=value"),
        (closed, ["round=3"], "unknown key 'round': did you mean 'rounds'? --help lists all"),
        (closed, ["--round"], "unknown key 'round': did you mean 'rounds'? --help lists all"),
        (closed, ["nowhere"], "No such file or directory: 'nowhere'"),
    ],
)
def test_bad_arguments_give_a_one_line_error(monkeypatch, capsys, function, arguments, line):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, function, *arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert line in err and not found


def test_help_is_printed_and_nothing_is_run(monkeypatch, capsys, tmp_path):
    for function, arguments in ((main, []), (main, ["a.csv", "--help"]), (closed, ["-h"])):
        assert call(monkeypatch, function, *arguments) == []
        assert capsys.readouterr().out == "the usage\n"
    assert call(monkeypatch, closed, str(tmp_path)) == [[]]  # an empty folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_scripts_help_lists_its_keys(script, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(f"help_of_{script.stem}", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    commands.run(module.__doc__, module.main)
    text = capsys.readouterr().out
    assert f"python scripts/{script.name}" in text
    for key, parameter in inspect.signature(module.main).parameters.items():
        assert parameter.kind is not parameter.KEYWORD_ONLY or f"{key}=" in text


def compare(monkeypatch, table, first, second, cpu_s=lambda pid: 0.0):
    """Compare two commands; ignore their CPU time by default, because it is a few ticks."""
    words = ["compare_peer", str(table), "rounds=2", "updates=2"]
    command = [*words, sys.executable, "-c", first, "vs", sys.executable, "-c", second]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.syspath_prepend(SCRIPTS[0].parent)
    script = importlib.import_module("compare_peer")
    monkeypatch.setattr(script, "_cpu_s", cpu_s)
    commands.run(script.__doc__, script.main)


PRINT = "import time\nfor i in range(3): print({!r}, flush=True); time.sleep(0.01)"


def test_two_commands_are_timed_in_turn(tmp_path, monkeypatch):
    table = tmp_path / "peer.csv"
    for _ in range(2):
        ours = PRINT.format("a, 1.5k steps/s, b")
        compare(monkeypatch, table, ours, PRINT.format("Steps per second: 1,000.0 |"))
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 2
    assert {key: rows[1][key] for key in ("ratio", "first_steps_per_s", "second_steps_per_s")} == {
        "ratio": "1.50",
        "first_steps_per_s": "1500",
        "second_steps_per_s": "1000",
    }


def test_rounds_disturbed_by_other_programs_do_not_count(tmp_path, monkeypatch, capsys):
    ours = PRINT.format("2 steps/s")
    seconds = iter([0, 0, 9, 0, 0, 1] * 2)  # each side gets more in a different round
    with pytest.raises(SystemExit) as stop:
        compare(monkeypatch, tmp_path / "peer.csv", ours, ours, lambda pid: next(seconds))
    assert stop.value.code == 2
    assert "none of 2 rounds counts" in capsys.readouterr().err


@pytest.mark.parametrize("code", ["print('no licence'); exit(3)", "print('no licence')"])
def test_a_command_that_cannot_be_timed_gives_a_one_line_error(code, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        compare(monkeypatch, tmp_path / "peer.csv", PRINT.format("2 steps/s"), code)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "no licence" in last
    assert not (tmp_path / "peer.csv").exists()
