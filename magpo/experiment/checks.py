"""Check the shapes that a system returns, before anything is compiled."""

from collections.abc import Mapping
from typing import Any

import jax

from magpo.contract import Algorithm
from magpo.errors import ConfigError
from magpo.types import Environment, action_spec, spec


def check_act(algorithm: Algorithm, setup: Any, env: Environment, params: Any) -> None:
    """Raise ConfigError unless `act` returns an action for each agent, and a carry like the one it
    takes. `params` are all members', (M, ...)."""
    num_envs, wanted = 2, action_spec(spec(env))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)

    def act(params: Any, key: Any) -> Any:
        keys = jax.random.split(key, num_envs)
        _, timestep = jax.vmap(env.reset)(keys)
        carry = algorithm.initial_carry(setup, (num_envs,))
        return carry, algorithm.act(setup, params, carry, timestep.observation, key, False)

    before, returned = jax.eval_shape(act, one, jax.eval_shape(lambda: jax.random.key(0)))
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ConfigError("act must return actions and the carry after them")
    action, after = returned
    expected = (num_envs, *wanted.shape), wanted.dtype
    if (getattr(action, "shape", None), getattr(action, "dtype", None)) != expected:
        names = "(B, N)" if len(wanted.shape) == 1 else "(B, N, A)"
        raise ConfigError(
            f"act must return actions {names} = {_text(*expected)}, not {_tree(action)}"
        )
    if _layout(before) != _layout(after):
        raise ConfigError(f"act must return a carry like {_tree(before)}, not {_tree(after)}")


def check_state(algorithm: Algorithm, state: Any, params: Any) -> None:
    """Raise ConfigError unless a TrainState has the fields that the loop and CARD name, and the
    policy's parameters are arrays in nested dictionaries."""
    names = getattr(state, "_fields", ())
    for name in ("params", "hyper", *algorithm.CARD.per_environment):
        if name not in names:
            raise ConfigError(f"init must return a NamedTuple with {name}; it has {list(names)}")
    if not isinstance(params, Mapping):
        raise ConfigError(f"policy_params must return nested dictionaries, not {_tree(params)}")


def check_chunk(returned: Any, state: Any, num_updates: int) -> None:
    """Raise ConfigError unless `train_chunk` returned a state like the one it took, and a value of
    each metric for each update."""
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], dict):
        raise ConfigError("train_chunk must return the state and a dictionary of metrics")
    after, metrics = returned
    if _layout(after) != _layout(state):
        raise ConfigError("train_chunk must return a state with the shapes and dtypes of init's")
    for name, value in metrics.items():
        if value.shape != (num_updates,):
            raise ConfigError(
                f"train_chunk: the metric {name!r} must have one value for each of {num_updates} "
                f"updates, not the shape {value.shape}"
            )
        if name.startswith("rollout/") and "rollout/episodes" not in metrics:
            raise ConfigError(f"train_chunk: {name!r} needs the metric rollout/episodes beside it")


def _layout(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _text(shape: Any, dtype: Any) -> str:
    return f"{dtype}{list(shape)}"


def _tree(tree: Any) -> str:
    return str(jax.tree.map(lambda x: _text(x.shape, x.dtype), tree))
