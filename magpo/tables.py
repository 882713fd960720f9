"""Tables on the terminal, as Markdown, and as CSV."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table


def show(
    columns: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool = False, numbers: int = 0
) -> None:
    """Print a table, on the terminal with its last `numbers` columns aligned to the right.

    In Markdown, the first column is set as code.
    """
    if markdown:
        named = ([f"`{name}`", *cells] for name, *cells in rows)
        for line in (columns, ["---"] * len(columns), *named):
            print("|", " | ".join(line), "|")
        return
    table = plain(columns, len(columns) - numbers)
    for cells in rows:
        table.add_row(*map(printable, cells))
    show_wide(table)


def show_lines(columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str]) -> None:
    """Print a table with exactly one line per row, so that it can be searched with grep.

    Columns other than `words` are aligned to the right.
    """
    lines = [columns, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.ljust(width) if name in words else cell.rjust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        )
        print("  ".join(cells).rstrip())


def working(text: str) -> Status:
    """Show, while the context lasts, what takes long; nothing is printed unless on a terminal."""
    return Console(stderr=True).status(text)


def plain(columns: Sequence[str], num_words: int = 0) -> Table:
    """Return an empty table without lines.

    The first `num_words` columns are aligned to the left, the others to the right.
    """
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < num_words else "right")
    return table


def show_wide(table: Table) -> None:
    """Print a table as wide as the terminal, but at least 130 columns."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, 130)
    console.print(table)


def printable(text: str) -> str:
    """Return text with its control characters replaced by question marks."""
    return "".join(c if c.isprintable() else "?" for c in text)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a CSV whose columns are the first row's keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
