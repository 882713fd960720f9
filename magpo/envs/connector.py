"""Connector: agents draw paths to their targets that must not cross (jumanji's Connector, v3).

An agent is worth 1 when it connects and costs 0.03 for each step until then; the agents' rewards
are summed and given to each. All connected or stuck terminates; the time limit truncates. Boards
come from jumanji's legacy generator, the paper's.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jumanji.environments import Connector as Simulator
from jumanji.environments.routing.connector.constants import PATH, POSITION, TARGET
from jumanji.environments.routing.connector.generator import LegacyRandomWalkGenerator
from jumanji.environments.routing.connector.types import Agent, State

from magpo.envs import wrappers
from magpo.envs.registry import at_least, at_most, one_of
from magpo.types import Array, Observation, StepType, TimeStep, restart

FOV = 2  # cells seen in each direction
WINDOW = 2 * FOV + 1


@dataclass(unsafe_hash=True)
class Connector:
    """One environment; the options are explained in configs/env/connector."""

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
        room = self.grid_size**2 // 7  # with more agents some find no way to begin
        at_most(self, f"where grid_size is {self.grid_size}", num_agents=room)
        one_of(self, ends=wrappers.ENDS)
        self.truncates = self.ends == "bootstrapped"
        generator = LegacyRandomWalkGenerator(self.grid_size, self.num_agents)
        self.simulator = Simulator(generator, time_limit=self.time_limit)

    @property
    def observation_spec(self) -> Observation:
        num_features = 4 + 2 * WINDOW**2
        return wrappers.observation_spec(
            self.num_agents, num_features, self.action_dim, self.global_state
        )

    def reset(self, key: Array) -> tuple[State, TimeStep]:
        state, _ = self.simulator.reset(key)
        observation = self._observe(state, self._board(state))
        return state, restart(self.num_agents, observation, self._metrics(state))

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:
        state, raw = self.simulator.step(state, action)
        # Legal actions, ends and statistics as jumanji's, in less time: XLA drops its own.
        board = self._board(state)  # once: padded twice, XLA made all of the step 15 % slower
        state = state.replace(action_mask=self._action_mask(state.agents, board))
        over = ~state.action_mask[:, 1:].any()
        last = over | (state.step_count >= self.time_limit)
        timestep = TimeStep(
            step_type=jnp.where(last, StepType.LAST, StepType.MID).astype(jnp.int8),
            reward=jnp.full(self.num_agents, raw.reward.sum()),
            discount=wrappers.discount(last, ~over, self.ends),
            observation=self._observe(state, board),
            metrics=self._metrics(state),
        )
        return state, timestep

    def _metrics(self, state: State) -> dict[str, Array]:
        connected = state.agents.connected
        num_targets = (~connected).sum()  # left on the grid; the rest of it is heads and paths
        return {
            "win_rate": (num_targets == 0).astype(jnp.float32),
            "num_connections": self.num_agents - num_targets,
            "ratio_connections": connected.mean(),
            "total_path_length": (state.grid != 0).sum() - num_targets,
        }

    def _board(self, state: State) -> Array:
        """The grid, flat, with FOV cells of -1 around it: (C,), C = (size + 2 FOV)^2."""
        return jnp.pad(state.grid, FOV, constant_values=-1).reshape(-1)

    def _action_mask(self, own: Agent, board: Array) -> Array:
        """(N, 5) bool: who is not connected may enter a free cell or its own target."""
        width = self.grid_size + 2 * FOV
        ahead = FOV * (width + 1) + jnp.array([-width, 1, width, -1])
        ahead += (own.position @ jnp.array([width, 1]))[:, None]  # (N, 4)
        there = board.at[ahead].get(mode="promise_in_bounds")
        own_target = TARGET + 3 * jnp.arange(self.num_agents)[:, None]
        may_move = ((there == 0) | (there == own_target)) & ~own.connected[:, None]
        return jnp.pad(may_move, ((0, 0), (1, 0)), constant_values=True)

    def _observe(self, state: State, board: Array) -> Observation:
        """54 features an agent, as in the released code: its own and its target's row and column
        (0, 0 once connected) over the number of cells; then of the cells around it what blocks (1 a
        head or beyond the board, -1 a path), and the targets (1 its own or beyond, -1 another's).
        """
        own, size = state.agents, self.grid_size
        target_at = jnp.where(own.connected[:, None], 0, own.target)  # (N, 2)
        places = jnp.concatenate([own.position, target_at], axis=1) / size**2

        # Every cell's features first, of which each view then takes its own: half the time of
        # taking cells first, since XLA fuses a gather into all that uses it.
        outside, kind = board < 0, jax.lax.rem(board + TARGET, TARGET)  # beyond: as a head
        blocked = jnp.where(kind == POSITION, 1.0, jnp.where(kind == PATH, -1.0, 0.0))
        targets = jnp.where(outside, 1.0, jnp.where((kind == 0) & (board > 0), -1.0, 0.0))
        width = size + 2 * FOV
        window = (width * jnp.arange(WINDOW)[:, None] + jnp.arange(WINDOW)).reshape(-1)  # (W * W,)
        cells = jnp.concatenate([window, width**2 + window])
        cells += (own.position @ jnp.array([width, 1]))[:, None]  # (N, 2 * W * W)
        seen = jnp.concatenate([blocked, targets]).at[cells].get(mode="promise_in_bounds")
        own_target = width**2 + (own.target + FOV) @ jnp.array([width, 1])
        own_target = jnp.where(own.connected, -1, own_target)  # (N,)
        is_own = cells == own_target[:, None]
        views = jnp.concatenate([places, jnp.where(is_own, 1.0, seen)], axis=1)
        return wrappers.observe(views, state.action_mask, state.step_count, self.global_state)
