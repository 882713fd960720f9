"""MABrax: each agent moves some joints of one body (jaxmarl's MABrax, on brax).

All agents get the body's reward. A fall terminates the episode on the bodies where brax ends it;
the time limit truncates it. Each agent sees the joints near its own. Views and actions are padded
to the longest; padded action dimensions are masked.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from magpo.envs import simulators, wrappers
from magpo.envs.registry import at_least, one_of
from magpo.types import Array, Observation, StepType, TimeStep, restart

mabrax = simulators.load("mabrax.mabrax_env", needs="mabrax")
mujoco = import_module("mujoco")  # installed with brax
Indices = dict[str, np.ndarray]  # by agent

# brax's ant: 0-4 are the torso, 5 + 2l and 6 + 2l the hip and ankle of leg l, 13-18 the torso's
# velocities, 19 + 2l and 20 + 2l the joints' velocities. An agent's view follows jaxmarl's ant_4x2:
# the torso, all hips, and its own leg's ankle.
ROOT, HIPS, ROOT_VELOCITIES = [0, 1, 2, 3, 4], [5, 7, 9, 11], [13, 14, 15, 16, 17, 18]
ANT_8X1 = [
    sorted(
        {*ROOT, *ROOT_VELOCITIES, 6 + 2 * leg, 19 + 2 * leg + joint, 5 + 2 * leg}
        | (set(HIPS) if joint == 0 else set())
    )
    for leg in range(4)
    for joint in range(2)
]
WALKER2D_6X1 = [
    [0, 2, 3, 5, 8, 9, 11],
    [0, 2, 3, 4, 8, 9, 12],
    [0, 3, 4, 8, 9, 13],
    [0, 2, 5, 6, 8, 9, 14],
    [0, 5, 6, 7, 8, 9, 15],
    [0, 6, 7, 8, 9, 16],
]
OWN = {"ant_8x1": ANT_8X1, "walker2d_6x1": WALKER2D_6X1}  # agent i moves joint i
BACKENDS = ("positional", "spring", "generalized", "mjx")


def _humanoid() -> dict[int, int]:
    """Return brax's indices by those of MuJoCo's humanoid, for which jaxmarl's mapping was made.

    MuJoCo has 22 positions, 23 velocities, inertia (10) and velocity (6) of each of 14 bodies, 23
    forces, and contact forces. brax has 11 bodies, without the world and with the feet as parts of
    the shins, and no contact forces.
    """
    bodies = [1, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13]  # MuJoCo's bodies that brax has, in its order
    kept = [*range(45)]
    kept += [45 + 10 * body + place for body in bodies for place in range(10)]
    kept += [185 + 6 * body + place for body in bodies for place in range(6)]
    kept += range(269, 292)
    return {index: place for place, index in enumerate(kept)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress MuJoCo's warnings, and those that brax and MABrax are no longer developed.

    MuJoCo would write warnings about old models to a file in the current folder.
    """
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            mujoco.set_mju_user_warning(handler)


def splits() -> dict[str, tuple[Indices, Indices]]:
    """Return what the agents of each split see and move: jaxmarl's splits and two of our own."""
    seen, moved = mabrax._agent_observation_mapping, mabrax._agent_action_mapping
    found = {name: jax.tree.map(np.asarray, (seen[name], moved[name])) for name in seen}
    for name, views in OWN.items():
        found[name] = (
            {f"agent_{i}": np.array(view) for i, view in enumerate(views)},
            {f"agent_{i}": np.array([i]) for i in range(len(views))},
        )
    return found


def corrected(split: str, seen: Indices, moved: Indices) -> tuple[Indices, Indices]:
    """Fix a split of jaxmarl, made for other observations and another order of joints."""
    body = split.partition("_")[0]
    if body == "ant":  # brax moves leg 4 first
        moved = {agent: (indices + 2) % 8 for agent, indices in moved.items()}
    if body == "halfcheetah":  # jaxmarl counts x, which brax leaves out
        seen = {agent: indices - 1 for agent, indices in seen.items()}
    if body == "humanoid":
        place = _humanoid()
        seen = {a: np.array([place[i] for i in s.tolist() if i in place]) for a, s in seen.items()}
    return seen, moved


@dataclass(unsafe_hash=True)
class Mabrax:
    """One environment; the options are explained in configs/env/mabrax.yaml."""

    name: str
    global_state: bool
    split: str
    mapping: str
    backend: str
    time_limit: int
    ends: str
    simulator: Any = field(init=False, repr=False, compare=False)
    num_agents: int = field(init=False)
    action_dim: int = field(init=False)
    action_kind: Literal["discrete", "continuous"] = field(default="continuous", init=False)
    truncates: bool = field(init=False)
    headline: str = field(default="episode_return", init=False)

    def __post_init__(self) -> None:
        at_least(self, time_limit=1)
        known = splits()
        one_of(
            self,
            split=tuple(known),
            mapping=("jaxmarl", "corrected"),
            backend=BACKENDS,
            ends=wrappers.ENDS,
        )
        seen, moved = known[self.split]
        if self.mapping == "corrected":
            seen, moved = corrected(self.split, seen, moved)
        with _quiet():
            self.simulator = mabrax.MABraxEnv(
                self.split,
                episode_length=self.time_limit,
                auto_reset=False,
                homogenisation_method="max",
                backend=self.backend,
                agent_obs_mapping=jax.tree.map(jnp.array, seen),
                agent_action_mapping=jax.tree.map(jnp.array, moved),
            )
        self.truncates = self.ends == "bootstrapped"
        self.num_agents = len(seen)
        self.action_dim = max(map(len, moved.values()))
        self._mask = np.array([np.arange(self.action_dim) < len(m) for m in moved.values()])
        self._seen = [*seen.values()]

    @property
    def terminates(self) -> str:
        return "" if self.split.startswith("halfcheetah") else "a fall"

    def reset(self, key: Array) -> tuple[Any, TimeStep]:
        state = wrappers.strong(self.simulator.env.reset(key))
        return state, restart(self.num_agents, self._observe(state), {})

    def step(self, state: Any, action: Array) -> tuple[Any, TimeStep]:
        actions = dict(zip(self.simulator.agents, action, strict=True))
        joints = self.simulator.map_agents_to_global_action(actions)
        state = wrappers.strong(self.simulator.env.step(state, joints))
        last, truncated = state.done > 0, state.info["truncation"] > 0
        return state, TimeStep(
            step_type=jnp.where(last, StepType.LAST, StepType.MID).astype(jnp.int8),
            reward=jnp.full(self.num_agents, state.reward),
            discount=wrappers.discount(last, truncated, self.ends),
            observation=self._observe(state),
            metrics={},
        )

    def _observe(self, state: Any) -> Observation:
        step_count = state.info["steps"].astype(jnp.int32)
        if self.mapping == "jaxmarl":  # its views begin with the id, and overlap it
            views = self.simulator.map_global_obs_to_agents(state.obs)
            return Observation(
                agents_view=jnp.stack([views[agent] for agent in self.simulator.agents]),
                action_mask=jnp.array(self._mask),
                step_count=step_count,
                global_state=state.obs if self.global_state else None,
            )
        longest = max(map(len, self._seen))
        views = [jnp.pad(state.obs[seen], (0, longest - len(seen))) for seen in self._seen]
        return wrappers.observe(
            jnp.stack(views), jnp.array(self._mask), step_count, self.global_state, state.obs
        )
