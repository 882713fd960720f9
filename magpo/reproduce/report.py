"""The report of our results beside the published ones, as Markdown."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from magpo import published
from magpo.errors import ConfigError
from magpo.published import Row
from magpo.reproduce import results
from magpo.reproduce.results import Key, Seeds

INTRODUCTION = (
    "# Published results and ours\n\n"
    "This page compares our results with the tables of the MAGPO and GPAE papers. "
    "[Published rows](guides/figures.md#published-rows) shows how to train them."
)
EXPLANATION = (
    "The column `ours` is the mean over seeds of the absolute metric in MAGPO's table, and of "
    "the final evaluation in GPAE's tables. Five seeds or more have a 95 % bootstrap interval. "
    "The verdict is `inside` if our mean, rounded as the paper rounds, is within two published "
    "standard deviations of the published mean; GPAE's Tables 3 and 4 print none, so their rows "
    "have no verdict. A result that two tables print counts once. `python -m magpo.reproduce "
    "--report` writes this page from the CSVs in `scripts/results/published/`."
)
COLUMNS = ("task", "system", "ours", "published", "verdict", "seeds", "steps", "95 % interval")


class Ours(NamedTuple):
    """Our result in a row, over the finished seeds or, if there are none, over all seeds."""

    mean: float
    interval: tuple[float, float] | None  # of the mean, 95 %
    num_seeds: int
    steps: int  # the fewest of these seeds
    finished: bool


def ours(row: Row, seeds: Seeds) -> Ours | None:
    """Return our result in a row, or None without any evaluation."""
    finished = [seed for seed in seeds.values() if seed.finished]
    chosen = finished or [seed for seed in seeds.values() if seed.last("eval") is not None]
    kind = "absolute" if finished and row.paper == "magpo" else "eval"
    values = [value for seed in chosen if (value := seed.last(kind)) is not None]
    if not values:
        return None
    interval = None
    if len(values) >= 5:
        from magpo.report import curve  # imported late, because it imports matplotlib

        low, high, _ = curve.band(np.array([values]))
        interval = float(low[0]), float(high[0])
    steps = min(seed.steps for seed in chosen)
    return Ours(float(np.mean(values)), interval, len(values), steps, bool(finished))


def printed(row: Row, value: float) -> str:
    """Return a value as text, with as many decimals as the paper prints."""
    decimals = 2 if row.paper == "magpo" else 3 if row.metric == "win_rate" else 0
    return f"{value:.{decimals}f}"


def printed_published(row: Row) -> str:
    """Return the published mean as text, with its standard deviation if there is one."""
    std = "" if row.std is None else f" ± {printed(row, row.std)}"
    return printed(row, row.mean) + std


def verdict(row: Row, found: Ours) -> str:
    """Return whether our result is inside, above or below the published mean ± 2 std."""
    if not found.finished:
        return f"unfinished at {found.steps:,} steps"
    if row.std is None:
        return "-"
    distance = float(printed(row, found.mean)) - row.mean
    if abs(distance) <= 2 * row.std + 1e-9:
        return "inside"
    return "above" if distance > 0 else "below"


def findings(out: Path) -> dict[Key, str]:
    """Return the findings about rows in findings.csv. Raises ConfigError."""
    file = out / "findings.csv"
    if not file.exists():
        return {}
    found = dict[Key, str]()
    with file.open(newline="", encoding="utf-8") as stream:
        for line in csv.DictReader(stream):
            try:
                row = line["paper"], line["task"], line["system"]
                found[row] = line["finding"].strip()
            except (KeyError, AttributeError):
                raise ConfigError(f"{file}: needs paper, task, system, finding") from None
            if row not in results.rows():
                raise ConfigError(f"{file}: magpo.published has no row {' '.join(map(str, row))}")
    return found


def markdown(out: Path) -> str:
    """Return the report of all CSVs. Raises ConfigError."""
    seeds, texts = results.read_all(out), findings(out)
    parts = [INTRODUCTION, _summary(seeds), EXPLANATION]
    for source, printed_rows in groupby(published.rows(), key=lambda row: row.source):
        parts += [f"## {source}", *_section(list(printed_rows), seeds, texts)]
    return "\n\n".join(parts) + "\n"


def _summary(seeds: Mapping[Key, Seeds]) -> str:
    """Return the sentence that counts the results run so far and their verdicts."""
    rows = results.rows().values()
    run = [(row, found) for row in rows if (found := ours(row, seeds.get(results.key(row), {})))]
    counts = Counter(verdict(row, found).partition(" ")[0] for row, found in run)
    words = ("inside", "above", "below", *(["unfinished"] if counts["unfinished"] else []))
    verdicts = ", ".join(f"{counts[word]} {word}" for word in words)
    return f"So far {len(run)} of {len(rows)} results have been run: {verdicts}."


def _section(
    rows: Sequence[Row], seeds: Mapping[Key, Seeds], texts: Mapping[Key, str]
) -> Iterator[str]:
    """Yield the paragraphs about a printed table."""
    found = [(row, ours(row, seeds.get(results.key(row), {}))) for row in rows]
    run = [(row, result) for row, result in found if result]
    if run:
        cells = [COLUMNS, ["---"] * len(COLUMNS), *(_cells(row, result) for row, result in run)]
        yield "\n".join(f"| {' | '.join(line)} |" for line in cells)
    notes = [note for row, result in run if (note := _note(row, result, texts))]
    if notes:
        yield "\n".join(notes)
    not_run = [row for row, result in found if not result]
    if not_run:
        counts = Counter(row.task.partition("/")[0] for row in not_run)
        by_suite = ", ".join(f"{suite} {count}" for suite, count in counts.items())
        yield f"Not run: {len(not_run)} rows ({by_suite})."


def _cells(row: Row, found: Ours) -> list[str]:
    return [
        row.task,
        row.system,
        printed(row, found.mean),
        printed_published(row),
        verdict(row, found),
        str(found.num_seeds),
        f"{found.steps:,}",
        " to ".join(printed(row, edge) for edge in found.interval or ()) or "-",
    ]


def _note(row: Row, found: Ours, texts: Mapping[Key, str]) -> str:
    """Return the line with a row's finding, or "" in all tables but the first with the row."""
    text = texts.get(results.key(row), "")
    if not text and verdict(row, found) in ("above", "below"):
        text = "no finding yet."
    first = results.rows()[results.key(row)] == row
    return f"- {row.task}, {row.system}: {text}" if text and first else ""
