"""The crash test, with few kills."""

import subprocess
import sys
from pathlib import Path

import small

ROOT = Path(__file__).parents[1]
SHORT = [*small.MAPPO, "total_steps=6400", "num_evaluations=20", "eval_episodes=2"]


def test_a_run_killed_twice_equals_an_uninterrupted_one(tmp_path):
    script = str(ROOT / "scripts" / "crash_test.py")
    command = [sys.executable, script, "kills=2", "mappo", *SHORT, f"results_dir={tmp_path}"]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "2 kills survived" in out.stdout and "same state, same log" in out.stdout
