"""How the time to act grows with the number of agents, for the autoregressive networks.

    python scripts/acting.py scripts/results/acting.csv

Default sizes (64 features, one head, one block), 64 environments, medians of turns of 50 steps; per
agent the time stays as it is where acting is linear.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from magpo import tables
from magpo.networks.mat import MAT
from magpo.networks.sable import Sable
from magpo.types import Array, Observation

NUM_ENVS, NUM_FEATURES, NUM_ACTIONS, STEPS, TURNS = 64, 20, 6, 50, 7


def network(name: str, num_agents: int) -> Any:
    """At its default size."""
    sizes: dict[str, Any] = {"embed_dim": 64, "n_head": 1, "n_block": 1}
    of_env: Any = {"action_dim": NUM_ACTIONS, "action_kind": "discrete"}
    if name == "mat":
        return MAT(**of_env, **sizes)
    return Sable(num_agents, **of_env, **sizes, decay_scaling_factor=0.8, chunk_size=1)


def measure(name: str, num_agents: int) -> float:
    """Microseconds of one step of one environment."""
    model = network(name, num_agents)
    key = jax.random.key(0)
    observation = Observation(
        agents_view=jax.random.normal(key, (NUM_ENVS, num_agents, NUM_FEATURES)),
        action_mask=jnp.ones((NUM_ENVS, num_agents, NUM_ACTIONS), bool),
        step_count=jnp.zeros(NUM_ENVS, jnp.int32),
    )
    carry, never = model.initial_carry(NUM_ENVS), jnp.zeros(NUM_ENVS, bool)
    one_step = jax.tree.map(lambda x: x[:, None], observation)
    action = jnp.zeros((NUM_ENVS, 1, num_agents), int)
    params = model.init(key, carry, one_step, action, never[:, None])

    @jax.jit
    def act(carry: Any, keys: Array) -> Any:
        def step(carry: Any, key: Array) -> tuple[Any, Array]:
            acted = model.apply(params, carry, observation, never, key, method="act")
            return acted.carry, acted.action

        return jax.lax.scan(step, carry, keys)

    keys, times = jax.random.split(key, STEPS), []
    for _ in range(1 + TURNS):  # the first one compiles
        start = time.perf_counter()
        jax.block_until_ready(act(carry, keys))  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[1:]) / STEPS / NUM_ENVS


def main() -> None:
    """Measure and write a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    table = parser.parse_args().table
    rows = []
    for name in ("mat", "sable"):
        for num_agents in (3, 10, 30):
            step_us = measure(name, num_agents)
            row: dict[str, Any] = {
                "network": name,
                "agents": num_agents,
                "step_us": f"{step_us:.2f}",
            }
            rows.append(row | {"per_agent_us": f"{step_us / num_agents:.3f}"})
            print(rows[-1], flush=True)
    tables.write(table, rows)


if __name__ == "__main__":
    main()
