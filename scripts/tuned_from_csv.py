"""Write configs/tuned/<system>/<suite>/<task>.yaml from a table of tuned values.

    python scripts/tuned_from_csv.py tuned_hyperparameters.csv magpo

The table has the columns `system,suite,task` and one per value; an empty cell does not apply.
The budget's columns (environments, updates, evaluations) are left out: budget/ has them.
"""

import argparse
import csv
from pathlib import Path

TUNED = Path(__file__).parents[1] / "configs" / "tuned"
PPO = ("actor_lr", "critic_lr", "ppo_epochs", "num_minibatches", "clip_eps", "ent_coef")
SYSTEM = (*PPO, "max_grad_norm", "recurrent_chunk_size", "delta", "lambda")
NETWORK = ("embed_dim", "n_head", "n_block", "decay_scaling_factor")
RENAMED = {"lambda": "rl_coef"}
NETWORK_PART = {"magpo": "guider"}  # whose sizes the network columns are


def render(row: dict[str, str]) -> str:
    """One row as the text of a YAML file."""
    lines = ["# @package _global_", "# Tuned by the paper's authors.", "system:"]
    lines += [f"  {RENAMED.get(name, name)}: {row[name]}" for name in SYSTEM if row[name]]
    if any(row[name] for name in NETWORK):
        lines += ["network:", f"  {NETWORK_PART[row['system']]}:"]
        lines += [f"    {name}: {row[name]}" for name in NETWORK if row[name]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write one system's files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("system")
    args = parser.parse_args()
    with args.table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["system"] == args.system]
    for row in rows:
        path = TUNED / args.system / row["suite"] / f"{row['task']}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(row))
    print(f"{len(rows)} files under {TUNED / args.system}")


if __name__ == "__main__":
    main()
