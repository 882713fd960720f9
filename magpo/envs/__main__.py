"""`python -m magpo.envs` prints a table of all tasks; --markdown, as in the documentation."""

import sys
from collections.abc import Iterator

from magpo import commands, envs, tables
from magpo.types import spec

COLUMNS = ("task", "agents", "view", "actions", "steps", "terminates", "at the limit", "metric")


def row(task: str) -> list[str]:
    """Return a task's row; `view` is the length of an agent's view, with its one-hot id."""
    env = envs.make(task)
    kind = "" if env.action_kind == "discrete" else " continuous"
    return [
        task,
        str(env.num_agents),
        str(spec(env).num_features),
        f"{env.action_dim}{kind}",
        str(env.time_limit),
        env.terminates or "-",
        "truncated" if env.truncates else "terminated",
        env.headline.replace("_", " "),
    ]


def rows() -> Iterator[list[str]]:
    """Yield the tasks' rows; name on stderr the suites whose simulators are not installed."""
    missing = {}
    for task in envs.tasks():
        try:
            yield row(task)
        except ValueError as error:
            missing[task.partition("/")[0]] = str(error)
    for reason in missing.values():
        print("left out:", reason, file=sys.stderr)


def main(*, markdown: bool = False) -> None:
    """Print the table."""
    tables.show(COLUMNS, rows(), markdown)


if __name__ == "__main__":
    commands.run(__doc__, main)
