"""Generator of configs/tuned_values/<system>/<suite>/<task>.yaml from a table of tuned values.

    python scripts/tuned_from_csv.py

The table is scripts/published/tuned_hyperparameters.csv unless another is given. It has the columns
`system,suite,task` and one for each value; a value with an empty cell does not apply.
MAGPO's values are Sable's with delta and lambda tuned on top, so Sable and CTDS take them on tasks
where they have none. The budget's columns (environments, updates, evaluations) are left out because
configs/budget has them, and IPPO's rows because they equal MAPPO's.
"""

import csv
from pathlib import Path

from magpo import commands

TABLE = Path(__file__).parent / "published" / "tuned_hyperparameters.csv"
TUNED = Path(__file__).parents[1] / "configs" / "tuned_values"
PPO = ("actor_lr", "critic_lr", "ppo_epochs", "num_minibatches", "clip_eps", "ent_coef")
SYSTEM = (*PPO, "max_grad_norm", "recurrent_chunk_size", "delta", "lambda")
NETWORK = ("embed_dim", "n_head", "n_block", "decay_scaling_factor")
RENAMED = {"lambda": "rl_coef"}
NETWORK_PART = {"magpo": "guider", "ctds": "guider"}  # to which the network columns apply
HEIRS = ("sable", "ctds")  # inherit MAGPO's values


def render(system: str, row: dict[str, str]) -> str:
    """Return one row as the text of a YAML file."""
    own = system == row["system"]
    note = "" if own else f" for {row['system'].upper()}, which shares them"
    lines = [f"# Tuned by the paper's authors{note}.", "system:"]
    names = [name for name in SYSTEM if own or name not in ("delta", "lambda")]
    lines += [f"  {RENAMED.get(name, name)}: {row[name]}" for name in names if row[name]]
    if any(row[name] for name in NETWORK):
        part = NETWORK_PART.get(system)
        lines += ["network:", *([f"  {part}:"] if part else [])]
        indent = "    " if part else "  "
        lines += [f"{indent}{name}: {row[name]}" for name in NETWORK if row[name]]
    return "\n".join(lines) + "\n"


def texts(table: Path) -> dict[str, str]:
    """Return the text of each file by its path below `TUNED`."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["system"] != "ippo"]
    of = {(row["system"], f"{row['suite']}/{row['task']}"): row for row in rows}
    for (system, task), row in list(of.items()):
        for heir in HEIRS if system == "magpo" else ():
            of.setdefault((heir, task), row)
    return {f"{system}/{task}.yaml": render(system, row) for (system, task), row in of.items()}


def main(table: Path = TABLE) -> None:
    """Write all systems' files."""
    written = texts(table)
    for name, text in written.items():
        path = TUNED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(f"{len(written)} files under {TUNED}")


if __name__ == "__main__":
    commands.run(__doc__, main)
