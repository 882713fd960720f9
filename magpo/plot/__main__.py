"""Figures and tables of a paper from results folders.

usage: python -m magpo.plot <folder> [<folder> ...] [key=value ...]

  out=figures            the folder for figures and tables
  metric=<name>          an evaluation metric, such as episode_return; by default each suite's
                         headline metric, the only one that is compared with published results
  order=[magpo,mappo]    the systems that come first in legends, rows, columns and colours
  formats=[png]          png, pdf, svg
  reps=2000              samples of the bootstrap, >= 1

Reads all runs under the folders, finished or not, and writes

  <suite>_<task>                       evaluation curves: mean over seeds, and its band
  aggregates_<suite>                   median, IQM, mean and optimality gap
  profiles_<suite>                     performance profiles
  iqm_over_steps_<suite>               sample efficiency
  probability_of_improvement_<suite>   P(X > Y) for each pair of systems
  aggregates.csv                       the numbers of the figures aggregates_<suite>
  summary.csv, table.tex               scores of each system and task, beside the published ones

Runs of one system and task that differ only in their seeds are pooled; if several runs have a
seed, the newest counts. Where settings differ, between runs or within a run that varies them, each
setting has its own line, named after the differences.

A seed's score is its absolute metric: the mean over the episodes that its best policy plays at the
end of training (320 by default). If a seed of a system lacks it on a task, all seeds of the system
use their last common evaluation there, and the figures say so. Aggregates normalise scores per
task. Win rates and LBF's return stay as they are, from 0 to 1; for other metrics 0 and 1 are the
smallest and the largest evaluation of all systems and seeds at any step. Intervals are percentiles
of a bootstrap that resamples seeds within each task. Needs rliable: pip install 'magpo[plot]'
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Literal

from magpo import commands, tables
from magpo.errors import ConfigError
from magpo.plot import aggregate, draw, read, table
from magpo.plot.read import Line
from magpo.values import PositiveInt, UserPath, unknown_key


def main(
    folder: UserPath,
    *more: str,
    out: UserPath = "figures",
    metric: str | None = None,
    order: tuple[str, ...] = (),
    formats: tuple[Literal["png", "pdf", "svg"], ...] = ("png",),
    reps: PositiveInt = 2000,
) -> None:
    """Write all figures and tables."""
    aggregate.rliable_metrics()  # before anything is written
    for word in more:
        if "=" in word and not Path(word).exists():
            raise ConfigError(unknown_key(word.partition("=")[0], list(signature(main).parameters)))
    runs = read.find([Path(folder), *map(Path, more)])
    lines = read.pool(runs, metric, order)
    try:
        write(Path(out), lines, formats, reps)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from error
    for note in notes(lines):
        print(f"plot: note: {note}", file=sys.stderr)
    drawn = {line.suite for line in lines}
    if left_out := sorted({run.suite for run in runs} - drawn):
        print(f"plot: note: left out, no {metric}: {', '.join(left_out)}", file=sys.stderr)
    print(f"figures and tables: {out}")


def write(out: Path, lines: Sequence[Line], formats: Sequence[str], reps: int) -> None:
    """Write all figures and tables into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    colours = draw.colours_of(lines)
    tables.write(out / "summary.csv", table.summary(lines))
    (out / "table.tex").write_text("\n".join(table.latex(lines)) + "\n", encoding="utf-8")
    tasks, suites = defaultdict[str, list[Line]](list), defaultdict[str, list[Line]](list)
    for line in lines:
        tasks[f"{line.suite}_{line.task}"].append(line)
        suites[line.suite].append(line)
    for name, same in tasks.items():
        draw.save(draw.task(same, colours), out / name, formats)
    rows: list[dict[str, object]] = []
    for suite, same in suites.items():
        scores = aggregate.normalised(same)
        found = aggregate.aggregates(scores, reps)
        rows += table.aggregates(suite, found)
        figures = {
            "aggregates": draw.aggregates(found, same, colours),
            "profiles": draw.profiles(aggregate.profiles(scores, reps), same, colours),
            "iqm_over_steps": draw.over_steps(aggregate.over_steps(same, reps), same, colours),
        }
        if pairs := aggregate.improvement(scores, reps):
            figures["probability_of_improvement"] = draw.improvement(pairs, same)
        for name, figure in figures.items():
            draw.save(figure, out / f"{name}_{suite}", formats)
    tables.write(out / "aggregates.csv", rows)


def notes(lines: Sequence[Line]) -> Iterator[str]:
    """Yield warnings to readers of the aggregates."""
    ends, sizes = defaultdict[str, set[int]](set), defaultdict[tuple[str, str], set[int]](set)
    for line in lines:
        ends[f"{line.suite}/{line.task}"].add(int(line.steps[-1]))
        sizes[line.suite, line.label].add(len(line.score))
    for task, steps in ends.items():
        if len(steps) > 1:
            yield f"{task}: last evaluations range from {min(steps)} to {max(steps)} steps"
    few = [f"{label} on {suite}" for (suite, label), seeds in sizes.items() if min(seeds) < 5]
    if few:
        yield f"fewer than 5 seeds, so the aggregates' intervals are too narrow: {', '.join(few)}"
    for (suite, label), seeds in sizes.items():
        if len(seeds) > 1:
            yield f"{label} on {suite}: aggregates use only {min(seeds)} seeds of every task"
    for suite in sorted({line.suite for line in lines}):
        tasks = defaultdict[str, set[str]](set)
        for line in lines:
            if line.suite == suite:
                tasks[line.label].add(line.task)
        if len(set(map(frozenset, tasks.values()))) > 1:
            yield f"{suite}: systems have different tasks, so their aggregates cannot be compared"
    without = [f"{x.label} on {x.suite}/{x.task}" for x in lines if x.absolute is None]
    if without:
        yield f"no absolute metric, the last evaluation is used: {', '.join(without)}"


if __name__ == "__main__":
    commands.run(__doc__, main)
