"""Probe environments: games so small that failing one reveals a known kind of fault.

All games are one environment of one shape. Its `kind` selects the game and may be traced, so that
one program trains all games side by side.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from magpo.envs.wrappers import observe
from magpo.types import Array, Observation, StepType, TimeStep, restart

LENGTH = 3  # steps of an episode


class Kind(IntEnum):
    CONSTANT = 0  # 1 per step, whatever happens
    OBSERVED = 1  # the bit, at the end; agents see it at every step
    DELAYED = 2  # 1 at the end; agents do not see the bit
    ACTED = 3  # the share of agents that choose action 1
    COPIED = 4  # 1 if all agents choose the bit that they see
    COORDINATED = 5  # 1 if the agents choose the same action
    REMEMBERED = 6  # 1 at the end if all agents then choose the bit seen first
    TRUNCATED = 7  # CONSTANT, but truncated: the value is 1 / (1 - gamma)
    COMPLEMENTED = 8  # 1 if the agents choose different actions


class State(NamedTuple):
    bit: Array  # ()
    step_count: Array  # ()


@dataclass(frozen=True)
class Probe:
    kind: int | Array
    global_state: bool = False

    name: ClassVar = "probe/probe"
    num_agents: ClassVar = 2
    action_dim: ClassVar = 2
    action_kind: ClassVar = "discrete"
    time_limit: ClassVar = LENGTH
    truncates: ClassVar = True
    headline: ClassVar = "episode_return"

    def reset(self, key: Array) -> tuple[State, TimeStep]:
        state = State(jax.random.bernoulli(key).astype(jnp.int32), jnp.int32(0))
        return state, restart(2, self._observation(state), {})

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:
        bit, step_count = state
        end = step_count == LENGTH - 1
        copied = (action == bit).all()
        rewards = {
            Kind.CONSTANT: 1.0,
            Kind.OBSERVED: end * bit,
            Kind.DELAYED: end,
            Kind.ACTED: action.mean(),
            Kind.COPIED: copied,
            Kind.COORDINATED: action[0] == action[1],
            Kind.REMEMBERED: end & copied,
            Kind.TRUNCATED: 1.0,
            Kind.COMPLEMENTED: action[0] != action[1],
        }
        reward = jnp.stack([jnp.float32(rewards[kind]) for kind in Kind])[self.kind]
        state = State(bit, step_count + 1)
        return state, TimeStep(
            step_type=jnp.where(end, StepType.LAST, StepType.MID).astype(jnp.int8),
            reward=jnp.full(2, reward),
            discount=jnp.where(end & (self.kind != Kind.TRUNCATED), 0.0, 1.0),
            observation=self._observation(state),
            metrics={},
        )

    def _observation(self, state: State) -> Observation:
        beginning = state.step_count == 0
        seen = jnp.isin(self.kind, jnp.array([Kind.OBSERVED, Kind.COPIED]))
        seen |= beginning & (self.kind == Kind.REMEMBERED)
        features = jnp.stack([jnp.where(seen, 2.0 * state.bit - 1.0, 0.0), beginning])
        return observe(
            jnp.tile(features, (2, 1)),
            jnp.ones((2, 2), bool),
            state.step_count,
            self.global_state,
        )
