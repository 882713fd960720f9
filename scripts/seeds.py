"""Many seeds in one program against as many runs one after another.

    python scripts/seeds.py scripts/results/seeds.csv magpo env=coordsum/3x10-30 num_envs=4,16,64

Each row is one call of scripts/benchmark.py with all seeds in one program; `speedup` is against the
program of one seed as often, start-up and compilation left out, and `start_up_s` says what that is.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from magpo import tables

BENCHMARK = str(Path(__file__).with_name("benchmark.py"))


def benchmark(system: str, overrides: list[str]) -> dict[str, Any]:
    """Return the measurements of one program, made in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "measured.json")
        command = [sys.executable, BENCHMARK, system, *overrides, "--json", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measured: dict[str, Any] = json.loads(file.read_text())
    return measured


def main() -> None:
    """Measure each size alone, together and in batches of one, and write a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("system")
    parser.add_argument("overrides", nargs="+", help="the last may list sizes: num_envs=4,16")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    listed = next(text for text in reversed(arguments.overrides) if "=" in text)
    key, _, values = listed.partition("=")
    others = [text for text in arguments.overrides if text is not listed]
    seeds = f"seeds={list(range(arguments.seeds))}".replace(" ", "")
    rows = []
    for value in values.split(","):
        size = [*others, f"{key}={value}"]
        alone = benchmark(arguments.system, size)["steps_per_s"]
        for at_once in ([], ["seeds_per_batch=1"]):
            measured = benchmark(arguments.system, [*size, seeds, *at_once])
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
    tables.write(arguments.table, rows)


if __name__ == "__main__":
    main()
