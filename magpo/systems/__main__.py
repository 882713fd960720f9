"""`python -m magpo.systems`: all systems in a table; --markdown: as the README has it."""

from importlib import import_module

from magpo import config, tables

COLUMNS = ("system", "centralised", "deployed", "memory", "parameters", "actions")


def row(name: str) -> list[str]:
    """A system's cells."""
    card = import_module(f"magpo.systems.{name}").CARD
    return [name, *card, "discrete, continuous"]


def main() -> None:
    """Print the table."""
    tables.show("magpo.systems", "systems", COLUMNS, [row(name) for name in config.systems()])


if __name__ == "__main__":
    main()
