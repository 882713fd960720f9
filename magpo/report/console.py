"""A run's display: live on a terminal, one line per evaluation elsewhere."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from statistics import median
from typing import IO, Any, cast

import jax
import numpy as np
from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from magpo import tables
from magpo.config.members import Member, by_setting, label, short_key, text
from magpo.config.schema import RunConfig
from magpo.files import complain
from magpo.hardware import processes
from magpo.hardware.devices import layout
from magpo.report.measurements import Measurement, Run
from magpo.types import Environment

SPARSE_SUITES = ("rware",)
HINT = """\
Rewards are sparse here: a quick run moves little. What learns in minutes:
  make demo    or    python -m magpo.systems.{system} env=lbf/2s-8x8-2p-2f-coop budget=quick"""


def short(number: float) -> str:
    """Return a number with three digits in engineering notation: 19988480 is "20.0M"."""
    for unit, symbol in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * unit:
            value = number / unit
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{symbol}"
    return f"{number:.0f}"


def spread(values: np.ndarray) -> str:
    """Return mean ± standard deviation over seeds, (S,); the mean alone for one seed."""
    digits = 1 if abs(values.mean()) >= 99.95 else 2
    mean = f"{values.mean():.{digits}f}"
    return f"{mean} ± {values.std():.{digits}f}" if len(values) > 1 else mean


def member_table(members: Sequence[Member], columns: Mapping[str, np.ndarray]) -> Table:
    """Return a table with a row for each member, and each setting's mean over seeds.

    `columns` are (M,) each: scores as floats, and integers, of which no mean is shown.
    """
    table = tables.plain([*map(short_key, members[0].setting), "seed", *columns])
    for place, (seed, setting) in enumerate(members):
        cells = [format(v[place], ".3f" if v.dtype.kind == "f" else ",") for v in columns.values()]
        table.add_row(*map(text, setting.values()), str(seed), *cells)
    for setting, places in by_setting(members):
        if len(places) > 1:
            means = [spread(v[places]) if v.dtype.kind == "f" else "" for v in columns.values()]
            table.add_row(*map(text, setting.values()), "mean", *means, style="bold")
    return table


def _size(params: Any) -> int:
    """Count the numbers in one member's parameters; the leaves are (M, ...)."""
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(params))


class _Output:
    """Standard output as a log: its first error ends it, and never the run.

    Characters that its encoding lacks become question marks.
    """

    def __init__(self) -> None:
        self.broken = False

    @property
    def stream(self) -> IO[str] | None:
        """The stream, which a test or a notebook may replace, below the one that Live installs."""
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return not self.broken and self.stream is not None and self.stream.isatty()

    def write(self, text: str) -> int:
        if self.stream is not None and not self.broken:
            try:
                self.stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
                self.stream.flush()
            except (OSError, ValueError) as error:
                self.broken = True
                complain(f"warning: the console cannot be written: {error}; training goes on")
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` flushes."""


class Console:
    """The display of one run, with `absolute_evaluations` more evaluations after the last chunk."""

    def __init__(self, run: Run, config: RunConfig, absolute_evaluations: int) -> None:
        self.run = run
        self.config = config
        self.absolute_evaluations = absolute_evaluations
        shown = config.logger.console and processes.is_first()
        self.terminal = Terminal(file=cast(IO[str], _Output()), highlight=False, quiet=not shown)
        self.latest: Measurement | None = None
        self.latest_at = 0.0
        self.best = np.full(len(run.members), -np.inf)  # (M,) mean episode return
        # A machine's pace changes: the median of the last chunks, not the mean of all.
        self.training_s: deque[float] = deque(maxlen=9)
        self.evaluation_s: deque[float] = deque(maxlen=9)

    def header(self, env: Environment, policy: Any, params: Any) -> None:
        """Print the run in a few lines. `policy`: the deployed part of `params`; (M, ...) each."""
        config, device, mesh = self.config, jax.devices()[0], layout(self.config).mesh
        actions = "actions" if env.action_kind == "discrete" else "action dimensions"
        kind = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
        several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        rounded = f", {config.total_steps:,} rounded down to whole chunks"
        rows = {
            "agents": f"{env.num_agents}, with {env.action_dim} {actions} each",
            "parameters": f"{_size(policy):,} in the policy, {_size(params):,} in training",
            "seeds": ", ".join(map(str, config.seeds)),
            **self._varied(),
            "device": f"{mesh.size} x {device.platform} ({kind}){several}, " + config.precision,
            "steps": f"{config.trained_steps:,} per {'member' if config.vary else 'seed'}"
            + rounded * (config.trained_steps < config.total_steps),
            "updates": f"{config.num_updates:,}, each of {config.num_envs} environments x "
            f"{config.rollout_length} steps",
            "evaluation": f"{config.eval_episodes} episodes every {config.steps_per_chunk:,} steps",
            "values": "tuned for this task" if config.tuned else "defaults",
        }
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", justify="right")
        for name, value in rows.items():
            grid.add_row(name, value)
        title = f"[bold]{self.run.system}[/] on [bold]{env.name}[/]"
        self.terminal.print(Panel.fit(grid, title=title, title_align="left", border_style="cyan"))
        self.line(f"results: {self.run.folder}")
        if config.budget == "quick" and self.run.suite in SPARSE_SUITES:
            self.line(HINT.format(system=self.run.system), "yellow")

    def _varied(self) -> dict[str, str]:
        """Return the header's rows about the settings, none if nothing varies."""
        vary, seeds = self.config.vary, self.config.seeds
        rows = {short_key(key): ", ".join(map(text, values)) for key, values in vary.items()}
        sizes = [*map(len, vary.values()), len(seeds)]
        product = f"{' x '.join(map(str, sizes))} = {len(self.run.members)}"
        return rows | ({"members": product} if vary else {})

    def footprint(self, needed: int, available: int) -> None:
        """Print the bytes that training will take on each device."""
        self.line(f"memory: {short(needed)} of {short(available)} bytes on each device")
        if needed > available:
            self.warn("that is too much: num_envs, or seeds_per_batch, makes it less")

    def line(self, line: str, style: str = "") -> None:
        """Print one line, never wrapped, so that paths and commands can be copied."""
        self.terminal.print(Text(line, style), soft_wrap=True)

    @contextmanager
    def compiling(self, programs: Sequence[str]) -> Iterator[list[str]]:
        """Show which of `programs` are missing from the list that this yields."""
        start, done = time.perf_counter(), list[str]()

        def status() -> Text:
            missing = ", ".join(name for name in programs if name not in done)
            return Text(f"compiling {missing} … {time.perf_counter() - start:.0f} s")

        if not self.terminal.is_terminal:
            self.line("compiling …")
        with self._live(status):
            yield done
        self.line(f"compiled in {time.perf_counter() - start:.1f} s")

    def training(self) -> AbstractContextManager[object]:
        """Return the live display, a context around the training loop."""
        return self._live(self._progress)

    def warn(self, warning: str) -> None:
        """Print a warning."""
        self.line(f"warning: {warning}", "yellow")

    def resume(self, measurement: Measurement) -> None:
        """Take over a measurement that was shown before."""
        self.latest, self.latest_at = measurement, time.perf_counter()
        self.best = np.fmax(self.best, measurement.evaluation["episode_return"].mean(-1))

    def update(self, measurement: Measurement) -> None:
        self.resume(measurement)
        if measurement.timing:
            self.training_s.append(measurement.timing["training_s"])
            self.evaluation_s.append(measurement.timing["evaluation_s"])
        if not self.terminal.is_terminal:
            self.line(", ".join(self._pace() + self._scores()))

    def finished(self, last: Measurement, best: Measurement, absolute: Measurement | None) -> None:
        """Print the final table. `best`: the evaluation of each member's best parameters."""
        columns = {"final": last, "best": best} | ({"absolute": absolute} if absolute else {})
        metrics = list(dict.fromkeys(["episode_return", self.run.headline]))
        scores = {
            f"{column} {metric.removeprefix('episode_')}": m.evaluation[metric].mean(-1)
            for metric in metrics
            for column, m in columns.items()
        }
        steps = {"best at step": np.array(best.env_steps)}
        self.terminal.print(member_table(self.run.members, scores | steps))
        if absolute:
            episodes = absolute.evaluation["episode_return"].shape[1]
            self.line(f"absolute: the best parameters, played again for {episodes} episodes")
        self.line(f"done in {timedelta(seconds=round(last.wall_s))}; results: {self.run.folder}")

    def time_left(self) -> float | None:
        """Return the seconds left at the pace of the last chunks; None before the first."""
        if self.latest is None or self.latest.chunk is None or not self.training_s:
            return None
        evaluation_s = median(self.evaluation_s)
        chunks = self.config.num_evaluations - self.latest.chunk
        left = chunks * (median(self.training_s) + evaluation_s)
        left += self.absolute_evaluations * evaluation_s
        return max(0.0, left - (time.perf_counter() - self.latest_at))

    def _live(self, render: Callable[[], RenderableType]) -> AbstractContextManager[object]:
        if not self.terminal.is_terminal:
            return nullcontext()
        return Live(
            get_renderable=render, console=self.terminal, refresh_per_second=2, transient=True
        )

    def _progress(self) -> Group:
        steps = max(self.latest.env_steps) if self.latest else 0
        first = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.config.trained_steps, completed=steps, width=30)
        first.add_row(bar, *self._pace())
        return Group(first, Text("  ".join(self._scores()), "bold"))

    def _pace(self) -> list[str]:
        steps = max(self.latest.env_steps) if self.latest else 0
        parts = [f"{short(steps)} of {short(self.config.trained_steps)} steps"]
        if self.training_s:
            number, noun = len(self.run.members), "members" if self.config.vary else "seeds"
            rate = number * self.config.steps_per_chunk / median(self.training_s)
            over = f" over {number} {noun}" if number > 1 else ""
            parts.append(f"{short(rate)} steps/s{over}")
        left = self.time_left()
        if left is not None:
            parts.append(f"{timedelta(seconds=round(left))} left")
        return parts

    def _scores(self) -> list[str]:
        """Return the scores of the setting whose mean return is highest: the return, the headline
        if that is another metric, and the best return, each as mean ± spread over seeds."""
        if self.latest is None:
            return []
        scores = {k: v.mean(-1) for k, v in self.latest.evaluation.items()}
        settings = by_setting(self.run.members)
        means = [scores["episode_return"][places].mean() for _, places in settings]
        setting, places = settings[int(np.nan_to_num(means, nan=-np.inf).argmax())]
        parts = [f"return {spread(scores['episode_return'][places])}"]
        if self.run.headline != "episode_return":
            parts.append(f"{self.run.headline} {spread(scores[self.run.headline][places])}")
        parts.append(f"best return {spread(self.best[places])}")
        if len(settings) > 1:
            parts[0] = f"{label(setting)} (best of {len(settings)} settings): {parts[0]}"
        return parts
