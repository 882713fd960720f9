r"""Interleaved timings of several experiments, so that machine noise affects all equally.

    python scripts/compare.py scripts/results/cost.csv rounds=20 \
        mappo env=lbf/8x8-2p-2f-coop num_envs=64  happo env=lbf/8x8-2p-2f-coop num_envs=64

An experiment is a system followed by its overrides. `relative` is the median over rounds of its
time divided by the first experiment's in the same round.
"""

import random
import statistics
import time
from operator import truediv
from pathlib import Path
from typing import Any

import jax

from magpo import commands, config, contract, experiment, plugins, tables
from magpo.values import PositiveInt

wait: Any = jax.block_until_ready


def start(system: str, *overrides: str) -> tuple[Any, Any]:
    """Return an experiment's compiled update, and its state after one update."""
    settings = config.load(system, overrides)
    short = [f"total_steps={settings.steps_per_update}", "num_evaluations=1"]
    settings = config.load(system, [*overrides, *short])
    algorithm = contract.algorithm(plugins.system(system))
    experiment.set_up_jax(settings)
    env = experiment.make_env(settings)
    setup = experiment.make_setup(algorithm, env, settings)
    programs, _ = experiment.build_programs(algorithm, setup, env, settings)
    inputs = experiment.member_inputs(settings)
    update = programs.train_chunk
    return update, wait(update(programs.init(inputs.train_keys, inputs.hyper)))[0]


def main(table: Path, system: str, *others: str, rounds: PositiveInt = 20) -> None:
    """Measure and write a table."""
    experiments = [[system]]
    for word in others:
        if "=" in word:
            experiments[-1].append(word)
        else:
            experiments.append([word])
    updates, states = map(list, zip(*(start(*words) for words in experiments), strict=True))
    seconds: list[list[float]] = [[] for _ in updates]
    for _ in range(rounds):
        for i in random.sample(range(len(updates)), len(updates)):
            begun = time.perf_counter()
            states[i] = wait(updates[i](states[i]))[0]
            seconds[i].append(time.perf_counter() - begun)
    rows = [
        {
            "experiment": " ".join(words),
            "device": jax.devices()[0].device_kind,
            "update_s": f"{statistics.median(times):.3f}",
            "relative": f"{statistics.median(map(truediv, times, seconds[0])):.3f}",
        }
        for words, times in zip(experiments, seconds, strict=True)
    ]
    tables.write(table, rows)
    for row in rows:
        print(*row.values())


if __name__ == "__main__":
    commands.run(__doc__, main)
