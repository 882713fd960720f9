"""Crash test: a run, killed at random moments and resumed, must equal an uninterrupted one.

    python scripts/crash_test.py kills=30 seed=0 magpo env=coordsum/3x10-30 ... results_dir=crash

Every second kill waits until a checkpoint is being written. Exit code 0 means that every resume
succeeded, and that the last checkpoint and the log equal the uninterrupted run's, bit for bit.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from magpo import commands, config
from magpo.runs import checkpoint
from magpo.values import PositiveInt


def start(system: str, *overrides: str) -> subprocess.Popen[str]:
    """Start a process that trains, with its console in a pipe."""
    command = [sys.executable, "-m", f"magpo.systems.{system}", *overrides]
    command.append("checkpoint_share=1")  # write more, to be killed while writing
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait until a process ends; exit if it failed."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"exit code {process.returncode}:\n{output}")


def newest(folder: Path) -> int:
    """Return the chunk of the newest checkpoint, or 0 without one."""
    found = checkpoint.checkpoints(folder / "checkpoints")
    return int(found[0].name) if found else 0


def kill(process: subprocess.Popen[str], folder: Path, writing: bool, within_s: float) -> None:
    """Kill a process once it trains: at a random moment, or as it writes a checkpoint."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("compiled in"):
            break
    else:
        sys.exit(f"the run ended before it trained, with exit code {process.wait()}: {line}")
    if writing:
        while process.poll() is None and not list((folder / "checkpoints").glob(".*.tmp")):
            time.sleep(1e-3)
    time.sleep(random.uniform(0, 0.5 if writing else within_s))
    process.kill()
    process.wait()


def last_state(folder: Path) -> dict[str, np.ndarray]:
    """Return all arrays of the newest checkpoint except wall-clock times."""
    path = checkpoint.checkpoints(folder / "checkpoints")[0]
    meta = checkpoint.read_meta(path)
    arrays = {
        f"{part}/{name}": array
        for part in ("state", "record")
        for name, array in checkpoint.load_named(path, meta, part).items()
    }
    del arrays["record/history.wall_s"]
    return arrays


def last_wall_s(folder: Path) -> float:
    """Return the wall-clock time of a run's last record, in seconds."""
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["wall_s"])


def log(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without wall-clock times and the run's name."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in records if not record["name"].startswith("time/")]
    return [{k: v for k, v in record.items() if k not in ("run", "wall_s")} for record in kept]


def main(system: str, *overrides: str, kills: PositiveInt = 30, seed: int = 0) -> None:
    """Kill and resume runs, and compare them with an uninterrupted one."""
    run = config.load(system, overrides)
    parent = Path(run.results_dir, run.system, *run.env.name.split("/"))
    random.seed(seed)

    before = set(parent.glob("*"))
    finish(start(system, *overrides))
    (whole,) = set(parent.iterdir()) - before
    some_chunks_s = 1 + 4 * last_wall_s(whole) / run.num_evaluations
    killed, process, folder = 0, None, whole
    while killed < kills:
        if process is None or newest(folder) == run.num_evaluations:  # ended before the kill
            if process is not None:
                finish(start(system, f"resume={folder}"))
                compare(whole, folder)
            process = start(system, *overrides)
            before = set(parent.iterdir())
            while not (new := set(parent.iterdir()) - before):
                time.sleep(0.01)
            (folder,) = new
        else:
            process = start(system, f"resume={folder}")
        kill(process, folder, killed % 2 == 1, some_chunks_s)
        killed += 1
        print(f"kill {killed}: {folder.name} at chunk {newest(folder)}", flush=True)
    finish(start(system, f"resume={folder}"))
    compare(whole, folder)
    print(f"{killed} kills survived")


def compare(whole: Path, folder: Path) -> None:
    """Exit if a run differs from the uninterrupted one."""
    ours, theirs = last_state(folder), last_state(whole)
    if ours.keys() != theirs.keys():
        sys.exit(f"{folder}: its arrays are not those of {whole}")
    for name in ours:
        if ours[name].tobytes() != theirs[name].tobytes():
            sys.exit(f"{folder}: {name} differs")
    if log(folder) != log(whole):
        sys.exit(f"{folder}: metrics.jsonl differs")
    print(f"{folder.name}: same state, same log", flush=True)


if __name__ == "__main__":
    commands.run(__doc__, main)
