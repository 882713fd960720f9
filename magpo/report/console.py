"""A run's display: live on a terminal, one line per evaluation elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from statistics import median
from typing import Any

import jax
import numpy as np
from rich.console import Console as Terminal
from rich.filesize import decimal
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from magpo import tables
from magpo.config.members import Member, by_setting, label, short_key, text
from magpo.config.schema import RunConfig
from magpo.files import complain
from magpo.hardware import processes
from magpo.hardware.devices import layout
from magpo.report.measurements import ABSOLUTE_EVALUATIONS, Measurement, Run
from magpo.types import Environment

SPARSE_SUITES = ("rware",)
HINT = """\
Rewards are sparse on this task: a quick run learns little. To see learning in minutes:
  make demo    or    python -m magpo.systems.{system} env=lbf/2s-8x8-2p-2f-coop budget=quick"""


def spread(values: np.ndarray) -> str:
    """Return mean ± sample standard deviation over seeds, (S,); the mean alone for one seed."""
    digits, std = 1 if abs(values.mean()) >= 99.95 else 2, sample_std(values)
    mean = f"{values.mean():.{digits}f}"
    return mean if std is None else f"{mean} ± {std:.{digits}f}"


def sample_std(values: np.ndarray) -> float | None:
    """Return the sample standard deviation over seeds, (S,); None for one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def member_table(members: Sequence[Member], columns: Mapping[str, np.ndarray]) -> Table:
    """Return a table with a row for each member, and for each setting's mean over seeds.

    `columns` are scores (M,), integers (M,), which get no mean, or metrics of K episodes (M, K).
    For the latter, a member's row shows mean ± standard deviation.
    """

    def cell(value: Any) -> str:
        if value.ndim:
            return f"{value.mean():.3f} ± {value.std():.3f}"
        return format(value, ".3f" if value.dtype.kind == "f" else ",")

    table = tables.plain([*map(short_key, members[0].setting), "seed", *columns])
    for place, (seed, setting) in enumerate(members):
        cells = [cell(value[place]) for value in columns.values()]
        table.add_row(*map(text, setting.values()), str(seed), *cells)
    means = {name: v.mean(-1) if v.ndim == 2 else v for name, v in columns.items()}
    for setting, places in by_setting(members):
        if len(places) > 1:
            cells = [spread(v[places]) if v.dtype.kind == "f" else "" for v in means.values()]
            table.add_row(*map(text, setting.values()), "mean", *cells, style="bold")
    return table


class _Output:
    """Standard output that never stops the run: its first error silences it.

    Characters that its encoding lacks become question marks.
    """

    def __init__(self) -> None:
        self.stream: Any = sys.stdout
        self.broken = self.stream is None  # closed before Python started
        self.encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.isatty = getattr(self.stream, "isatty", lambda: False)
        self.flush = lambda: None  # `write` flushes

    def write(self, text: str) -> None:
        if not self.broken:
            try:
                self.stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
                self.stream.flush()
            except (OSError, ValueError) as error:
                self.broken = True
                complain(f"warning: the console cannot be written: {error}; training continues")


class Console:
    """The display of one run."""

    def __init__(self, run: Run, config: RunConfig) -> None:
        self.run, self.config = run, config
        self.metrics = dict.fromkeys(["episode_return", run.headline])
        shown = config.logger.console and processes.is_first()
        output: Any = _Output()
        self.terminal = Terminal(file=output, highlight=False, quiet=not shown)
        columns = BarColumn(20), TextColumn("{task.description}", table_column=Column())
        self.progress = Progress(
            *columns, console=self.terminal, transient=True, disable=not shown, auto_refresh=False
        )
        self.task = self.progress.add_task("", total=config.trained_steps)
        self.best = np.full(len(run.members), -np.inf)  # (M,) mean episode return
        # Only the last chunks, because a machine's pace changes.
        self.chunk_s: deque[float] = deque(maxlen=9)
        self.began, self.compiling_s, self.earlier_s = time.perf_counter(), 0.0, 0.0
        self.resumed_at: int | None = None  # steps

    def header(self, env: Environment, policy: Any, params: Any) -> None:
        """Print a summary of the run. `policy` is the deployed part of `params`; both (M, ...)."""
        config, number = self.config, len(self.run.members)
        sizes = [sum(x.size for x in jax.tree.leaves(tree)) // number for tree in (policy, params)]
        actions = "actions" if env.action_kind == "discrete" else "action dimensions"
        device = f"{layout(config).mesh.size} x {jax.devices()[0].device_kind}"
        several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        rounded = f", {config.total_steps:,} rounded down to whole chunks"
        rows = {
            "agents": f"{env.num_agents}, with {env.action_dim} {actions} each",
            "parameters": f"{sizes[0]:,} in the policy, {sizes[1]:,} in training",
            "seeds": ", ".join(map(str, config.seeds)),
            **{short_key(key): ", ".join(map(text, values)) for key, values in config.vary.items()},
            "members": f"{number:,}",
            "device": f"{device}{several}, {config.precision}",
            "steps": f"{config.trained_steps:,} per member"
            + rounded * (config.trained_steps < config.total_steps),
            "updates": f"{config.num_updates:,}, each of {config.num_envs} environments x "
            f"{config.rollout_length} steps",
            "evaluation": f"{config.eval_episodes} episodes every {config.steps_per_chunk:,} steps",
            "values": "tuned for this task" if config.tuned else "defaults",
            **({"game": "as published"} if config.published else {}),
            **({} if self.resumed_at is None else {"resumed": self._resumed()}),
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

    def _resumed(self) -> str:
        at_end = self.resumed_at == self.config.trained_steps
        return f"at {self.resumed_at:,} steps" + ", where it had finished" * at_end

    def footprint(self, needed: int, available: int) -> None:
        """Print the memory that training needs on each device; warn if there is less."""
        self.line(f"memory: {decimal(needed)} of {decimal(available)} on each device")
        if needed > available:
            self.warn("training needs more memory than there is: lower num_envs or seeds_per_batch")

    def line(self, line: str, style: str = "") -> None:
        """Print one line, never wrapped, so that paths and commands can be copied."""
        self.terminal.print(Text(line, style), soft_wrap=True)

    def warn(self, warning: str) -> None:
        """Print a warning."""
        self.line(f"warning: {warning}", "yellow")

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Print that programs are compiling, then how long it took."""
        start = time.perf_counter()
        self.line("compiling …")
        yield
        self.compiling_s = time.perf_counter() - start
        self.line(f"compiled in {self.compiling_s:.1f} s")

    def resume(self, measurement: Measurement) -> None:
        """Restore best returns and elapsed time from a measurement of the run before its resume."""
        self._keep_best(measurement)
        self.earlier_s = measurement.wall_s
        if measurement.chunk is not None:
            self.resumed_at = measurement.env_steps[0]

    def update(self, measurement: Measurement) -> None:
        """Show an evaluation: beside the progress bar on a terminal, elsewhere as a line."""
        self._keep_best(measurement)
        steps, number = measurement.env_steps[0], len(self.run.members)
        parts = [f"{steps:,} of {self.config.trained_steps:,} steps"]
        if timing := measurement.timing:
            self.chunk_s.append(timing["training_s"] + timing["evaluation_s"])
            rate = number * self.config.steps_per_chunk / timing["training_s"]
            parts.append(f"{rate:,.0f} steps/s" + f" over {number} members" * (number > 1))
            left = median(self.chunk_s) * (self.config.num_evaluations - (measurement.chunk or 0))
            left += ABSOLUTE_EVALUATIONS * self.config.absolute_metric * timing["evaluation_s"]
            parts.append(f"{timedelta(seconds=round(left))} left")
        line = ", ".join(parts + self._scores(measurement.evaluation))
        self.progress.update(self.task, completed=steps, description=line, refresh=True)
        if not self.terminal.is_terminal:
            self.line(line)

    def finished(
        self, measurements: Sequence[Measurement], best: np.ndarray, absolute: Measurement | None
    ) -> None:
        """Print the final table. `best` is the index of each member's best evaluation, (M,)."""
        columns = {}
        for metric in self.metrics:
            scores = np.array([m.evaluation[metric].mean(-1) for m in measurements])  # (K, M)
            name = metric.removeprefix("episode_")
            columns[f"final {name}"] = scores[-1]
            columns[f"best {name}"] = scores[best, range(len(best))]
            if absolute:
                columns[f"absolute {name}"] = absolute.evaluation[metric].mean(-1)
        columns["best at step"] = best * self.config.steps_per_chunk
        self.terminal.print(member_table(self.run.members, columns))
        if absolute:
            episodes = absolute.evaluation["episode_return"].shape[1]
            self.line(f"absolute: the best parameters, played again for {episodes} episodes")
        total_s = time.perf_counter() - self.began + self.earlier_s
        total, compiling, earlier = (
            timedelta(seconds=round(s)) for s in (total_s, self.compiling_s, self.earlier_s)
        )
        before = f", {earlier} before it was resumed" if self.earlier_s else ""
        self.line(f"done in {total} ({compiling} of it compiling{before})")
        self.line(f"results: {self.run.folder}")

    def _keep_best(self, measurement: Measurement) -> None:
        self.best = np.fmax(self.best, measurement.evaluation["episode_return"].mean(-1))

    def _scores(self, evaluation: dict[str, np.ndarray]) -> list[str]:
        """Return the scores of the setting with the highest mean return, as mean ± spread over
        seeds: the return, the headline metric if it is another one, and the best return."""
        returns, settings = evaluation["episode_return"].mean(-1), by_setting(self.run.members)
        means = [returns[places].mean() for _, places in settings]
        setting, places = settings[int(np.nan_to_num(means, nan=-np.inf).argmax())]
        scores = {name.removeprefix("episode_"): evaluation[name].mean(-1) for name in self.metrics}
        scores["best return"] = self.best
        parts = [f"{name} {spread(values[places])}" for name, values in scores.items()]
        if len(settings) > 1:
            parts[0] = f"{label(setting)} (best of {len(settings)} settings): {parts[0]}"
        return parts
