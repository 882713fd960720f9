"""Fill the tables of docs/speed.md with what was measured.

    python scripts/speed_page.py

A table stands between `<!-- table: name -->` and `<!-- end -->`; its cells come from the CSVs in
scripts/results/.
"""

import csv
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from magpo import commands

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "speed.md", ROOT / "scripts" / "results"

Row = Mapping[str, str]
Columns = dict[str, Callable[[Row], str]]


def number(name: str, form: str = ",.0f") -> Callable[[Row], str]:
    """Return a column that formats a number; it is empty where there is none."""
    return lambda row: format(float(row[name]), form) if row[name] else "-"


def text(name: str) -> Callable[[Row], str]:
    """Return a column that prints words as code."""
    return lambda row: f"`{row[name]}`"


def ours(row: Row) -> str:
    """Return the system, the task and the options of a command of ours."""
    options = r" (total_steps|num_evaluations|eval_episodes|absolute_metric|keep|logger\.plot)=\S+"
    return f"`{re.sub(options, '', row['first']).removeprefix('python -m magpo.systems.')}`"


def ratio(row: Row) -> str:
    """Return how many times as fast the first command is, with its lowest and highest round."""
    return "{:.2f} ({:.2f} to {:.2f})".format(
        *(float(row[name]) for name in ("ratio", "lowest", "highest"))
    )


def last_trial(row: Row) -> int:
    """Return the number of a batch's last trial."""
    return int(row["first_trial"]) + int(row["trials"]) - 1


TABLES: dict[str, tuple[str, Columns]] = {
    "peer": (
        "peer.csv",
        {
            "command": ours,
            "steps/s": number("first_steps_per_s"),
            "released: steps/s": number("second_steps_per_s"),
            "ratio (lowest to highest)": ratio,
            "CPU s per update": number("first_cpu_s", ".2f"),
            "released: CPU s": number("second_cpu_s", ".2f"),
        },
    ),
    "systems": (
        "speed.csv",
        {
            "system": lambda row: row["system"],
            "options": text("overrides"),
            "cache": lambda row: row["compilation_cache"] or "-",
            "steps/s": number("steps_per_s"),
            "compile and first update (s)": number("first_update_s", ".1f"),
            "peak memory (GB)": number("peak_memory_gb", ".2f"),
            "share of the matmul rate": number("share_of_matmul_rate", ".0%"),
        },
    ),
    "seeds": (
        "seeds.csv",
        {
            "options": text("overrides"),
            "steps/s": number("steps_per_s"),
            "one seed alone": number("steps_per_s_of_one_seed_alone"),
            "speedup": number("speedup", ".2f"),
            "start (s)": number("start_up_s", ".0f"),
            "peak memory (GB)": number("peak_memory_gb", ".2f"),
        },
    ),
    "members": (
        "members.csv",
        {
            "members": lambda row: row["members"],
            "total (s)": number("total_s", ".0f"),
            "CPU (s)": number("cpu_s", ".0f"),
            "steps/s in training": number("steps_per_s"),
        },
    ),
    "sweep": (
        "sweep.csv",
        {
            "trials": lambda row: f"{row['first_trial']} to {last_trial(row)}",
            "in the search (s)": number("search_s"),
            "one at a time (s)": number("alone_s"),
            "ratio": number("ratio", ".2f"),
        },
    ),
    "gpae": (
        "gpae_cost.csv",
        {
            "command": text("experiment"),
            "update (s)": number("update_s", ".2f"),
            "relative": number("relative", ".2f"),
        },
    ),
    "acting": (
        "acting.csv",
        {
            "network": lambda row: row["network"],
            "agents": lambda row: row["agents"],
            "step (µs)": number("step_us", ".1f"),
            "per agent (µs)": number("per_agent_us", ".2f"),
        },
    ),
    "gpu": (
        "gpu/speed.csv",
        {
            "command": text("command"),
            "code": lambda row: row["code"],
            "GPU": lambda row: row["device"],
            "steps/s": number("steps_per_s"),
            "kernels per update": number("number"),
            "busy (ms)": number("busy_ms"),
            "idle (ms)": number("idle_ms"),
        },
    ),
}


def table(name: str) -> str:
    """Return a table in Markdown."""
    file, columns = TABLES[name]
    with (RESULTS / file).open(newline="", encoding="utf-8") as stream:
        rows = [[column(row) for column in columns.values()] for row in csv.DictReader(stream)]
    cells = [[*columns], ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def filled(page: str) -> str:
    """Return the page with its tables as the CSVs have them."""
    marked = r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)"
    return re.sub(marked, lambda found: f"{found[1]}\n{table(found[2])}\n\n", page, flags=re.S)


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    commands.run(__doc__, main)
