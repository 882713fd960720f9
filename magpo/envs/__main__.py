"""`python -m magpo.envs`: all tasks in a table; --markdown: as the README has it."""

import argparse

from rich.console import Console
from rich.table import Table

from magpo import envs

COLUMNS = ("task", "agents", "view", "actions", "steps", "terminates", "at the limit", "metric")


def row(task: str) -> list[str]:
    """A task's cells; `view` is the length of an agent's, its one-hot id included."""
    env = envs.make(task)
    view = env.observation_spec.agents_view.shape[-1]
    kind = "" if env.action_kind == "discrete" else " continuous"
    return [
        task,
        str(env.num_agents),
        str(view),
        f"{env.action_dim}{kind}",
        str(env.time_limit),
        env.terminates or "-",
        "truncated" if env.truncates else "terminated",
        env.headline.replace("_", " "),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m magpo.envs", description="List all tasks.")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    as_markdown = parser.parse_args().markdown
    rows = [row(task) for task in envs.tasks()]
    if as_markdown:
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
    console.width = max(console.width, 130)
    console.print(table)


if __name__ == "__main__":
    main()
