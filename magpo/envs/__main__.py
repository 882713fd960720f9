"""`python -m magpo.envs`: all tasks in a table; --markdown: as the README has it."""

import sys

from magpo import envs, tables

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
    rows, missing = [], {}
    for task in envs.tasks():
        try:
            rows.append(row(task))
        except ValueError as error:  # a suite's simulator is not installed
            missing[task.partition("/")[0]] = str(error)
    tables.show("magpo.envs", "tasks", COLUMNS, rows)
    for reason in missing.values():
        print("left out:", reason, file=sys.stderr)


if __name__ == "__main__":
    main()
