"""Cost of our wrappers on top of the simulators: tasks of each suite, 128 environments.

    python scripts/benchmark_envs.py scripts/results/envs.csv [lbf/8x8-2p-2f-coop ...]

Actions are random and the same for all; every step overwrites all outputs of the step before.
`wrapper` compares our step's time with the simulator's; `auto_reset` compares a step with restarts
with the step and the resets that were due; `part` names a costly part of a slow simulator's step.
Times are medians over rounds in which each is measured once.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from magpo import commands, envs, tables
from magpo.envs.wrappers import AutoReset
from magpo.types import Array, action_spec

NUM_ENVS, STEPS = 128, 256
ROUNDS, ROUNDS_S = 3, 20.0  # minimum number and duration
TASKS = [
    "coordsum/3x10-30",
    "lbf/15x15-4p-5f",
    "connector/con-5x5x3a",
    "connector/con-7x7x5a",
    "connector/con-10x10x10a",
    "connector/con-15x15x23a",
    "mpe/simple_spread_3ag",
    "rware/tiny-4ag",
    "smax/2s3z",
    "smax/27m_vs_30m",
    "mabrax/hopper-3x1",
    "mabrax/humanoid-9-8",
]
wait: Any = jax.block_until_ready


def simulator_of(env: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return reset(key) -> state and step(state, action, key) -> (state, outputs)."""
    suite, simulator = env.name.partition("/")[0], env.simulator

    def jumanji_step(state: Any, action: Array, key: Array) -> Any:
        return simulator.step(state, action)

    def jaxmarl_step(state: Any, action: Array, key: Array) -> Any:
        if suite == "mpe":
            action = (action + 1) / 2
        actions = dict(zip(simulator.agents, action, strict=True))
        views, state, rewards, dones, _ = simulator.step_env(key, state, actions)
        legal = simulator.get_avail_actions(state) if suite == "smax" else ()
        return state, (views, rewards, dones, legal)

    if suite in ("lbf", "connector", "rware"):
        return lambda key: simulator.reset(key)[0], jumanji_step
    return lambda key: simulator.reset(key)[1], jaxmarl_step


def slow_part(env: Any) -> tuple[str, Callable[..., Any]] | None:
    """Return the name of a costly part of a slow simulator's step, and that part alone."""
    suite = env.name.partition("/")[0]
    simulator: Any = getattr(env, "simulator", None)

    def request_queue(state: Any, action: Array, key: Array) -> Any:
        def at_goal(carry: Any, goal: Array) -> Any:
            key, reward, queue, shelves = carry
            return simulator._update_reward_and_request_queue(
                key, reward, queue, state.grid, shelves, goal
            ), None

        start = state.key, jnp.float32(0), state.request_queue, state.shelves
        (key, reward, queue, shelves), _ = jax.lax.scan(at_goal, start, simulator.goals)
        return state.replace(key=key, request_queue=queue, shelves=shelves), reward

    def views(state: Any, action: Array, key: Array) -> Any:
        units = state.battle.state
        moved = units.unit_positions + 1e-3 * action.sum()  # a different state every time
        units = units.replace(unit_positions=moved)
        seen = simulator._env.get_obs_unit_list(units)
        return state._replace(battle=state.battle.replace(state=units)), seen

    def physics(state: Any, action: Array, key: Array) -> Any:
        body = simulator.env.unwrapped
        joints = action.reshape(-1)[: body.action_size]
        return state.replace(
            pipeline_state=body.pipeline_step(state.pipeline_state, joints)
        ), joints

    parts = {"rware": request_queue, "smax": views, "mabrax": physics}
    return (parts[suite].__name__, parts[suite]) if suite in parts else None


def strong(state: Any) -> Any:
    """Remove weak types, which would change a scan's carry."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)


def scanned(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a jitted function of T steps of a batch, each of which writes all its outputs."""

    def run(state: Any, actions: Array, keys: Array) -> Any:
        def one(carry: Any, given: Any) -> Any:
            state, outputs = step(carry[0], *given)
            return (strong(state), strong(outputs)), None

        _, outputs = jax.eval_shape(step, state, actions[0], keys[0])
        unwritten = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
        return jax.lax.scan(one, (strong(state), unwritten), (actions, keys))[0]

    return jax.jit(run)


def measure(task: str) -> dict[str, Any]:
    """Measure a task; return times in microseconds per environment and step."""
    env = envs.make(task)
    batch = AutoReset(env, NUM_ENVS)
    key = jax.random.key(0)
    shape = STEPS, NUM_ENVS, *action_spec(env).shape
    if env.action_kind == "discrete":
        actions = jax.random.randint(jax.random.key(1), shape, 0, env.action_dim)
    else:
        actions = jax.random.uniform(jax.random.key(1), shape, minval=-1.0)
    step_keys = jax.random.split(jax.random.key(2), (STEPS, NUM_ENVS))

    reset = jax.jit(jax.vmap(env.reset))
    ours = scanned(lambda state, action, _: jax.vmap(env.step)(state, action))

    def step_with_resets(state: Any, action: Array, key: Array) -> Any:
        state, timestep = batch.step(state, action)
        seen, cut_off = timestep.terminal_observation, timestep.truncated().any()
        if seen is None:
            return state, timestep
        # A rollout reads the terminal observation only after truncations, and does not keep it.
        value = jax.lax.cond(cut_off, lambda: seen.agents_view.sum(), lambda: 0.0)
        return state, (timestep._replace(terminal_observation=None), value)

    restarted = scanned(step_with_resets)
    auto_first, _ = jax.jit(batch.reset)(key)
    ended = int(restarted(auto_first, actions, step_keys)[0].begun) - NUM_ENVS
    # The same episodes as drawn above: a generator takes as long as its slowest board.
    drawn = 2 * NUM_ENVS + jnp.arange(-(-ended // NUM_ENVS) * NUM_ENVS)
    drawn_keys = jax.vmap(partial(jax.random.fold_in, key))(drawn).reshape(-1, NUM_ENVS)
    first = reset(drawn_keys[0])[0]
    calls: dict[str, Callable[[], Any]] = {
        "resets": lambda: [reset(keys) for keys in drawn_keys],
        "step": lambda: ours(first, actions, step_keys),
        "step_with_resets": lambda: restarted(auto_first, actions, step_keys),
    }
    if hasattr(env, "simulator"):
        raw_reset, raw_step = simulator_of(env)
        raw, raw_first = scanned(jax.vmap(raw_step)), jax.jit(jax.vmap(raw_reset))(drawn_keys[0])
        calls["simulator"] = lambda: raw(raw_first, actions, step_keys)
    part = slow_part(env)
    if part:
        alone = scanned(jax.vmap(part[1]))
        calls["part"] = lambda: alone(first, actions, step_keys)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        wait(call())  # compiles
    begin, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - begin < ROUNDS_S:
        for name, call in calls.items():
            start = time.perf_counter()
            wait(call())
            times[name].append(time.perf_counter() - start)
        rounds += 1
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    unit = 1e6 / (NUM_ENVS * STEPS)
    step, reset_us = unit * seconds["step"], 1e6 * seconds["resets"] / drawn.size
    ends_per_step = ended / (NUM_ENVS * STEPS)
    with_resets = unit * seconds["step_with_resets"]
    simulator = unit * seconds["simulator"] if "simulator" in seconds else None
    return {
        "task": task,
        "simulator_us": f"{simulator:.2f}" if simulator else "",
        "step_us": f"{step:.2f}",
        "wrapper": f"{step / simulator - 1:+.1%}" if simulator else "",
        "reset_us": f"{reset_us:.2f}",
        "ends_per_step": f"{ends_per_step:.4f}",
        "with_resets_us": f"{with_resets:.2f}",
        "part": part[0] if part else "",
        "part_of_step": f"{seconds['part'] / seconds['step']:.0%}" if part else "",
        "auto_reset": f"{with_resets / (step + ends_per_step * reset_us) - 1:+.1%}",
    }


def main(table: Path, *tasks: str) -> None:
    """Measure and write a table."""
    rows = []
    for task in tasks or TASKS:
        rows.append(measure(task))
        print(rows[-1], flush=True)
    tables.write(table, rows)


if __name__ == "__main__":
    commands.run(__doc__, main)
