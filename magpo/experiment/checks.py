"""Checks of the values that a system returns, before anything is compiled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from magpo.contract import Algorithm
from magpo.errors import ConfigError
from magpo.types import Environment, action_spec, spec


def check_state(algorithm: Algorithm, state: Any) -> None:
    """Raise ConfigError unless a TrainState has the fields that the loop and CARD need."""
    names = getattr(state, "_fields", ())
    for name in ("params", "hyper", *algorithm.CARD.per_environment):
        needed = f"init must return a NamedTuple with {name}; it has {list(names)}"
        _require(algorithm, name in names, needed)


def check_act(algorithm: Algorithm, setup: Any, env: Environment, params: Any) -> None:
    """Raise ConfigError unless `act` fits the policy's parameters and the environment.

    The parameters of all members, `params` (M, ...), must be arrays in nested dictionaries. `act`
    must return an action for each agent, and a carry like the one that it takes.
    """
    needed = f"policy_params must return nested dictionaries, not {_types(params)}"
    _require(algorithm, isinstance(params, Mapping), needed)
    num_envs, wanted = 2, action_spec(spec(env))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)

    def act(params: Any, key: Any) -> Any:
        keys = jax.random.split(key, num_envs)
        _, timestep = jax.vmap(env.reset)(keys)
        carry = algorithm.initial_carry(setup, (num_envs,))
        return carry, algorithm.act(setup, params, carry, timestep.observation, key, False)

    before, returned = jax.eval_shape(act, one, jax.eval_shape(lambda: jax.random.key(0)))
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    _require(algorithm, is_pair, "act must return actions and the carry after them")
    action, after = returned
    expected = jax.ShapeDtypeStruct((num_envs, *wanted.shape), wanted.dtype)
    axes = "(B, N)" if len(wanted.shape) == 1 else "(B, N, A)"
    needed = f"act must return actions {axes} = {_types(expected)}, not {_types(action)}"
    _require(algorithm, _alike(action, expected), needed)
    needed = f"act must return a carry like {_types(before)}, not {_types(after)}"
    _require(algorithm, _alike(before, after), needed)


def check_chunk(algorithm: Algorithm, returned: Any, state: Any, num_updates: int) -> None:
    """Raise ConfigError unless `train_chunk` returned a state like its argument, and its metrics.

    Each metric must have one value per update.
    """
    is_pair = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)
    needed = "train_chunk must return the state and a dictionary of metrics"
    _require(algorithm, is_pair, needed)
    after, metrics = returned
    needed = "train_chunk must return a state with the shapes and dtypes of init's"
    _require(algorithm, _alike(after, state), needed)
    for name, value in metrics.items():
        needed = f"one value for each of {num_updates} updates, not the shape {value.shape}"
        needed = f"train_chunk: the metric {name!r} must have {needed}"
        _require(algorithm, value.shape == (num_updates,), needed)
        is_counted = not name.startswith("rollout/") or "rollout/episodes" in metrics
        needed = f"train_chunk: {name!r} needs the metric rollout/episodes beside it"
        _require(algorithm, is_counted, needed)


def _require(algorithm: Any, condition: bool, needed: str) -> None:
    """Raise ConfigError, naming the system's file, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{Path(algorithm.__file__).name}: {needed}")


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)


def _alike(tree: Any, other: Any) -> bool:
    return bool(jax.tree.flatten(_types(tree)) == jax.tree.flatten(_types(other)))
