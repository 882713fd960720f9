"""Connector: agents draw paths to their targets that must not cross (jumanji's Connector, v3).

An agent earns 1 when it connects and loses 0.03 for each step until then; every agent gets the sum
of the agents' rewards. An episode terminates once all agents are connected or stuck; the time limit
truncates it. Boards come from jumanji's legacy generator, as in the paper.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax.numpy as jnp
from jumanji.environments import Connector as Simulator
from jumanji.environments.routing.connector.constants import PATH, POSITION, TARGET
from jumanji.environments.routing.connector.generator import LegacyRandomWalkGenerator
from jumanji.environments.routing.connector.types import Observation as RawObservation
from jumanji.environments.routing.connector.types import State
from jumanji.types import TimeStep as RawTimeStep

from magpo.envs import wrappers
from magpo.envs.registry import at_least, at_most, one_of
from magpo.types import Array, Observation, TimeStep, restart

FOV = 2  # cells seen in each direction
WINDOW = 2 * FOV + 1


@dataclass(unsafe_hash=True)
class Connector:
    """One environment; the options are explained in configs/env/connector.yaml."""

    name: str
    global_state: bool
    grid_size: int
    num_agents: int
    time_limit: int
    ends: str
    simulator: Simulator = field(init=False, repr=False, compare=False)
    action_dim: int = field(default=5, init=False)  # wait, up, right, down, left
    action_kind: Literal["discrete", "continuous"] = field(default="discrete", init=False)
    truncates: bool = field(init=False)
    headline: str = field(default="win_rate", init=False)
    terminates: ClassVar[str] = "all connected or stuck"

    def __post_init__(self) -> None:
        at_least(self, grid_size=3, num_agents=1, time_limit=1)
        room = self.grid_size**2 // 7  # with more agents, some find no place to begin
        at_most(self, f"where grid_size is {self.grid_size}", num_agents=room)
        one_of(self, ends=wrappers.ENDS)
        self.truncates = self.ends == "bootstrapped"
        generator = LegacyRandomWalkGenerator(self.grid_size, self.num_agents)
        self.simulator = Simulator(generator, time_limit=self.time_limit)

    def reset(self, key: Array) -> tuple[State, TimeStep]:
        state, raw = self.simulator.reset(key)
        return state, restart(self.num_agents, self._observe(state), self._metrics(raw))

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:
        state, raw = self.simulator.step(state, action)
        return state, TimeStep(
            step_type=raw.step_type,
            reward=jnp.full(self.num_agents, raw.reward.sum()),
            # jumanji's discount is per agent: 1 at the limit only for agents that could still move.
            discount=wrappers.discount(raw.last(), raw.discount.max() > 0, self.ends),
            observation=self._observe(state),
            metrics=self._metrics(raw),
        )

    def _metrics(self, raw: RawTimeStep[RawObservation]) -> dict[str, Array]:
        won = raw.extras["ratio_connections"] == 1.0
        return {"win_rate": won.astype(jnp.float32), **raw.extras}

    def _observe(self, state: State) -> Observation:
        """Return the observation of 54 features per agent, as in the released code.

        - the agent's and its target's row and column, over the number of cells; the target's are 0
          once connected
        - obstacles in the cells around the agent: 1 for a head or beyond the board, -1 for a path
        - targets in these cells: 1 for the agent's own or beyond the board, -1 for another agent's
        """
        own, size = state.agents, self.grid_size
        target_at = jnp.where(own.connected[:, None], 0, own.target)  # (N, 2)
        places = jnp.concatenate([own.position, target_at], axis=1) / size**2

        # Compute every cell's features first, then gather each view's. The reverse order would take
        # twice as long, because XLA fuses a gather into everything that uses its result.
        board = jnp.pad(state.grid, FOV, constant_values=-1).reshape(-1)  # (C,)
        outside, kind = board < 0, board % TARGET
        blocked = jnp.where(outside | (kind == POSITION), 1.0, jnp.where(kind == PATH, -1.0, 0.0))
        targets = jnp.where(outside, 1.0, jnp.where((kind == 0) & (board > 0), -1.0, 0.0))
        width = size + 2 * FOV
        window = (width * jnp.arange(WINDOW)[:, None] + jnp.arange(WINDOW)).reshape(-1)  # (W * W,)
        cells = jnp.concatenate([window, width**2 + window])
        cells += own.position @ jnp.array([width, 1])[:, None]  # (N, 2 * W * W)
        seen = jnp.concatenate([blocked, targets]).at[cells].get(mode="promise_in_bounds")
        own_target = width**2 + (own.target + FOV) @ jnp.array([width, 1])  # (N,)
        is_own = (cells == own_target[:, None]) & ~own.connected[:, None]
        views = jnp.concatenate([places, jnp.where(is_own, 1.0, seen)], axis=1)
        return wrappers.observe(views, state.action_mask, state.step_count, self.global_state)
