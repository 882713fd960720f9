r"""Comparison of settings of a hyperparameter in one program with a run for each setting.

    python scripts/members.py scripts/results/members.csv mappo env=lbf/8x8-2p-2f-coop num_envs=16 \
        vary.system.actor_lr=[1e-4,2e-4,5e-4,1e-3]

Each row times whole runs from the command line, which share a compilation cache that is empty at
first. `total_s` is their wall time, including start-up, compilation and evaluations, `cpu_s` their
CPU time, and `steps_per_s` the rate of training alone.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from magpo import commands, config, tables
from magpo.config.members import text


def measure(system: str, runs: list[list[str]], steps: int) -> dict[str, Any]:
    """Run the system once with each list of overrides, one run after the other."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(folder, "xla"))}
        module = [sys.executable, "-m", f"magpo.systems.{system}", f"results_dir={folder}/results"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        for overrides in runs:
            command = [*module, "logger.plot=false", "logger.console=false", *overrides]
            subprocess.run(command, env=environment, check=True)
        total_s = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        training_s = sum(map(_training_seconds, Path(folder).rglob("metrics.jsonl")))
    return {
        "total_s": round(total_s, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "steps_per_s": round(steps / training_s),
    }


def _training_seconds(file: Path) -> float:
    """Sum a run's training time, which all of its members share."""
    records = map(json.loads, file.read_text().splitlines())
    seconds = {r["env_steps"]: r["value"] for r in records if r["name"] == "time/training_s"}
    return float(sum(seconds.values()))


def main(table: Path, system: str, *overrides: str) -> None:
    """Measure all members at once, one after the other in one program, and in separate runs."""
    run = config.load(system, overrides)
    shared = [o for o in overrides if not o.startswith("vary.")]
    own = [[f"{k}={text(v)}" for k, v in setting.items()] for setting in run.settings]
    ways = {
        "one program": [[*overrides]],
        "one program, seeds_per_batch=1": [[*overrides, "seeds_per_batch=1"]],
        "a run for each": [[*shared, *setting] for setting in own],
    }
    steps = run.trained_steps * len(run.members)
    rows = []
    for name, runs in ways.items():
        row = {"command": " ".join([system, *overrides]), "members": name}
        rows.append(row | measure(system, runs, steps))
        print(rows[-1], flush=True)
    tables.write(table, rows)


if __name__ == "__main__":
    commands.run(__doc__, main)
