"""CoordSum: agents pick numbers that sum to a target, unpredictably (MAGPO, Appendix B).

All agents see a target; their actions should sum to it. An opponent guesses the first agent's
action: the one that this agent took most often for the target so far in the episode, the smallest
of equals, or 0 if there is none. A right sum earns 2, or 1 if the guess was right too.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from magpo.envs import wrappers
from magpo.envs.registry import at_least, one_of
from magpo.types import Array, Observation, StepType, TimeStep, restart


class State(NamedTuple):
    key: Array  # () the episode's; the target of step t comes from fold_in(key, t)
    step_count: Array  # () int32
    target: Array  # () int32
    history: Array  # (rows, A) int32, how often the first agent took each action


@dataclass(unsafe_hash=True)
class CoordSum:
    """One environment; the options are explained in configs/env/coordsum.yaml."""

    name: str
    global_state: bool
    num_agents: int
    num_actions: int
    max_target: int
    time_limit: int
    opponent_history: str
    observation: str
    action_dim: int = field(init=False)
    action_kind: Literal["discrete", "continuous"] = field(default="discrete", init=False)
    truncates: bool = field(default=False, init=False)
    headline: str = field(default="episode_return", init=False)
    terminates: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.action_dim = self.num_actions
        at_least(self, num_agents=1, num_actions=2, max_target=1, time_limit=1)
        one_of(
            self,
            opponent_history=("per_target", "released"),
            observation=("raw", "scaled", "one_hot"),
        )

    def reset(self, key: Array) -> tuple[State, TimeStep]:
        rows = self.max_target if self.opponent_history == "per_target" else self.num_actions
        step_count = jnp.int32(0)
        state = State(
            key=key,
            step_count=step_count,
            target=self._target(key, step_count),
            history=jnp.zeros((rows, self.num_actions), jnp.int32),
        )
        return state, restart(self.num_agents, self._observe(state), {})

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:
        # In the released code, targets beyond its num_actions rows share the last row.
        row = jnp.minimum(state.target, state.history.shape[0] - 1)
        guess = jnp.argmax(state.history[row])
        worth = jnp.where(guess == action[0], jnp.float32(1.0), 2.0)
        reward = jnp.where(action.sum() == state.target, worth, 0.0)
        step_count = state.step_count + 1
        state = State(
            key=state.key,
            step_count=step_count,
            target=self._target(state.key, step_count),
            history=state.history.at[row, action[0]].add(1),  # a wrong sum is remembered too
        )
        last = step_count >= self.time_limit
        return state, TimeStep(
            step_type=jnp.where(last, StepType.LAST, StepType.MID).astype(jnp.int8),
            reward=jnp.full(self.num_agents, reward),
            discount=1.0 - last.astype(jnp.float32),
            observation=self._observe(state),
            metrics={},
        )

    def _target(self, key: Array, step_count: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(key, step_count), (), 0, self.max_target)

    def _observe(self, state: State) -> Observation:
        step_count = state.step_count.astype(jnp.float32)[None]
        if self.observation == "one_hot":
            features = jax.nn.one_hot(state.target, self.max_target)
        else:
            features = state.target.astype(jnp.float32)[None]
        if self.observation == "scaled":
            features = features / self.max_target
        if self.observation != "raw":
            step_count = step_count / self.time_limit
        if self.opponent_history == "per_target":
            features = jnp.concatenate([features, step_count])
        views = jnp.tile(features, (self.num_agents, 1))
        mask = jnp.ones((self.num_agents, self.num_actions), bool)
        return wrappers.observe(views, mask, state.step_count, self.global_state)
