"""`python -m magpo.systems` prints a table of all systems; --markdown, as in the documentation."""

from magpo import commands, contract, plugins, tables

COLUMNS = ("system", "centralised", "deployed", "carry", "parameters", "actions")


def row(name: str) -> list[str]:
    """Return a system's row of cells."""
    card = contract.algorithm(plugins.system(name)).CARD
    words = [card.centralised, card.deployed.value, card.carry, card.parameters.value]
    return [name, *words, card.actions]


def main(*, markdown: bool = False) -> None:
    """Print the table."""
    tables.show(COLUMNS, map(row, plugins.systems()), markdown)


if __name__ == "__main__":
    commands.run(__doc__, main)
