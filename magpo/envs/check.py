"""Check an environment of your own: `magpo.envs.check(env)`."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magpo.types import Array, Environment, Observation, StepType, TimeStep, action_spec

ATTRIBUTES = (
    *("name", "num_agents", "action_dim", "action_kind", "time_limit", "truncates", "headline"),
    *("observation_spec", "reset", "step"),
)
EPISODES = 8  # played side by side


def check(env: Environment) -> None:
    """Play a few episodes under random legal actions and raise ValueError with a line for each
    way in which the environment differs from `magpo.types`."""
    for stage in (_attributes, _shapes, _episodes):  # each relies on those before it
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
    yield from _timestep(env, "reset", first)
    stepped = jax.eval_shape(env.step, state, action_spec(env))
    if not _is_pair(stepped):
        yield "step must return a state and a TimeStep"
        return
    after, timestep = stepped
    yield from _timestep(env, "step", timestep)
    yield from _same("state", state, after)
    yield from _same("metrics", first.metrics, timestep.metrics)
    known = ("episode_return", "episode_length", *first.metrics)
    if env.headline not in known:
        yield f"headline must be one of {', '.join(known)}, not {env.headline!r}"


def _is_pair(returned: Any) -> bool:
    return isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], TimeStep)


def _timestep(env: Environment, function: str, timestep: TimeStep) -> Iterator[str]:
    """Compare a timestep's shapes and dtypes with what they must be."""
    num_agents, spec = env.num_agents, env.observation_spec
    views = getattr(spec.agents_view, "shape", (num_agents, "O"))
    state = spec.global_state
    wanted: dict[str, tuple[Any, Any, Any]] = {
        "step_type": (timestep.step_type, (), jnp.int8),
        "reward": (timestep.reward, (num_agents,), jnp.float32),
        "discount": (timestep.discount, (), jnp.float32),
        "observation.agents_view": (timestep.observation.agents_view, views, jnp.float32),
        "observation.action_mask": (
            *(timestep.observation.action_mask, (num_agents, env.action_dim), jnp.bool),
        ),
        "observation.step_count": (timestep.observation.step_count, (), jnp.int32),
    }
    if state is not None or timestep.observation.global_state is not None:
        size = None if state is None else state.shape
        wanted["observation.global_state"] = timestep.observation.global_state, size, jnp.float32
    for name, value in timestep.metrics.items():
        wanted[f"metrics[{name!r}]"] = value, (), None
    for name, (value, shape, dtype) in wanted.items():
        found = getattr(value, "shape", None), getattr(value, "dtype", None)
        if found != (shape, found[1] if dtype is None else jnp.dtype(dtype)):
            must = f"{jnp.dtype(dtype).name if dtype else ''}{list(shape or ())}"
            is_now = "none" if found[0] is None else f"{found[1]}{list(found[0])}"
            yield f"{function}: {name} must be {must}, as observation_spec and N say, not {is_now}"


def _same(what: str, before: Any, after: Any) -> Iterator[str]:
    """Compare the structure, shapes and dtypes of what reset and step return."""
    layouts = [
        {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (before, after)
    ]
    for path in sorted({*layouts[0], *layouts[1]}):
        old, new = (layout.get(path, "nothing") for layout in layouts)
        if old != new:
            yield f"{what}{path} must be the same from reset and step: {old} and {new}"


def _episodes(env: Environment) -> Iterator[str]:
    """Play EPISODES episodes to their time limit."""
    played: Any = jax.device_get(jax.jit(lambda key: _play(env, key))(jax.random.key(0)))
    first, step_types, legal, counts = played  # (B,), (T, B), (T + 1, B), (T + 1, B)
    if (first != StepType.FIRST).any():
        yield f"reset: step_type must be {StepType.FIRST} (FIRST)"
    ends = step_types == StepType.LAST
    if not ends.any(0).all():
        yield f"step: no episode may be longer than time_limit = {env.time_limit}: LAST must come"
    alive = np.concatenate([np.ones((1, EPISODES), bool), np.cumsum(ends, 0) == 0])
    if (alive[1:] & (step_types == StepType.FIRST)).any():
        yield f"step: step_type must be {StepType.MID} (MID) or {StepType.LAST} (LAST)"
    if (alive & ~legal).any():
        yield "observation.action_mask must leave every agent a legal action"
    if (alive & (counts != np.arange(len(counts))[:, None])).any():
        yield "observation.step_count must be the number of steps since reset"


def _play(env: Environment, key: Array) -> Any:
    key_reset, key_steps = jax.random.split(key)
    state, first = jax.vmap(env.reset)(jax.random.split(key_reset, EPISODES))

    def legal(observation: Observation) -> Array:
        return observation.action_mask.any(-1).all(-1)

    def step(loop: Any, key: Array) -> Any:
        state, observation = loop
        if env.action_kind == "discrete":
            logits = jnp.where(observation.action_mask, 0.0, jnp.finfo(jnp.float32).min)
            action = jax.random.categorical(key, logits).astype(jnp.int32)
        else:
            action = jax.random.uniform(key, observation.action_mask.shape, minval=-1.0)
        state, timestep = jax.vmap(env.step)(state, action)
        seen = timestep.step_type, legal(timestep.observation), timestep.observation.step_count
        return (state, timestep.observation), seen

    keys = jax.random.split(key_steps, min(env.time_limit, 10_000))
    _, (step_types, masks, counts) = jax.lax.scan(step, (state, first.observation), keys)
    start = legal(first.observation)[None], first.observation.step_count[None]
    masks, counts = (jnp.concatenate(x) for x in zip(start, (masks, counts), strict=True))
    return first.step_type, step_types, masks, counts
