"""Time that the autoregressive networks take to act, for growing numbers of agents.

    python scripts/acting.py scripts/results/acting.csv

Networks have default sizes (64 features, one head, one block) and act in 64 environments for 50
steps; times are medians over rounds in which each is measured once. If acting is linear in the
number of agents, the time per agent is constant.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from magpo import commands, tables
from magpo.networks.autoregressive import init_joint
from magpo.networks.mat import MAT
from magpo.networks.sable import Sable
from magpo.types import Array, EnvSpec, Observation

NUM_ENVS, NUM_FEATURES, NUM_ACTIONS, STEPS, ROUNDS = 64, 20, 6, 50, 50


def network(name: str, num_agents: int) -> Any:
    """Return a network of its default size."""
    sizes: dict[str, Any] = {"embed_dim": 64, "n_head": 1, "n_block": 1}
    for_env: Any = {"action_dim": NUM_ACTIONS, "action_kind": "discrete"}
    if name == "mat":
        return MAT(**for_env, **sizes)
    return Sable(num_agents, **for_env, **sizes, decay_scaling_factor=0.8, chunk_size=1)


def env_spec(num_agents: int) -> EnvSpec:
    """Return an environment's specification with these sizes."""
    return EnvSpec(
        name="acting",
        num_agents=num_agents,
        num_features=NUM_FEATURES,
        num_state_features=None,
        action_dim=NUM_ACTIONS,
        action_kind="discrete",
        time_limit=STEPS,
        truncates=False,
        headline="episode_return",
        stop_action=None,
    )


def steps(name: str, num_agents: int) -> Callable[[], Any]:
    """Return a compiled function that acts for STEPS steps."""
    model = network(name, num_agents)
    key = jax.random.key(0)
    observation = Observation(
        agents_view=jax.random.normal(key, (NUM_ENVS, num_agents, NUM_FEATURES)),
        action_mask=jnp.ones((NUM_ENVS, num_agents, NUM_ACTIONS), bool),
        step_count=jnp.zeros(NUM_ENVS, jnp.int32),
    )
    carry, never = model.initial_carry(NUM_ENVS), jnp.zeros(NUM_ENVS, bool)
    params = init_joint(model, key, carry, observation, env_spec(num_agents))

    @jax.jit
    def act(carry: Any, keys: Array) -> Any:
        def step(carry: Any, key: Array) -> tuple[Any, Array]:
            joint = model.apply(params, carry, observation, never, key, method="act")
            return joint.carry, joint.action

        return jax.lax.scan(step, carry, keys)

    keys = jax.random.split(key, STEPS)
    jax.block_until_ready(act(carry, keys))
    return lambda: act(carry, keys)


def main(table: Path) -> None:
    """Measure and write a table."""
    calls = {(name, n): steps(name, n) for name in ("mat", "sable") for n in (3, 10, 30)}
    times: dict[tuple[str, int], list[float]] = {which: [] for which in calls}
    for _ in range(ROUNDS):
        for which, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[which].append(time.perf_counter() - start)
    rows = []
    for (name, num_agents), taken in times.items():
        step_us = 1e6 * statistics.median(taken) / STEPS / NUM_ENVS
        row: dict[str, Any] = {"network": name, "agents": num_agents, "step_us": f"{step_us:.2f}"}
        rows.append(row | {"per_agent_us": f"{step_us / num_agents:.3f}"})
        print(rows[-1], flush=True)
    tables.write(table, rows)


if __name__ == "__main__":
    commands.run(__doc__, main)
