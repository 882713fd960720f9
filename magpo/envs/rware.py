"""RWARE: robots bring the requested shelves to the goals (jumanji's RobotWarehouse).

Every delivery earns the whole team 1. A collision and the time limit both terminate the episode, as
in jumanji.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax.numpy as jnp
from jumanji.environments import RobotWarehouse
from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator
from jumanji.environments.routing.robot_warehouse.types import Observation as RawObservation
from jumanji.environments.routing.robot_warehouse.types import State

from magpo.envs import wrappers
from magpo.envs.registry import at_least, at_most
from magpo.types import Array, Observation, TimeStep, restart


@dataclass(unsafe_hash=True)
class Rware:
    """One environment; the options are explained in configs/env/rware.yaml."""

    name: str
    global_state: bool
    shelf_rows: int
    shelf_columns: int
    column_height: int
    num_agents: int
    sensor_range: int
    request_queue_size: int
    time_limit: int
    simulator: RobotWarehouse = field(init=False, repr=False, compare=False)
    action_dim: int = field(default=5, init=False)  # wait, forward, left, right, toggle the load
    action_kind: Literal["discrete", "continuous"] = field(default="discrete", init=False)
    truncates: bool = field(default=False, init=False)
    headline: str = field(default="episode_return", init=False)
    terminates: ClassVar[str] = "a collision"

    def __post_init__(self) -> None:
        at_least(self, shelf_rows=1, shelf_columns=3, column_height=1, num_agents=1)
        at_least(self, sensor_range=1, request_queue_size=1, time_limit=1)
        if self.shelf_columns % 2 == 0:
            raise ValueError(f"{self.name}: shelf_columns must be odd, not {self.shelf_columns}")
        generator = RandomGenerator(
            shelf_rows=self.shelf_rows,
            shelf_columns=self.shelf_columns,
            column_height=self.column_height,
            num_agents=self.num_agents,
            sensor_range=self.sensor_range,
            request_queue_size=self.request_queue_size,
        )
        # jumanji silently accepts more agents or requests than fit.
        at_most(self, num_agents=generator.highways.size)
        at_most(self, request_queue_size=len(generator.shelf_ids) - 1)
        self.simulator = RobotWarehouse(generator, time_limit=self.time_limit)

    def reset(self, key: Array) -> tuple[State, TimeStep]:
        state, raw = self.simulator.reset(key)
        state = wrappers.strong(state)
        return state, restart(self.num_agents, self._observe(raw.observation), {})

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:
        state, raw = self.simulator.step(state, action)
        return state, TimeStep(
            step_type=raw.step_type,
            reward=jnp.full(self.num_agents, raw.reward),  # already the team's
            discount=raw.discount,
            observation=self._observe(raw.observation),
            metrics={},
        )

    def _observe(self, raw: RawObservation) -> Observation:
        return wrappers.observe(raw.agents_view, raw.action_mask, raw.step_count, self.global_state)
