r"""Timings, in turns, of two commands that train, for example another library's and ours.

    python scripts/compare_peer.py scripts/results/peer.csv rounds=5 updates=4 lines=ACTOR \
        python -m magpo.systems.mappo env=lbf/8x8-2p-2f-coop  vs  /else/python mappo.py env=lbf

Each command must print "... steps/s" or "steps per second: ..." repeatedly, with `updates` updates
between two such rates; the first rate, which may include compilation, is left out. Of the second
command only lines that contain `lines` count. A round runs both commands, in alternating order.
`ratio` is the first command's rate over the second's. Rounds in which a command got less than 90 %
of its usual share of the CPUs do not count. The script adds a row to the table.
"""

import csv
import os
import re
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from magpo import commands, tables
from magpo.errors import ConfigError
from magpo.values import PositiveInt

RATE = re.compile(r"([\d.,]+)([kMG]?) steps/s|steps per second\W+([\d.,]+)", re.IGNORECASE)
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
ANSI = re.compile(r"\x1b\[[\d;]*m")


class Timing(NamedTuple):
    """Measurements of one run of a command."""

    steps_per_s: float  # median
    cpu_s: float  # between two rates
    share: float  # CPU seconds over wall seconds


def rate_in(line: str) -> float | None:
    """Return the steps/s that a line states, if any."""
    if (found := RATE.search(ANSI.sub("", line))) is None:
        return None
    number, unit, other = found.groups()
    return float((number or other).replace(",", "")) * UNITS[unit or ""]


def measure(command: Sequence[str], word: str) -> Timing:
    """Run a command and time it by the rates in lines that contain `word`.

    Raises ConfigError if the command fails or prints fewer than three rates.
    """
    rates, at, last = list[float](), list[tuple[float, float]](), deque[str](maxlen=1)
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from error
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            last.append(line.strip())
        if word in line and (steps_per_s := rate_in(line)) is not None:
            rates.append(steps_per_s)
            at.append((time.perf_counter(), _cpu_s(process.pid)))
    if process.wait() or len(rates) < 3:
        said = last[0] if last else "nothing"
        problem = f"exit code {process.returncode}, {len(rates)} rates; its last line: {said}"
        raise ConfigError(f"{' '.join(command)}: {problem}")
    wall_s, cpu_s = (end - begin for begin, end in zip(at[0], at[-1], strict=True))
    return Timing(statistics.median(rates[1:]), cpu_s / (len(at) - 1), cpu_s / wall_s)


def _cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(
    table: Path,
    *command: str,
    rounds: PositiveInt = 5,
    updates: PositiveInt = 1,
    lines: str = "",
) -> None:
    """Measure, print and add a row to the table."""
    if command.count("vs") != 1 or command[0] == "vs" or command[-1] == "vs":
        raise ConfigError("give two commands with the word vs between them")
    place = command.index("vs")
    sides = command[:place], command[place + 1 :]
    timings: tuple[list[Timing], ...] = ([], [])
    for i in range(rounds):
        for side in (0, 1) if i % 2 else (1, 0):
            timings[side].append(measure(sides[side], lines * side))
            print(f"{i + 1}/{rounds} {sides[side][0]}", *timings[side][-1], file=sys.stderr)
    usual = [statistics.median(t.share for t in side) for side in timings]
    pairs = list(zip(*timings, strict=True))
    kept = [pair for pair in pairs if all(map(lambda t, u: t.share >= 0.9 * u, pair, usual))]
    if not kept:
        raise ConfigError(f"none of {rounds} rounds counts: other programs are using the CPUs")
    ratios = [first.steps_per_s / second.steps_per_s for first, second in kept]
    row: dict[str, object] = {"first": " ".join(sides[0]), "second": " ".join(sides[1])}
    row |= {"rounds": f"{len(kept)} of {rounds}", "ratio": f"{statistics.median(ratios):.2f}"}
    row |= {"lowest": f"{min(ratios):.2f}", "highest": f"{max(ratios):.2f}"}
    for side, name in enumerate(("first", "second")):
        steps_per_s = statistics.median(pair[side].steps_per_s for pair in kept)
        cpu_s = statistics.median(pair[side].cpu_s for pair in kept) / updates
        row |= {f"{name}_steps_per_s": f"{steps_per_s:.0f}", f"{name}_cpu_s": f"{cpu_s:.3f}"}
        row[f"{name}_share"] = f"{usual[side]:.2f}"
    earlier = list(csv.DictReader(table.open())) if table.exists() else []
    tables.write(table, [*earlier, row])
    print(*row.values())


if __name__ == "__main__":
    commands.run(__doc__, main)
