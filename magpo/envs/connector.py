"""Connector: agents draw paths to their targets that must not cross (jumanji's Connector, v3).

An agent is worth 1 when it connects and costs 0.03 for each step until then; the agents' rewards
are summed and given to each. All connected or stuck terminates; the time limit truncates. Boards
come from jumanji's legacy generator, the paper's. The step is jumanji's game over cells that
already hold what the views show, so that the views cost about what jumanji's own step spares.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jumanji.environments import Connector as Simulator
from jumanji.environments.routing.connector.generator import LegacyRandomWalkGenerator

from magpo.envs import wrappers
from magpo.envs.registry import at_least, at_most, one_of
from magpo.types import Array, Observation, StepType, TimeStep, restart

FOV = 2  # cells seen in each direction
WINDOW = 2 * FOV + 1
# What is in a cell, as the views show it. Bits 0-1: what blocks (1 a head or beyond the board, -1 a
# path); bits 2-3: the targets (-1 one, 1 beyond the board); both plus one. Above them: whose it is.
EMPTY, PATH, HEAD, TARGET, BEYOND = 0b0101, 0b0100, 0b0110, 0b0001, 0b1010
WHOSE = 4  # bits below


class State(NamedTuple):
    """Cells are numbered row by row, FOV of them beyond each edge: C = (size + 2 FOV)^2."""

    cells: Array  # (C,) int32
    heads: Array  # (N,) int32, the cell each agent is in
    targets: Array  # (N,) int32, the cell it has to reach
    action_mask: Array  # (N, 5) bool
    step_count: Array  # () int32
    total_path_length: Array  # () int32, heads included


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

    @property
    def width(self) -> int:
        """Of a row of cells."""
        return self.grid_size + 2 * FOV

    def reset(self, key: Array) -> tuple[State, TimeStep]:
        begun, _ = self.simulator.reset(key)
        whose, kind = jnp.divmod(begun.grid - 1, 3)  # jumanji's grid is 0 where it is empty
        drawn = jnp.array([PATH, HEAD, TARGET])[kind] + (whose << WHOSE)
        board = jnp.where(begun.grid == 0, EMPTY, drawn)
        row_and_column = jnp.array([self.width, 1])
        state = State(
            cells=jnp.pad(board, FOV, constant_values=BEYOND).reshape(-1),
            heads=(begun.agents.position + FOV) @ row_and_column,
            targets=(begun.agents.target + FOV) @ row_and_column,
            action_mask=begun.action_mask,
            step_count=begun.step_count,
            total_path_length=jnp.int32(self.num_agents),
        )
        return state, restart(self.num_agents, self._observe(state), self._metrics(state))

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:
        agents, old, targets = jnp.arange(self.num_agents), state.heads, state.targets
        ahead = jnp.array([0, -self.width, 1, self.width, -1])  # as the actions
        heads = old + jnp.where(state.action_mask, ahead, 0)[agents, action]
        # Of those that would meet in a cell only the last one moves.
        meets_later = (heads[:, None] == heads) & (agents[:, None] < agents)
        heads = jnp.where(meets_later.any(axis=1), old, heads)
        moved, was_connected, is_connected = heads != old, old == targets, heads == targets
        own, left_behind = agents << WHOSE, jnp.where(moved, PATH, HEAD)
        cells = state.cells.at[jnp.concatenate([old, heads])].set(
            jnp.concatenate([own + left_behind, own + HEAD]),
            mode="promise_in_bounds",
            wrap_negative_indices=False,
        )
        there = heads[:, None] + ahead[1:]  # (N, 4)
        free = (_at(cells, there) == EMPTY) | (there == targets[:, None])
        may_move = free & ~is_connected[:, None]
        state = State(
            cells=cells,
            heads=heads,
            targets=targets,
            action_mask=jnp.pad(may_move, ((0, 0), (1, 0)), constant_values=True),
            step_count=state.step_count + 1,
            total_path_length=state.total_path_length + moved.sum(),
        )
        connects, waited = is_connected & ~was_connected, ~was_connected
        reward = connects.astype(jnp.float32) - 0.03 * waited.astype(jnp.float32)
        over = ~may_move.any()
        last = over | (state.step_count >= self.time_limit)
        timestep = TimeStep(
            step_type=jnp.where(last, StepType.LAST, StepType.MID).astype(jnp.int8),
            reward=jnp.full(self.num_agents, reward.sum()),
            discount=wrappers.discount(last, ~over, self.ends),
            observation=self._observe(state),
            metrics=self._metrics(state),
        )
        return state, timestep

    def _metrics(self, state: State) -> dict[str, Array]:
        num_connections = connected(state).sum()
        return {
            "win_rate": (num_connections == self.num_agents).astype(jnp.float32),
            "num_connections": num_connections,
            "ratio_connections": num_connections / self.num_agents,
            "total_path_length": state.total_path_length,
        }

    def _place(self, cells: Array) -> Array:
        """(N, 2): the rows and columns of cells (N,) on the board."""
        width = jnp.int32(self.width)
        return jnp.stack([jax.lax.div(cells, width), jax.lax.rem(cells, width)], axis=1) - FOV

    def _observe(self, state: State) -> Observation:
        """54 features an agent, as in the released code: its own and its target's row and column
        (0, 0 once connected) over the number of cells; then of the cells around it what blocks (1 a
        head or beyond the board, -1 a path), and the targets (1 its own or beyond, -1 another's).
        """
        done = connected(state)[:, None]
        target = jnp.where(done, 0, self._place(state.targets))
        places = jnp.concatenate([self._place(state.heads), target], axis=1)  # (N, 4)

        # Constants of NumPy: XLA makes twice as fast a loop of them as of arrays it has computed.
        offsets = np.arange(-FOV, WINDOW - FOV)
        window = np.tile((self.width * offsets[:, None] + offsets).reshape(-1), 2)  # (2 * W * W,)
        shift = np.repeat([0, 2], WINDOW**2)
        around = state.heads[:, None] + window  # (N, 2 * W * W)
        seen = ((_at(state.cells, around) >> shift) & 0b11).astype(jnp.float32) - 1.0
        own_target = jnp.where(done, 0, state.targets[:, None])  # cell 0 is nobody's
        features = jnp.where((around == own_target) & (shift > 0), 1.0, seen)
        views = jnp.concatenate([places / self.grid_size**2, features], axis=1)
        return wrappers.observe(views, state.action_mask, state.step_count, self.global_state)


def connected(state: State) -> Array:
    """(N,) bool."""
    return state.heads == state.targets


def _at(cells: Array, numbers: Array) -> Array:
    return cells.at[numbers].get(mode="promise_in_bounds", wrap_negative_indices=False)
