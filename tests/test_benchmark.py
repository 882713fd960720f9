"""The benchmark: it runs and reports; the measurements are not judged here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import small

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "benchmark.py")


def run_benchmark(folder, *arguments):
    file = folder / "new" / "measured.json"
    command = [sys.executable, SCRIPT, "mappo", *small.MAPPO, *arguments, f"json={file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_the_benchmark_reports_every_measurement(tmp_path):
    found = run_benchmark(tmp_path)
    assert found["task"] == "coordsum/3x10-30"
    numbers = [value for value in found.values() if isinstance(value, float)]
    assert len(numbers) >= 15 and all(math.isfinite(x) and x >= 0 for x in numbers)
    assert math.isclose(found["steps_per_s"] * found["update_s"], 4 * 16)


def test_the_cost_of_checkpoints_and_logs_is_measured(tmp_path):
    short = ("total_steps=192", "num_evaluations=3", "eval_episodes=2")
    found = run_benchmark(tmp_path, *short, "overhead=2")
    assert found["chunk_s"] * 2 == found["run_s"] > 0
    assert found["checkpoint_s"] > 0 and found["checkpoint_mb"] > 0
    assert found["share_of_checkpoints"] > 0 and found["share_of_logging"] > 0
