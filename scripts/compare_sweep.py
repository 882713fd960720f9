r"""Time of a search, and of its trials trained one at a time, batch by batch in turns.

    python scripts/compare_sweep.py scripts/results/sweep.csv trials=40 parallel=8 \
        study=compare/search mappo env=lbf/2s-8x8-2p-2f-coop tuned=false num_envs=16 \
        total_steps=100000 num_evaluations=6 logger.plot=false

While the trials of a batch train alone, the search is suspended. Each side has its own compilation
cache, which is empty at first. The table's seconds are wall time, and include starting and
compiling; the CPU time of both sides is printed at the end. A trial that has another value alone
than in the search ends this script.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial

from magpo import commands, tables
from magpo.config import load
from magpo.errors import ConfigError
from magpo.sweep import study as studies
from magpo.sweep.space import override
from magpo.sweep.training import Metrics
from magpo.values import PositiveInt, UserPath


def with_cache(folder: Path) -> dict[str, str]:
    """Return the environment of a process whose compilation cache is beside a folder."""
    cache = folder.with_name(f"{folder.name}_cache")
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}


def send(search: subprocess.Popen[str], name: str) -> None:
    """Send a signal to a search and to the run that it has started."""
    subprocess.run(["pkill", f"-{name}", "-s", str(search.pid)], check=True)


def cpu_seconds() -> float:
    """Return the CPU time of all child processes that have ended, in seconds."""
    times = os.times()
    return times.children_user + times.children_system


def wait_for(search: subprocess.Popen[str], trials: int) -> None:
    """Wait until as many more trials have ended: the search prints a line for each."""
    assert search.stdout
    for _ in range(trials):
        if not search.stdout.readline().startswith("trial "):
            sys.exit(search.wait() or "the search ended early")


def train_alone(
    system: str, overrides: Sequence[str], folder: Path, trials: Iterable[FrozenTrial], name: str
) -> None:
    """Train each trial as a run of its own, and compare the metric `name` with its value."""
    common = [text for text in overrides if not text.startswith("space.")]
    for trial in trials:
        changes = [override(key, value) for key, value in trial.params.items()]
        arguments = [*common, *changes, f"results_dir={folder}"]
        command = [sys.executable, "-m", f"magpo.systems.{system}", *arguments]
        ended = subprocess.run(command, env=with_cache(folder), stdout=subprocess.DEVNULL)
        if ended.returncode:
            sys.exit(ended.returncode)  # the run has said why
        metrics = Metrics(load(system, arguments), name)
        metrics.read()
        if metrics.result(()) != trial.value:
            sys.exit(f"trial {trial.number}: {metrics.result(())} alone, not {trial.value}")


def main(
    table: Path,
    system: str,
    *overrides: str,
    study: UserPath,
    trials: PositiveInt = 40,
    parallel: PositiveInt = 8,
) -> None:
    """Measure and write a table with a row for each batch."""
    folder = Path(study).absolute()
    if folder.exists():
        raise ConfigError(f"study={study}: already exists")
    command = [sys.executable, "-m", "magpo.sweep", system, *overrides, f"study={folder}"]
    search = subprocess.Popen(
        [*command, f"trials={trials}", f"parallel={parallel}"],
        env=with_cache(folder),
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    rows, alone_cpu_s = list[dict[str, object]](), 0.0
    try:
        for first in range(0, trials, parallel):
            size, began = min(parallel, trials - first), time.monotonic()
            wait_for(search, size)
            if first + size < trials:
                send(search, "STOP")
            else:
                search.communicate()
            search_s, began = time.monotonic() - began, time.monotonic()
            before_s = cpu_seconds()
            found = studies.load(folder, None)
            batch, name = found.trials[first : first + size], found.user_attrs["headline"]
            train_alone(system, overrides, folder.with_name(f"{folder.name}_alone"), batch, name)
            alone_s = time.monotonic() - began
            alone_cpu_s += cpu_seconds() - before_s
            row = {"first_trial": first, "trials": size, "search_s": f"{search_s:.1f}"}
            rows.append(row | {"alone_s": f"{alone_s:.1f}", "ratio": f"{search_s / alone_s:.3f}"})
            print(rows[-1], flush=True)
            if first + size < trials:
                send(search, "CONT")
    finally:
        if search.poll() is None:
            send(search, "KILL")
    tables.write(table, rows)
    search_cpu_s = cpu_seconds() - alone_cpu_s
    print(f"CPU time: {search_cpu_s:.0f} s in the search, {alone_cpu_s:.0f} s alone")


if __name__ == "__main__":
    commands.run(__doc__, main)
