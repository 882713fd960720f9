"""Published results, listed, trained and compared; magpo.published has the rows.

usage: python -m magpo.reproduce                                  list all rows and their state
       python -m magpo.reproduce <suite>/<task> [system ...] [key=value ...]         train rows
       python -m magpo.reproduce [<suite>/<task> [system ...]] --collect          write the CSVs
       python -m magpo.reproduce --report                                 write docs/results.md
       python -m magpo.reproduce figure-5a [budget=laptop] [key=value ...]     train and draw

Rows are trained one after another, by default all rows of a task. Ctrl-C and SIGTERM save the run
and stop; the same command then continues. Finished seeds are not trained again. A row's CSV is
written when its run ends, however it ends. --collect writes CSVs without training, by default for
all rows.

An ablation is trained in the same way, and drawn when all its runs have ended or one is stopped:

  MAGPO  figure-4a figure-4b figure-5a figure-5b figure-6 figure-8
  GPAE   figure-1 figure-2 table-3 table-4

  <system>               as the paper prints it: mappo, gpae_off, ...
  paper=magpo|gpae       only this paper's rows
  seeds=[0]              each >= 0 and given once
  results_dir=results/reproduce   the folder of runs
  out=<folder>           the folder of CSVs (default: scripts/results/published in a checkout,
                         otherwise results/published) or of the ablations' figures (figures)
  budget=paper           of ablations: paper | laptop, for two cores

The runs also take allow_changes, checkpoint_share, keep, logger, platform and seeds_per_batch.
Other keys would change the experiment.
"""

import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from magpo import commands, tables
from magpo import config as configuration
from magpo.config import compose
from magpo.config.schema import RunConfig
from magpo.errors import ConfigError, nearest
from magpo.published import Row
from magpo.reproduce import ablations, results, training
from magpo.reproduce import report as reports
from magpo.reproduce.results import Key, Seeds
from magpo.values import Seed, UserPath

ROOT = Path(__file__).resolve().parents[2]
IN_CHECKOUT = (ROOT / "scripts" / "results").is_dir()
OUT = ROOT / "scripts/results/published" if IN_CHECKOUT else Path("results/published")
PASSED_ON = ("allow_changes", "checkpoint_share", "keep", "logger", "platform", "seeds_per_batch")
OWN = ("paper", "seeds", "results_dir", "out")
COLUMNS = ("paper", "task", "system", "state", "ours", "published")


def select(words: Sequence[str], paper: str | None) -> list[Row]:
    """Return the rows of a task, or of some of its systems. Raises ConfigError."""
    rows = [row for row in results.rows().values() if paper in (None, row.paper)]
    if not words:
        return rows
    task, *systems = words
    tasks = list(dict.fromkeys(row.task for row in rows))
    if task not in tasks:
        which = "published" if paper is None else f"{paper.upper()}'s"
        near = nearest(task, [*tasks, *ablations.entries()])
        raise ConfigError(
            f"no {which} row or ablation {task!r}: {near}python -m magpo.reproduce lists the rows, "
            "--help the ablations"
        )
    of_task = [row for row in rows if row.task == task]
    known = list(dict.fromkeys(row.system for row in of_task))
    for system in systems:
        if system not in known:
            near = nearest(system, known)
            raise ConfigError(f"{task} has no row {system!r}: {near}allowed: {', '.join(known)}")
    chosen = systems or known
    return [row for system in chosen for row in of_task if row.system == system]


def check(rows: Sequence[Row], overrides: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise ConfigError for an override that published rows do not take, or with a bad value."""
    check_keys(overrides, OWN)
    for row in rows:
        load(row.command, overrides, seeds)


def check_keys(overrides: Sequence[str], own: Sequence[str]) -> None:
    """Raise ConfigError for an override that would change a published experiment."""
    for text in overrides:
        key, _ = compose.parse(text)
        if key.partition(".")[0] not in PASSED_ON:
            allowed = [*own, *PASSED_ON]
            raise ConfigError(
                f"{key}: cannot be set for a published experiment: {nearest(key, allowed)}allowed: "
                f"{', '.join(allowed)}"
            )


def load(command: Sequence[str], overrides: Sequence[str], seeds: Sequence[int]) -> RunConfig:
    """Return the configuration of some seeds of a command. Raises ConfigError."""
    return configuration.load(command[0], [*command[1:], *overrides, training.listed(seeds)])


def reproduce(row: Row, seeds: Sequence[int], overrides: Sequence[str], results_dir: str) -> int:
    """Train the unfinished ones of a row's seeds and return an exit code."""
    print(f"{row.task} {row.system}, {row.source}: {reports.printed_published(row)}", flush=True)
    return training.train(row.command, seeds, overrides, results_dir)


def ablate(
    name: str, budget: str, seeds: Sequence[int], overrides: Sequence[str], folder: str, out: Path
) -> None:
    """Train and draw an ablation; exit with a run's code if that is not 0. Raises ConfigError."""
    check_keys(overrides, [*OWN, "budget"])
    ablation = ablations.find(name, budget)
    if len(seeds) > 1 and ablations.MEMORY in ablation.metrics:
        raise ConfigError(f"seeds: {name} measures runs of one seed, such as seeds=[0]")
    for command in ablation.commands:
        load(command.words, overrides, seeds)
    results_dir = f"{folder}/{name}_{budget}"
    print(f"{ablation.source}: {ablation.about}. In the paper: {ablation.shows}", flush=True)
    code = ablations.train(ablation, seeds, overrides, results_dir)
    if figure := ablations.write(ablation, results_dir, out / f"{name}_{budget}"):
        print(f"figure and values: {figure}, {figure.with_suffix('.csv')}")
    else:
        print("nothing to draw: no run has an evaluation yet")
    if code:
        sys.exit(code)


def write_csv(row: Row, results_dir: str, out: Path, facts: Mapping[str, str]) -> bool:
    """Write a row's CSV if the row has runs, and return whether it has.

    Seeds that are only in the CSV stay there.
    """
    found = results.runs(row.command, results_dir)
    measured = results.from_runs(row, found, facts)
    if measured:
        file = results.path(out, row)
        seeds = results.merged(results.read(file) if file.exists() else {}, measured)
        results.write(file, seeds)
        print(f"{file}: {_state(found, seeds)}")
    return bool(measured)


def this_process() -> dict[str, str]:
    """Return the facts about this process that no run records."""
    return {"reproduce_python": platform.python_version(), "reproduce_commit": _commit()}


def _commit() -> str:
    """Return the checkout's commit, with "-dirty" after changes to the package or its configs.

    For an installed package, returns "".
    """
    if not (ROOT / ".git").exists():  # git itself would find another project's around ours
        return ""
    git = ["git", "-C", str(ROOT)]
    try:
        asked = [["describe", "--always"], ["status", "--porcelain", "--", "magpo", "configs"]]
        commit, changes = (subprocess.check_output([*git, *words], text=True) for words in asked)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.strip() + ("-dirty" if changes else "")


def _state(runs: Sequence[results.Run], seeds: Seeds) -> str:
    """Return a row's state in words, with the steps reached or the number of seeds done."""
    unfinished = [seed.steps for seed in seeds.values() if not seed.finished]
    running = any(run.status == "running" for run in runs)
    if running or unfinished:
        return f"{'running' if running else 'interrupted'} at {max(unfinished, default=0):,} steps"
    if not seeds:
        return "not run"
    return "done, 1 seed" if len(seeds) == 1 else f"done, {len(seeds)} seeds"


def listing(
    rows: Sequence[Row], results_dir: str, collected: Mapping[Key, Seeds]
) -> Iterator[list[str]]:
    """Yield the table's lines, by task; rows without any evaluation yet share a line."""
    tasks: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tasks.setdefault((row.paper, row.task), []).append(row)
    for (paper, task), of_task in tasks.items():
        others: dict[str, list[str]] = {}
        for row in of_task:
            found = results.runs(row.command, results_dir)
            measured = results.from_runs(row, found, {})
            seeds = results.merged(collected.get(results.key(row), {}), measured)
            state = _state(found, seeds)
            if ours := reports.ours(row, seeds):
                mean = reports.printed(row, ours.mean)
                yield [paper, task, row.system, state, mean, reports.printed_published(row)]
            else:
                others.setdefault(state, []).append(row.system)
        for state, systems in others.items():
            yield [paper, task, ", ".join(systems), state, "", ""]


def main(
    *arguments: str,
    paper: Literal["magpo", "gpae"] | None = None,
    seeds: tuple[Seed, ...] = (0,),
    results_dir: UserPath = "results/reproduce",
    out: UserPath | None = None,
    budget: Literal["paper", "laptop"] | None = None,
    collect: bool = False,
    report: bool = False,
) -> None:
    """List, train, collect or report rows of published results; train and draw ablations."""
    folder = OUT if out is None else Path(out)
    words = [text for text in arguments if "=" not in text]
    overrides = [text for text in arguments if "=" in text]
    if words and words[0] in ablations.entries():
        if len(words) > 1 or paper or collect or report:
            raise ConfigError(f"{words[0]}: takes no system, paper, --collect or --report")
        drawn = Path("figures") if out is None else Path(out)
        ablate(words[0], budget or "paper", seeds, overrides, results_dir, drawn)
        return
    if report:
        if arguments or collect:
            raise ConfigError("--report takes no rows: it covers all of them")
        print_report(folder, keep=out is None and IN_CHECKOUT)
        return
    rows = select(words, paper)
    if overrides and not words:
        raise ConfigError(f"{overrides[0]}: needs a task, <suite>/<task>, to run its rows")
    if budget is not None:
        raise ConfigError("budget: is for ablations, such as figure-5a; rows have the paper's")
    check(rows if words else [], overrides, seeds)
    collected = results.read_all(folder)  # a CSV that cannot be read is refused before training
    if collect:
        written = [write_csv(row, results_dir, folder, this_process()) for row in rows]
        if not any(written):
            print(f"no runs of these rows are in {results_dir}")
    elif words:
        facts = this_process()
        for row in rows:
            code = reproduce(row, seeds, overrides, results_dir)
            write_csv(row, results_dir, folder, facts)
            if code:
                sys.exit(code)
    else:
        tables.show(COLUMNS, listing(rows, results_dir, collected), numbers=2)
    if not words and (others := results.strangers(results_dir)):
        print(f"runs in {results_dir} that belong to no row: {len(others)}, such as {others[-1]}")


def print_report(out: Path, keep: bool) -> None:
    """Print the report and, if `keep`, write it to docs/results.md."""
    text = reports.markdown(out)
    print(text, end="")
    if keep:
        (ROOT / "docs" / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    commands.run(__doc__, main)
