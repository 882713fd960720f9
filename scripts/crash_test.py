"""Kill a run at random moments, resume it each time, and compare it with one left alone.

    python scripts/crash_test.py kills=30 seed=0 magpo env=coordsum/3x10-30 ... results_dir=crash

Every second kill waits until a checkpoint is being written. Exit code 0: every resume succeeded,
and the last checkpoint and the log are those of the run left alone, bit for bit.
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
    """A process that trains; its console can be read."""
    command = [sys.executable, "-m", f"magpo.systems.{system}", *overrides]
    command.append("checkpoint_share=1")  # more writing to be killed in
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for its end, which has to be a good one."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"exit code {process.returncode}:\n{output}")


def newest(folder: Path) -> int:
    """The chunk of the newest checkpoint, 0 without one."""
    found = checkpoint.checkpoints(folder / "checkpoints")
    return int(found[0].name) if found else 0


def kill(process: subprocess.Popen[str], folder: Path, writing: bool, within_s: float) -> None:
    """At some moment of the next seconds, or while a checkpoint is being written."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("compiled in"):
            break
    else:
        sys.exit(f"ended before it trained, with exit code {process.wait()}: {line}")
    if writing:
        while process.poll() is None and not list((folder / "checkpoints").glob(".*.tmp")):
            time.sleep(1e-3)
    time.sleep(random.uniform(0, 0.5 if writing else within_s))
    process.kill()
    process.wait()


def last_state(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint but the wall-clock times."""
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
    """Seconds that the run's training took."""
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["wall_s"])


def log(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without wall-clock times and the run's name."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in records if not record["name"].startswith("time/")]
    return [{k: v for k, v in record.items() if k not in ("run", "wall_s")} for record in kept]


def main(system: str, *overrides: str, kills: PositiveInt = 30, seed: int = 0) -> None:
    """Kill, compare."""
    run = config.load(system, overrides)
    parent = Path(run.results_dir, run.system, *run.env.name.split("/"))
    random.seed(seed)

    before = set(parent.glob("*"))
    finish(start(system, *overrides))
    (whole,) = set(parent.iterdir()) - before
    some_chunks_s = 1 + 4 * last_wall_s(whole) / run.num_evaluations
    killed, process, folder = 0, None, whole
    while killed < kills:
        if process is None or newest(folder) == run.num_evaluations:  # done before it was killed
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
    """End the process where a run differs from the one left alone."""
    ours, theirs = last_state(folder), last_state(whole)
    if ours.keys() != theirs.keys():
        sys.exit(f"{folder}: other arrays than {whole}")
    for name in ours:
        if ours[name].tobytes() != theirs[name].tobytes():
            sys.exit(f"{folder}: {name} differs")
    if log(folder) != log(whole):
        sys.exit(f"{folder}: metrics.jsonl differs")
    print(f"{folder.name}: same state, same log", flush=True)


if __name__ == "__main__":
    commands.run(__doc__, main)
