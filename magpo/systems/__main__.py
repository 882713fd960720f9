"""`python -m magpo.systems`: all systems in a table; --markdown: as the README has it."""

import argparse
from importlib import import_module

from rich.console import Console
from rich.table import Table

from magpo import config

COLUMNS = ("system", "centralised", "deployed", "memory", "parameters", "actions")


def row(name: str) -> list[str]:
    """A system's cells."""
    card = import_module(f"magpo.systems.{name}").CARD
    return [name, *card, "discrete, continuous"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m magpo.systems", description="List all.")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    rows = [row(name) for name in config.systems()]
    if parser.parse_args().markdown:
        print("|", " | ".join(COLUMNS), "|")
        print("|", " | ".join("---" for _ in COLUMNS), "|")
        for cells in rows:
            print("|", " | ".join([f"`{cells[0]}`", *cells[1:]]), "|")
        return
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in COLUMNS:
        table.add_column(name, no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table)
    print("python -m magpo.systems.<system> --help: what each can be given")


if __name__ == "__main__":
    main()
