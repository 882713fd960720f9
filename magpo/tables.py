"""A table on the terminal, or as Markdown for the README."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show(module: str, what: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """What `python -m <module> [--markdown]` prints; the first column has names."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"List all {what}.")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    if parser.parse_args().markdown:
        print("|", " | ".join(columns), "|")
        print("|", " | ".join("---" for _ in columns), "|")
        for cells in rows:
            print("|", " | ".join([f"`{cells[0]}`", *cells[1:]]), "|")
        return
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    console = Console(highlight=False)
    console.width = max(console.width, 130)
    console.print(table)
