"""Comparison of many seeds in one program with as many runs one after another.

    python scripts/seeds.py scripts/results/seeds.csv magpo env=coordsum/3x10-30 num_envs=4,16,64

The last override lists sizes; number=10 sets the number of seeds. Each row is one call of
scripts/benchmark.py with all seeds in one program. `speedup` compares it with as many runs of one
seed, without start-up and compilation, whose time is `start_up_s`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from magpo import commands, config, tables
from magpo.values import PositiveInt

BENCHMARK = str(Path(__file__).with_name("benchmark.py"))


def benchmark(system: str, overrides: list[str]) -> dict[str, Any]:
    """Measure one program in a separate process; return the measurements."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "measured.json")
        command = [sys.executable, BENCHMARK, system, *overrides, f"json={file}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measured: dict[str, Any] = json.loads(file.read_text())
    return measured


def main(table: Path, system: str, *overrides: str, number: PositiveInt = 10) -> None:
    """Measure each size with one seed, all at once and one at a time; write a table."""
    *others, listed = overrides or ("env=",)
    key, _, values = listed.partition("=")
    sizes = [[*others, f"{key}={value}"] for value in values.split(",")]
    for size in sizes:
        config.load(system, size)
    seeds = f"seeds={list(range(number))}".replace(" ", "")
    rows = []
    for size in sizes:
        alone = benchmark(system, size)["steps_per_s"]
        for at_once in ([], ["seeds_per_batch=1"]):
            measured = benchmark(system, [*size, seeds, *at_once])
            rows.append(
                {
                    "overrides": " ".join([*size, seeds, *at_once]),
                    "device": measured["device"],
                    "steps_per_s": round(measured["steps_per_s"]),
                    "steps_per_s_of_one_seed_alone": round(alone),
                    "speedup": round(measured["steps_per_s"] / alone, 2),
                    "start_up_s": round(measured["first_update_s"] - measured["update_s"], 1),
                    "peak_memory_gb": round(measured["peak_memory_gb"], 2),
                }
            )
            print(rows[-1], flush=True)
    tables.write(table, rows)


if __name__ == "__main__":
    commands.run(__doc__, main)
