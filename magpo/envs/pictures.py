"""Pictures of a state, for each suite. Imports matplotlib, so import this module late.

Agents are coloured discs with their numbers, their goals are squares, and an agent that acts has a
ring around it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle

INK, PALE, GOAL, WARN = "#1f2933", "#e4e7eb", "#2f9e44", "#d9480f"


def colour(agent: int) -> Any:
    """Return an agent's colour."""
    return colormaps["tab20"](agent % 20)


def _board(axes: Axes, rows: int, columns: int) -> None:
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal")
    axes.set_xticks(np.arange(-0.5, columns), [])
    axes.set_yticks(np.arange(-0.5, rows), [])
    axes.grid(color=PALE, linewidth=0.8)
    axes.tick_params(length=0)


def _square(axes: Axes, row: float, column: float, face: Any, size: float = 0.8) -> None:
    corner = column - size / 2, row - size / 2
    axes.add_patch(Rectangle(corner, size, size, facecolor=face, edgecolor=INK, linewidth=0.6))


def _agent(
    axes: Axes, number: int, row: float, column: float, radius: float = 0.36, acts: bool = False
) -> None:
    edge, width = (WARN, 2.5) if acts else (INK, 0.6)
    disc = Circle((column, row), radius, facecolor=colour(number), edgecolor=edge, linewidth=width)
    axes.add_patch(disc)
    axes.text(column, row, str(number), ha="center", va="center", fontsize=7, color=INK)


def coordsum(axes: Axes, env: Any, state: Any, action: np.ndarray | None) -> None:
    """Draw the target, the numbers that the agents picked, and the opponent's guess."""
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    row = min(int(state.target), state.history.shape[0] - 1)
    guess = int(np.argmax(state.history[row]))
    axes.text(0.5, 0.85, f"target {int(state.target)}", ha="center", fontsize=16, color=GOAL)
    if action is None:
        return
    places = (np.arange(env.num_agents) + 0.5) / env.num_agents
    for agent, (x, picked) in enumerate(zip(places, action, strict=True)):
        axes.text(x, 0.55, str(int(picked)), ha="center", fontsize=20, color=INK)
        axes.text(x, 0.45, f"agent {agent}", ha="center", fontsize=8, color=colour(agent))
    total = int(action.sum())
    right = GOAL if total == int(state.target) else WARN
    axes.text(0.5, 0.25, f"sum {total}", ha="center", fontsize=14, color=right)
    found = "right" if guess == int(action[0]) else "wrong"
    guessed = f"the opponent guesses {guess} for agent 0: {found}"
    axes.text(0.5, 0.1, guessed, ha="center", fontsize=10, color=INK)


def lbf(axes: Axes, env: Any, state: Any, action: np.ndarray | None) -> None:
    """Draw food as squares and agents, both with levels; agents that load have a ring."""
    _board(axes, env.grid_size, env.grid_size)
    food, agents = state.food_items, state.agents
    for (row, column), level, eaten in zip(food.position, food.level, food.eaten, strict=True):
        if not eaten:
            _square(axes, row, column, "#b2f2bb")
            axes.text(column, row, str(int(level)), ha="center", va="center", fontsize=8)
    for agent, ((row, column), level) in enumerate(zip(agents.position, agents.level, strict=True)):
        _agent(axes, agent, row, column, acts=action is not None and action[agent] == 5)
        axes.text(column + 0.3, row + 0.38, f"L{int(level)}", ha="center", fontsize=5)


def connector(axes: Axes, env: Any, state: Any, action: np.ndarray | None) -> None:
    """Draw paths in their agents' colours and targets as squares; connected agents have a ring."""
    from jumanji.environments.routing.connector.constants import PATH, TARGET

    _board(axes, env.grid_size, env.grid_size)
    whose, what = np.divmod(state.grid - 1, TARGET)
    for row, column in np.argwhere(what == PATH - 1):
        _square(axes, row, column, colour(whose[row, column]), size=0.3)
    for row, column in np.argwhere((what == TARGET - 1) & (state.grid > 0)):
        agent = whose[row, column]
        _square(axes, row, column, colour(agent))
        axes.text(column, row, str(agent), ha="center", va="center", fontsize=7)
    for agent, (row, column) in enumerate(state.agents.position):
        _agent(axes, agent, row, column, acts=state.agents.connected[agent])


def rware(axes: Axes, env: Any, state: Any, action: np.ndarray | None) -> None:
    """Draw shelves grey, requested ones green, goals orange; a line shows an agent's heading."""
    rows, columns = state.grid.shape[1:]
    _board(axes, rows, columns)
    for column, row in np.asarray(env.simulator.goals):
        _square(axes, row, column, "#ffd8a8", size=1.0)
    shelves, agents = state.shelves, state.agents
    places = zip(shelves.position.x, shelves.position.y, shelves.is_requested, strict=True)
    for row, column, requested in places:
        _square(axes, row, column, "#69db7c" if requested else "#ced4da", size=0.7)
    headings = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
    for agent, (row, column) in enumerate(zip(agents.position.x, agents.position.y, strict=True)):
        _agent(axes, agent, row, column, acts=bool(agents.is_carrying[agent]))
        down, right = 0.5 * headings[agents.direction[agent]]
        axes.plot([column, column + right], [row, row + down], color=INK, linewidth=2)


def mpe(axes: Axes, env: Any, state: Any, action: np.ndarray | None) -> None:
    """Draw landmarks as squares and agents as discs of their own size."""
    span = 1.5
    axes.set(xlim=(-span, span), ylim=(-span, span), aspect="equal")
    for x, y in state.p_pos[env.num_agents :]:
        _square(axes, y, x, "#b2f2bb", size=0.1)
    radius = np.asarray(env.simulator.rad)
    for agent, (x, y) in enumerate(state.p_pos[: env.num_agents]):
        _agent(axes, agent, y, x, radius[agent])


def smax(axes: Axes, env: Any, state: Any, action: np.ndarray | None) -> None:
    """Draw enemies as red squares; size shows health, and a line a shot."""
    units = state.battle.state
    axes.set(xlim=(0, 32), ylim=(0, 32), aspect="equal")
    whole = np.asarray(env.simulator.unit_type_health)[units.unit_types]
    share = np.maximum(units.unit_health, 0) / whole
    enemies = range(env.num_agents, len(units.unit_alive))
    for unit in np.flatnonzero(units.unit_alive):
        x, y = units.unit_positions[unit]
        size = 0.4 + 0.6 * share[unit]
        if unit < env.num_agents:
            _agent(axes, int(unit), y, x, size)
        else:
            _square(axes, y, x, "#ffa8a8", 1.8 * size)
    for agent in range(env.num_agents):
        target = -1 if action is None else int(action[agent]) - 5
        if target >= 0 and units.unit_alive[agent]:
            ends = units.unit_positions[[agent, enemies[target]]]
            axes.plot(ends[:, 0], ends[:, 1], color=colour(agent), linewidth=1, linestyle=":")


def views(axes: Axes, view: np.ndarray, action: np.ndarray | None) -> None:
    """Draw any environment's views (N, O) as rows of shades, beside the agents' actions."""
    axes.imshow(view, aspect="auto", cmap="viridis")
    chosen = [""] * len(view) if action is None else [f": {np.round(a, 1)}" for a in action]
    axes.set_yticks(range(len(view)), [f"{agent}{text}" for agent, text in enumerate(chosen)])
    axes.set_xlabel("feature of an agent's view")
    axes.set_ylabel("agent: action")


DRAW: dict[str, Callable[[Axes, Any, Any, np.ndarray | None], None]] = {
    "coordsum": coordsum,
    "lbf": lbf,
    "connector": connector,
    "mpe": mpe,
    "rware": rware,
    "smax": smax,
}
