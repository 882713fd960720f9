"""LBF: agents of different levels gather food together (jumanji's LevelBasedForaging).

A food is eaten when the levels of the agents that load it add up to at least its own level. Every
agent gets the sum of the agents' rewards. An episode terminates once all food is eaten; the time
limit truncates it.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax.numpy as jnp
from jumanji.environments import LevelBasedForaging
from jumanji.environments.routing.lbf.generator import RandomGenerator
from jumanji.environments.routing.lbf.types import Observation as RawObservation
from jumanji.environments.routing.lbf.types import State

from magpo.envs import wrappers
from magpo.envs.registry import at_least, at_most, one_of
from magpo.types import Array, Observation, TimeStep, restart


@dataclass(unsafe_hash=True)
class Lbf:
    """One environment; the options are explained in configs/env/lbf.yaml."""

    name: str
    global_state: bool
    grid_size: int
    fov: int
    num_agents: int
    num_food: int
    max_agent_level: int
    force_coop: bool
    normalize_reward: bool
    penalty: float
    time_limit: int
    ends: str
    simulator: LevelBasedForaging = field(init=False, repr=False, compare=False)
    action_dim: int = field(default=6, init=False)  # wait, up, down, left, right, load
    action_kind: Literal["discrete", "continuous"] = field(default="discrete", init=False)
    truncates: bool = field(init=False)
    headline: str = field(default="episode_return", init=False)
    terminates: ClassVar[str] = "all food eaten"

    def __post_init__(self) -> None:
        at_least(self, grid_size=5, fov=1, num_agents=1, num_food=1, max_agent_level=2)
        at_least(self, penalty=0, time_limit=1)
        one_of(self, ends=wrappers.ENDS)
        self.truncates = self.ends == "bootstrapped"
        # jumanji's generator guarantees only the first and the last row to be free for agents.
        inside = (self.grid_size - 2) ** 2
        size = f"where grid_size is {self.grid_size}"
        room = min(2 * self.grid_size, inside - 6)
        at_most(self, size, fov=self.grid_size, num_agents=room)
        at_most(self, size, num_food=(inside - self.num_agents - 1) // 5)
        generator = RandomGenerator(
            grid_size=self.grid_size,
            fov=self.fov,
            num_agents=self.num_agents,
            num_food=self.num_food,
            max_agent_level=self.max_agent_level,
            force_coop=self.force_coop,
        )
        self.simulator = LevelBasedForaging(
            generator,
            time_limit=self.time_limit,
            normalize_reward=self.normalize_reward,
            penalty=self.penalty,
        )

    def reset(self, key: Array) -> tuple[State, TimeStep]:
        state, raw = self.simulator.reset(key)
        observation = self._observe(raw.observation)
        return state, restart(self.num_agents, observation, raw.extras)

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:
        # With constant ids, XLA computes once what jumanji derives from the ids at every step.
        ids = jnp.arange(self.num_agents, dtype=state.agents.id.dtype)
        state = state.replace(agents=state.agents.replace(id=ids))
        state, raw = self.simulator.step(state, action)
        return state, TimeStep(
            step_type=raw.step_type,
            reward=jnp.full(self.num_agents, raw.reward.sum()),
            discount=wrappers.discount(raw.last(), raw.discount[0] > 0, self.ends),
            observation=self._observe(raw.observation),
            metrics=raw.extras,  # percent_eaten, 0 .. 100
        )

    def _observe(self, raw: RawObservation) -> Observation:
        return wrappers.observe(raw.agents_view, raw.action_mask, raw.step_count, self.global_state)
