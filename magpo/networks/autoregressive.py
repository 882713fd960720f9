"""Acting one agent after the other: what each reads of those before it, and the loop over agents.

Axis letters beyond `magpo.types`: B environments, F embedding features, H heads, D features of a
head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magpo.networks.heads import ActionKind, Distribution, executed_action
from magpo.types import Array, EnvSpec, Observation, action_spec


class JointAction(NamedTuple):
    """One timestep's outcome."""

    carry: Any
    action: Array  # (B, N[, A]), raw: see `magpo.networks.heads`
    log_prob: Array  # (B, N)
    value: Array  # (B, N)


def token(action: Array, action_dim: int, action_kind: ActionKind) -> Array:
    """What the next agent reads of a raw action, (..., A + 1); feature 0 marks the start token."""
    if action_kind == "discrete":
        return jax.nn.one_hot(action + 1, action_dim + 1)
    executed = executed_action(action, action_kind)
    return jnp.concatenate([jnp.zeros_like(executed[..., :1]), executed], axis=-1)


def start_token(batch_shape: tuple[int, ...], action_dim: int) -> Array:
    """What the first agent reads, (*batch_shape, A + 1)."""
    return jnp.zeros((*batch_shape, action_dim + 1)).at[..., 0].set(1.0)


def shifted(action: Array, action_dim: int, action_kind: ActionKind) -> Array:
    """Raw actions (..., N[, A]) to tokens (..., N, A + 1): agent i reads agent i - 1's action."""
    tokens = token(action, action_dim, action_kind)
    start = start_token((*tokens.shape[:-2], 1), action_dim)
    return jnp.concatenate([start, tokens[..., :-1, :]], axis=-2)


def init_joint(
    network: nn.Module, key: Array, carry: Any, observation: Observation, spec: EnvSpec
) -> Any:
    """Return the parameters of a network of all agents; observation (B, ...)."""
    along, no_reset = jax.tree.map(lambda x: x[:, None], (observation, observation.step_count < 0))
    action = action_spec(spec)
    none = jnp.zeros((*no_reset.shape, *action.shape), action.dtype)
    return network.init(key, carry, along, none, no_reset)


def written(cache: Any, new: Any, agent: Array, read: Array) -> Any:
    """`cache`, of leaves (B, H, N, D), with an agent's `new`, of leaves (B, H, D), in its place.

    `read`, (B, H, D), is what was made of the cache before. What is written hangs on it, at no
    weight: XLA then writes in place, where it would copy a cache that may be read after.
    """

    def write(old: Array, own: Array) -> Array:
        own += 0.0 * read
        return jax.lax.dynamic_update_slice_in_dim(old, own[:, :, None], agent, 2)

    return jax.tree.map(write, cache, new)


class Turn(NamedTuple):
    """What an agent acts on."""

    agent: Array  # () its number
    encoded: Array  # (B, F) the encoder's output for it
    action_mask: Array  # (B, A)


def decode(
    take_turn: Callable[[Any, Array, Turn], tuple[Any, Distribution]],
    caches: Any,
    encoded: Array,
    action_mask: Array,
    key: Array,
    action_kind: ActionKind,
    greedy: bool,
) -> tuple[Any, Array, Array]:
    """The agents' raw actions (B, N[, A]), their log-probs (B, N), and the caches after them.

    `take_turn(caches, token (B, A + 1), turn)` gives the caches after an agent, and its policy.
    """
    batch, num_agents, action_dim = action_mask.shape

    def act(loop: tuple[Any, Array], inputs: tuple[Turn, Array]) -> tuple[Any, tuple[Array, Array]]:
        turn, key = inputs
        caches, policy = take_turn(*loop, turn)
        action = policy.mode() if greedy else policy.sample(key)
        read_next = token(action, action_dim, action_kind)
        return (caches, read_next), (action, policy.log_prob(action))

    turns = Turn(jnp.arange(num_agents), encoded.swapaxes(0, 1), action_mask.swapaxes(0, 1))
    start = caches, start_token((batch,), action_dim)
    (caches, _), (action, log_prob) = jax.lax.scan(
        act, start, (turns, jax.random.split(key, num_agents))
    )
    return caches, action.swapaxes(0, 1), log_prob.swapaxes(0, 1)
