"""Parts of joint policies that act one agent after the other: inputs, initialisation, acting loop.

Axis letters beyond `magpo.types`: B environments, F embedding features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magpo.networks.heads import ActionKind, Distribution, executed_action
from magpo.types import Array, Environment, EnvSpec, Observation, action_spec


class JointAction(NamedTuple):
    """All agents' actions at one timestep, and the values of the observation they answer."""

    carry: Any  # after the timestep
    action: Array  # (B, N[, A]), raw: see `magpo.networks.heads`
    log_prob: Array  # (B, N)
    value: Array  # (B, N)


def encode_action(action: Array, action_dim: int, action_kind: ActionKind) -> Array:
    """Encode raw actions as the next agent's input, (..., A + 1); feature 0 marks the start."""
    if action_kind == "discrete":
        return jax.nn.one_hot(action + 1, action_dim + 1)
    executed = executed_action(action, action_kind)
    return jnp.concatenate([jnp.zeros_like(executed[..., :1]), executed], axis=-1)


def start_action(batch_shape: tuple[int, ...], action_dim: int) -> Array:
    """Return the first agent's input, (*batch_shape, A + 1)."""
    return jnp.zeros((*batch_shape, action_dim + 1)).at[..., 0].set(1.0)


def shift_actions(action: Array, action_dim: int, action_kind: ActionKind) -> Array:
    """Encode raw actions (..., N[, A]) as (..., N, A + 1), agent i - 1's as agent i's input."""
    encoded = encode_action(action, action_dim, action_kind)
    start = start_action((*encoded.shape[:-2], 1), action_dim)
    return jnp.concatenate([start, encoded[..., :-1, :]], axis=-2)


def init_joint(
    network: nn.Module,
    key: Array,
    carry: Any,
    observation: Observation,
    spec: Environment | EnvSpec,
) -> Any:
    """Initialise a network on one timestep's observation (B, ...); return its parameters."""
    sequence = jax.tree.map(lambda x: x[:, None], observation)  # (B, T=1, ...)
    reset_before = jnp.zeros(sequence.step_count.shape, bool)
    action = action_spec(spec)
    no_action = jnp.zeros((*reset_before.shape, *action.shape), action.dtype)
    return network.init(key, carry, sequence, no_action, reset_before)


class AgentInputs(NamedTuple):
    """One agent's inputs when it acts."""

    agent: Array  # () the agent's number
    encoded: Any  # (B, ...) the agent's encoding
    action_mask: Array  # (B, A)


DecodeAgent = Callable[[Any, Array, AgentInputs], tuple[Any, Distribution]]


def decode(
    decode_agent: DecodeAgent,
    caches: Any,
    encoded: Any,
    action_mask: Array,
    key: Array,
    action_kind: ActionKind,
    greedy: bool,
) -> tuple[Any, Array, Array]:
    """Return the caches after all agents, their raw actions (B, N[, A]) and log-probs (B, N).

    `decode_agent(caches, previous action (B, A + 1), agent's inputs)` returns the caches after an
    agent and the agent's distribution. `encoded` has leaves (B, N, ...).
    """
    batch, num_agents, action_dim = action_mask.shape

    def step(
        loop: tuple[Any, Array], inputs: tuple[AgentInputs, Array]
    ) -> tuple[tuple[Any, Array], tuple[Array, Array]]:
        caches, previous = loop
        agent_inputs, key = inputs
        caches, distribution = decode_agent(caches, previous, agent_inputs)
        action = distribution.mode() if greedy else distribution.sample(key)
        encoded_action = encode_action(action, action_dim, action_kind)
        return (caches, encoded_action), (action, distribution.log_prob(action))

    encoded, action_mask = jax.tree.map(lambda x: x.swapaxes(0, 1), (encoded, action_mask))
    agents = AgentInputs(jnp.arange(num_agents), encoded, action_mask)
    start = caches, start_action((batch,), action_dim)
    (caches, _), (action, log_prob) = jax.lax.scan(
        step, start, (agents, jax.random.split(key, num_agents))
    )
    return caches, action.swapaxes(0, 1), log_prob.swapaxes(0, 1)
