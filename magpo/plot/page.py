"""One HTML page about the runs under a folder, to send to others.

usage: python -m magpo.report [results] [key=value ...]

  out=report.html      the page: one file that needs no network
  system=<name>        only the runs of this system
  env=<suite>/<task>   only the runs on this task
  state=<state>        running | finished | stopped | interrupted | failed | unknown

The page shows each task's curves and scores beside the published ones, the GIFs in the runs'
folders, the settings in which runs differ, and a list of all runs, finished or not. Seeds are
pooled, and settings kept apart, as in magpo.plot. Needs plotly: pip install 'magpo[report]'
"""

import importlib
import shlex
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.colors import to_hex
from rich.filesize import decimal

import magpo
from magpo.config.schema import WITHOUT_EFFECT
from magpo.errors import ConfigError
from magpo.files import UNREADABLE, write_aside
from magpo.plot import draw, interactive, read
from magpo.plot.draw import Colours
from magpo.plot.read import Line
from magpo.report import curve
from magpo.report.console import spread
from magpo.runs import folders, listing
from magpo.runs.listing import State, Summary
from magpo.values import UserPath, as_argument

LARGEST = 10_000_000  # bytes of a GIF
ENDS = (*WITHOUT_EFFECT, "run.system", "run.env")  # settings without effect, or shown elsewhere


class Picture(NamedTuple):
    """A GIF in a run's folder."""

    path: Path
    uri: str  # "" if it is too large
    size: str


class Run(NamedTuple):
    """A run, as far as it can be read."""

    summary: Summary
    made_with: dict[str, str]
    curves: list[read.Run]
    problem: str  # why there are no curves; "" if there are
    pictures: list[Picture]

    @property
    def name(self) -> str:
        """The run's id."""
        return self.summary.folder.resolve().name

    @property
    def duration(self) -> str:
        """The time that training took so far."""
        with suppress(*UNREADABLE):
            return str(timedelta(seconds=round(self.summary.seconds)))
        return "-"

    @property
    def versions(self) -> str:
        """The versions of magpo and JAX."""
        names = [name for name in ("magpo", "jax") if name in self.made_with]
        return ", ".join(f"{name} {self.made_with[name]}" for name in names) or "-"

    @property
    def seeds(self) -> str:
        """The seeds, as the configuration lists them."""
        return _written(self.summary.settings.get("seeds", "-")).strip("[]").replace(",", ", ")


class Score(NamedTuple):
    """A row of a task's table."""

    label: str
    mark: str  # explained by `basis`
    colour: str
    score: str
    interval: str
    published: str
    source: str  # of the published value
    seeds: int
    steps: int


class Section(NamedTuple):
    """A task's part of the page."""

    task: str
    runs: list[Run]
    states: str
    figure: str  # HTML; "" without any evaluation
    scores: list[Score]  # highest first
    basis: str  # which evaluation the scores are from
    problems: list[str]
    pictures: list[tuple[Run, Picture]]
    render: str  # the command that draws an episode; "" if none can be drawn
    differ: dict[str, list[str]]  # the settings in which runs differ: a value for each run
    shared: dict[str, str]  # all others


def read_run(summary: Summary) -> Run:
    """Return a run; if its curves cannot be read, `problem` says why."""
    curves, problem = list[read.Run](), ""
    try:
        curves = [run for run in read.read(summary.folder) if run.evaluations]
        problem = "" if curves else "no evaluation yet"
    except FileNotFoundError:
        problem = "no evaluation yet"
    except UNREADABLE as error:
        problem = str(error)
    made_with = folders.made_with(summary.folder)
    return Run(summary, made_with, curves, problem, list(_pictures(summary.folder)))


def _pictures(folder: Path) -> Iterator[Picture]:
    for path in sorted(folder.glob("*.gif")):
        with suppress(OSError):
            size = path.stat().st_size
            data = path.read_bytes() if path.is_file() and size <= LARGEST else b""
            if size > LARGEST or data.startswith(b"GIF8"):
                uri = f"data:image/gif;base64,{b64encode(data).decode()}" if data else ""
                yield Picture(path, uri, decimal(size))


def _lines(runs: Sequence[Run]) -> tuple[list[Line], list[str]]:
    """Return the pooled runs of one task, and why others are not among them."""
    by_system, lines, problems = defaultdict[str, list[read.Run]](list), list[Line](), list[str]()
    for run in runs:
        for of_setting in run.curves:
            by_system[of_setting.system].append(of_setting)
    for system in sorted(by_system):
        try:
            lines += read.pool(by_system[system])
        except UNREADABLE as error:
            problems.append(str(error))
    problems += [f"{run.name}: {run.problem}" for run in runs if run.problem]
    return lines, problems


def section(
    number: int, runs: list[Run], lines: list[Line], problems: list[str], colours: Colours
) -> Section:
    """Return one task's part of the page."""
    task = runs[0].summary.task
    states = Counter(run.summary.status for run in runs)
    differ, shared = differences([run.summary for run in runs])
    marks = draw.marked([line.label for line in lines], lines)
    ranked = sorted(lines, key=lambda line: line.score.mean(), reverse=True)
    return Section(
        task=task,
        runs=runs,
        states=", ".join(f"{count} {state}" for state, count in states.items()),
        figure=interactive.figure(lines, colours, f"curves-{number}") if lines else "",
        scores=[_score(line, marks, colours) for line in ranked],
        basis=draw.basis(lines) if lines else "",
        problems=problems,
        pictures=[(run, picture) for run in runs for picture in run.pictures],
        render=_render_command(runs),
        differ=differ,
        shared=shared,
    )


def _score(line: Line, marks: dict[str, str], colours: Colours) -> Score:
    low, high, meaning = curve.band(line.score[None])
    row, interval = line.reference, f"{low[0]:.2f} to {high[0]:.2f}"
    std = f" ± {row.std:.2f}" if row and row.std is not None else ""
    return Score(
        label=line.label,
        mark=marks[line.label].removeprefix(line.label),
        colour=to_hex(colours[line.label]),
        score=spread(line.score),
        interval=interval + " (range)" * ("95 %" not in meaning) if meaning else "-",
        published=f"{row.mean:.2f}{std}" if row else "-",
        source=f"{row.source}, {row.steps}" if row else "",
        seeds=len(line.score),
        steps=int(line.steps[-1]),
    )


def _render_command(runs: Sequence[Run]) -> str:
    """Return the command that draws an episode of the run with the highest return."""
    returns = {
        run.summary.last_return: run
        for run in runs
        if run.made_with and run.summary.last_return is not None
    }
    if not returns or runs[0].summary.task.startswith("mabrax/"):  # no GIFs
        return ""
    best = returns[max(returns)]
    return f"{command('render', best)} out={shlex.quote(str(best.summary.folder / 'episode.gif'))}"


def command(program: str, run: Run) -> str:
    """Return the command that applies one of magpo's programs to a run, with its imports."""
    prefix = "run.imports."
    imports = [key.removeprefix(prefix) for key in run.summary.settings if key.startswith(prefix)]
    words = [f"run={run.summary.folder}", *(f"import={name}" for name in imports)]
    return f"python -m magpo.{program} {shlex.join(words)}"


def differences(runs: Sequence[Summary]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the settings in which runs of one task differ, and those that they share.

    A setting that only some systems have is compared between their runs only.
    """
    differ, shared = dict[str, list[str]](), dict[str, str]()
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [_written(run.settings[key]) if key in run.settings else "-" for run in runs]
        have = {run.system for run in runs if key in run.settings}
        known = {v for v, run in zip(values, runs, strict=True) if run.system in have}
        if key.partition(".")[0] in ENDS or key in ENDS or key == "vary":
            continue
        if len(known) > 1:
            differ[key] = values
        else:
            only = "" if len(have) == len({run.system for run in runs}) else ", ".join(sorted(have))
            shared[key] = known.pop() + f"   ({only})" * bool(only)
    return differ, shared


def _written(value: Any) -> str:
    with suppress(*UNREADABLE):  # a list that contains itself
        return as_argument(value)
    return "?"


def render(summaries: Sequence[Summary], title: str) -> str:
    """Return the page's HTML."""
    jinja2, offline = libraries()
    by_task = defaultdict[str, list[Run]](list)
    for summary in summaries:
        by_task[summary.task].append(read_run(summary))
    pooled = {
        task: _lines(by_task[task])
        for task in sorted(by_task, key=lambda task: (task == "?", task))
    }
    everything = [line for lines, _ in pooled.values() for line in lines]
    shared = draw.colours_of(everything)  # one colour per system on the page, if they suffice
    sections = [
        section(
            number,
            by_task[task],
            lines,
            problems,
            shared if len(shared) <= len(draw.COLOURS) else draw.colours_of(lines),
        )
        for number, (task, (lines, problems)) in enumerate(pooled.items(), 1)
    ]
    runs = [run for of_task in by_task.values() for run in of_task]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text: str = environment.get_template("page.html").render(
        title=title,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=magpo.__version__,
        versions=" and ".join(sorted({run.versions for run in runs} - {"-"})),
        sections=sections,
        runs=sorted(runs, key=lambda run: run.name),
        command=command,
        plotly=offline.get_plotlyjs(),
    )
    return text


def libraries() -> tuple[Any, Any]:
    """Return jinja2 and plotly.offline. Raises ConfigError if one is not installed."""
    try:
        return importlib.import_module("jinja2"), importlib.import_module("plotly.offline")
    except ImportError as error:
        missing = str(error.name).partition(".")[0]
        raise ConfigError(f"{missing} is not installed: pip install 'magpo[report]'") from None


def main(
    results: UserPath = "results",
    *,
    out: UserPath = "report.html",
    system: str | None = None,
    env: str | None = None,
    state: State | None = None,
) -> None:
    """Write the page."""
    libraries()
    if Path(out).is_dir():
        raise ConfigError(f"out={out}: is a folder")
    runs = listing.find(Path(results), state, system=system, task=env)
    if not runs:
        raise ConfigError(f"no{f' {state}' if state else ''} runs under {results}")
    page = render(runs, title=Path(results).resolve().name).encode(errors="replace")
    write_aside(Path(out), lambda aside: aside.write_bytes(page))
    print(f"{out}: {draw.counted(len(runs), 'run')}, {decimal(len(page))}")
