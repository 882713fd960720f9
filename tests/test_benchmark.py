"""The benchmark runs and reports; what it reports is not judged here."""

import json
import math
import subprocess
import sys
from pathlib import Path

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "benchmark.py")
SHORT = [
    *("env=coordsum/3x10-30", "env.time_limit=5", "tuned=false", "num_envs=4", "rollout_length=16"),
    *("network.guider.embed_dim=8", "network.learner.hidden_dim=8"),
]


def measured(folder, *arguments):
    file = folder / "new" / "figures.json"
    command = [sys.executable, SCRIPT, "magpo", *SHORT, *arguments, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_the_benchmark_reports_every_figure(tmp_path):
    figures = measured(tmp_path)
    assert figures["task"] == "coordsum/3x10-30"
    numbers = [value for value in figures.values() if isinstance(value, float)]
    assert len(numbers) >= 15 and all(math.isfinite(x) and x >= 0 for x in numbers)
    assert math.isclose(figures["steps_per_s"] * figures["update_s"], 4 * 16)


def test_the_cost_of_checkpoints_and_logs_is_measured(tmp_path):
    short = ("total_steps=192", "num_evaluations=3", "eval_episodes=2")
    figures = measured(tmp_path, *short, "--overhead", "2")
    assert figures["chunk_s"] * 2 == figures["run_s"] > 0
    assert figures["checkpoint_s"] > 0 and figures["checkpoint_mb"] > 0
    assert figures["share_of_checkpoints"] > 0 and figures["share_of_logging"] > 0
