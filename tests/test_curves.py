"""scripts/curves.py, on files of the library and on damaged ones."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "curves.py"
spec = importlib.util.spec_from_file_location("curves_script", SCRIPT)
curves = importlib.util.module_from_spec(spec)
sys.modules["curves_script"] = curves
spec.loader.exec_module(curves)


def record(seed, env_steps, value):
    row = {"seed": seed, "env_steps": env_steps, "name": curves.RETURN, "value": value}
    return json.dumps(row) + "\n"


def test_null_values_and_a_half_written_line_are_skipped(tmp_path):
    text = record(0, 0, 0.25) + record(1, 0, 0.75) + record(0, 5, None) + record(1, 5, None)
    (tmp_path / "metrics.jsonl").write_text(text + record(0, 9, 1.0)[:-9])
    table, picture = tmp_path / "a.csv", tmp_path / "a.png"
    curves.main(table, run=tmp_path)
    with table.open() as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [("0", "0", "0.25"), ("1", "0", "0.75")]
    curves.main(table, picture=picture, title="title")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        record(0, 0, None),
        record(0, 0, "x"),
        record([0], 0, 1.0),
        "{\n",
        "3\n",
        "[" * 100_000 + "\n",
        "\0\n",
    ],
    ids=lambda text: text and text[:90],
)
def test_a_run_that_cannot_be_collected_gives_a_one_line_error(text, tmp_path, error_of):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert "metrics.jsonl" in error_of(curves, tmp_path / "a.csv", f"run='{tmp_path}'")
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(
    "rows",
    [
        None,
        "",
        "0,0,1\n1,0,1\n0,5,1\n",  # seed 1 ends early
        "0,0,x\n",
        "0,x,1\n",
        "0\n0,0,\n",
        "\xff\n",
    ],
)
def test_a_table_that_cannot_be_drawn_gives_a_one_line_error(rows, tmp_path, error_of):
    table = tmp_path / "a.csv"
    if rows is not None:
        table.write_text(f"seed,env_steps,{curves.RETURN}\n{rows}", encoding="latin-1")
    assert str(table) in error_of(
        curves, table, f"picture='{tmp_path / 'a.png'}'", "title=one of two"
    )
    assert not (tmp_path / "a.png").exists()


def test_invalid_requests_give_a_one_line_error(error_of):
    assert "run=<folder>, or tables" in error_of(curves, "a.csv")
    assert "run=<folder>, or tables" in error_of(curves, "a.csv", "run=here", "metric=loss/policy")
