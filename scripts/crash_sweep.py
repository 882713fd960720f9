"""Crash test of a search: killed at random and continued, it must equal an uninterrupted one.

    python scripts/crash_sweep.py kills=10 seed=0 mappo env=coordsum/3x10-30 ... study=crash/a

The uninterrupted study is in crash/a, the killed ones are in crash/a_1 and so on. Every second kill
spares the run that the search has started. Exit code 0 means that every search had the same trials
with the same results.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from magpo import commands
from magpo.errors import ConfigError
from magpo.sweep import study as studies
from magpo.values import PositiveInt, UserPath

FACTS = ("number", "state", "params", "value", "intermediate_values")


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a search, or continue it."""
    command = [sys.executable, "-m", "magpo.sweep", *arguments, f"study={folder}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait until a search ends, and end this process if it failed."""
    if code := process.wait():
        sys.exit(f"a search ended with exit code {code}")


def kill(process: subprocess.Popen[bytes], run_too: bool) -> None:
    """Kill a search, with or without the run that it has started."""
    if run_too:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
    process.send_signal(signal.SIGKILL)
    process.wait()


def trials(folder: Path) -> list[dict[str, Any]]:
    """Return the facts of each trial that are compared."""
    return [{name: getattr(t, name) for name in FACTS} for t in studies.load(folder, None).trials]


def main(
    *arguments: str, kills: PositiveInt = 10, seed: int = 0, study: UserPath = "crash/study"
) -> None:
    """Kill and continue searches, and compare them with an uninterrupted one."""
    random.seed(seed)
    alone, began = Path(study), time.monotonic()
    if alone.exists() or list(alone.parent.glob(f"{alone.name}_*")):
        raise ConfigError(f"study={study}: already exists")
    finish(start(alone, *arguments))
    whole_s = time.monotonic() - began
    expected, killed, number = trials(alone), 0, 1
    while killed < kills:
        folder = Path(f"{study}_{number}")
        process = start(folder, *arguments)
        try:
            process.wait(random.uniform(0, whole_s / 2))
        except subprocess.TimeoutExpired:
            kill(process, run_too=killed % 2 == 0)
            killed += 1
            print(f"kill {killed} of {folder}", flush=True)
        else:
            finish(process)
            number += 1
    finish(start(folder, *arguments))
    for folder in alone.parent.glob(f"{alone.name}_*"):
        if trials(folder) != expected:
            sys.exit(f"{folder}: its trials are not those of {alone}")
    print(f"{killed} kills survived, {len(expected)} trials each time")


if __name__ == "__main__":
    commands.run(__doc__, main)
