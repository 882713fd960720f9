"""Tables: on the terminal, as Markdown for the README, as CSV."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


def show(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    markdown: bool = False,
    justify: Literal["left", "right"] = "left",
) -> None:
    """Print a table; in Markdown the first column has names of code."""
    if markdown:
        print("|", " | ".join(columns), "|")
        print("|", " | ".join("---" for _ in columns), "|")
        for cells in rows:
            print("|", " | ".join([f"`{cells[0]}`", *cells[1:]]), "|")
        return
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    console = Console(highlight=False)
    console.width = max(console.width, 130)
    console.print(table)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV whose columns are the first row's keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
