"""The training of published experiments: only the seeds that are missing."""

import sys
from collections.abc import Sequence

from magpo.reproduce import results
from magpo.runs import child


def train(
    command: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], results_dir: str
) -> int:
    """Train the unfinished ones of a command's seeds in a child process; return its exit code."""
    found = results.runs(command, results_dir)
    at_work = [run for run in found if run.status == "running" and {*run.seeds} & {*seeds}]
    done = {seed for run in found if run.status == "finished" for seed in run.seeds}
    missing = [seed for seed in seeds if seed not in done]
    if at_work:
        print(f"another process trains it: {at_work[0].folder}")
    elif missing:
        system, *own = command
        quoted = results_dir.replace("'", "\\'")
        words = [*own, *overrides, listed(missing), f"results_dir='{quoted}'", "resume=auto"]
        return child.run([sys.executable, "-m", f"magpo.systems.{system}", *words])
    return 0


def listed(seeds: Sequence[int]) -> str:
    """Return the override that sets the seeds."""
    return f"seeds={list(seeds)}".replace(" ", "")
