"""The check of an environment of your own: `magpo.envs.check(env)`."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magpo.envs.wrappers import random_action
from magpo.types import Array, Environment, Observation, StepType, TimeStep, action_spec

ATTRIBUTES = (
    *("name", "num_agents", "action_dim", "action_kind", "time_limit", "truncates", "headline"),
    *("reset", "step"),
)
EPISODES = 8  # played side by side


def check(env: Environment) -> None:
    """Play a few episodes with random legal actions and compare the environment with `magpo.types`.

    Raises ValueError with a line for each difference.
    """
    for stage in (_attributes, _shapes, _episodes):  # each relies on the stages before it
        if problems := list(stage(env)):
            raise ValueError("\n".join(f"{type(env).__name__}: {line}" for line in problems))


def _attributes(env: Any) -> Iterator[str]:
    for name in ATTRIBUTES:
        if not hasattr(env, name):
            yield f"has no {name}"
    for name in ("num_agents", "action_dim", "time_limit"):
        value = getattr(env, name, 1)
        if not isinstance(value, int) or value < 1:
            yield f"{name} must be a whole number, at least 1, not {value!r}"
    if (kind := getattr(env, "action_kind", "discrete")) not in ("discrete", "continuous"):
        yield f"action_kind must be discrete or continuous, not {kind!r}"


def _shapes(env: Environment) -> Iterator[str]:
    started = jax.eval_shape(env.reset, jax.eval_shape(lambda: jax.random.key(0)))
    if not _is_pair(started):
        yield "reset must return a state and a TimeStep"
        return
    state, first = started
    yield from _differences("reset: ", _wanted(env, first), first, "as magpo.types says")
    stepped = jax.eval_shape(env.step, state, action_spec(env))
    if not _is_pair(stepped):
        yield "step must return a state and a TimeStep"
        return
    after, timestep = stepped
    yield from _differences("step: ", _wanted(env, first), timestep, "as reset and magpo.types say")
    yield from _differences("step: state", state, after, "as reset returns it")
    known = ("episode_return", "episode_length", *first.metrics)
    if env.headline not in known:
        yield f"headline must be one of {', '.join(known)}, not {env.headline!r}"


def _is_pair(returned: Any) -> bool:
    return isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], TimeStep)


def _wanted(env: Environment, first: TimeStep) -> TimeStep:
    """Return the shapes and dtypes that a timestep must have, with the sizes that `reset` returns.

    `magpo.types` leaves the metrics' dtypes open.
    """
    shaped: Any = jax.ShapeDtypeStruct
    seen, state = first.observation, first.observation.global_state
    return TimeStep(
        step_type=shaped((), jnp.int8),
        reward=shaped((env.num_agents,), jnp.float32),
        discount=shaped((), jnp.float32),
        observation=Observation(
            agents_view=shaped((env.num_agents, *seen.agents_view.shape[-1:]), jnp.float32),
            action_mask=shaped((env.num_agents, env.action_dim), jnp.bool),
            step_count=shaped((), jnp.int32),
            global_state=None if state is None else shaped((state.size,), jnp.float32),
        ),
        metrics={name: shaped((), value.dtype) for name, value in first.metrics.items()},
    )


def _differences(what: str, wanted: Any, found: Any, why: str) -> Iterator[str]:
    """Yield a line for each leaf with a wrong shape or dtype."""
    must, has = (
        {
            jax.tree_util.keystr(path).removeprefix("."): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (wanted, found)
    )
    for path in {**must, **has}:
        old, new = must.get(path, "nothing"), has.get(path, "nothing")
        if old != new:
            yield f"{what}{path} must be {old}, {why}, not {new}"


def _episodes(env: Environment) -> Iterator[str]:
    """Play EPISODES episodes to their time limit and yield a line for each problem."""
    played: Any = jax.device_get(jax.jit(lambda key: _play(env, key))(jax.random.key(0)))
    step_types, legal, counts = played  # (T + 1, B) each
    if (step_types[0] != StepType.FIRST).any():
        yield f"reset: step_type must be {StepType.FIRST} (FIRST)"
    ended = np.cumsum(step_types[1:] == StepType.LAST, axis=0) > 0
    if not ended[-1].all():
        yield f"step: no episode may be longer than time_limit = {env.time_limit}: LAST must come"
    alive = np.concatenate([np.ones((1, EPISODES), bool), ~ended])
    if (alive[1:] & (step_types[1:] == StepType.FIRST)).any():
        yield f"step: step_type must be {StepType.MID} (MID) or {StepType.LAST} (LAST)"
    if (alive & ~legal).any():
        yield "observation.action_mask must leave every agent a legal action"
    if (alive & (counts != np.arange(len(counts))[:, None])).any():
        yield "observation.step_count must be the number of steps since reset"


def _play(env: Environment, key: Array) -> tuple[Array, Array, Array]:
    """Return the step types, whether all agents have a legal action, and the step counts."""
    key_reset, key_steps = jax.random.split(key)
    state, first = jax.vmap(env.reset)(jax.random.split(key_reset, EPISODES))

    def kept(timestep: TimeStep) -> tuple[Array, Array, Array]:
        seen = timestep.observation
        return timestep.step_type, seen.action_mask.any(-1).all(-1), seen.step_count

    def step(loop: Any, key: Array) -> Any:
        state, mask = loop
        state, timestep = jax.vmap(env.step)(state, random_action(env, mask, key))
        return (state, timestep.observation.action_mask), kept(timestep)

    keys = jax.random.split(key_steps, min(env.time_limit, 10_000))
    _, after = jax.lax.scan(step, (state, first.observation.action_mask), keys)
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), kept(first), after)
