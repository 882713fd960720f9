"""MPE simple_spread: particles cover landmarks without bumping into each other (jaxmarl's MPE).

By default, half of each agent's reward is the team's, for the landmarks' distances to their nearest
agents, and half is for the agent's own collisions. So rewards differ between agents; they are not
averaged. Every episode is cut off at the time limit.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from magpo.envs import simulators, wrappers
from magpo.envs.registry import at_least, at_most, one_of
from magpo.types import Array, Observation, StepType, TimeStep, restart


@dataclass(unsafe_hash=True)
class Mpe:
    """One environment; the options are explained in configs/env/mpe.yaml."""

    name: str
    global_state: bool
    num_agents: int
    local_ratio: float
    time_limit: int
    action_range: str
    ends: str
    simulator: Any = field(init=False, repr=False, compare=False)
    action_dim: int = field(default=5, init=False)  # unused, left, right, down, up
    action_kind: Literal["discrete", "continuous"] = field(default="continuous", init=False)
    truncates: bool = field(init=False)
    headline: str = field(default="episode_return", init=False)
    terminates: ClassVar[str] = ""

    def __post_init__(self) -> None:
        at_least(self, num_agents=2, local_ratio=0, time_limit=1)
        at_most(self, local_ratio=1)
        one_of(self, action_range=("box", "released"), ends=wrappers.ENDS)
        self.truncates = self.ends == "bootstrapped"
        self.simulator = simulators.load("mpe").SimpleSpreadMPE(
            num_agents=self.num_agents,
            num_landmarks=self.num_agents,
            local_ratio=self.local_ratio,
            action_type="Continuous",
            max_steps=self.time_limit - 1,  # checked before the simulator counts the step
        )

    def reset(self, key: Array) -> tuple[Any, TimeStep]:
        views, state = self.simulator.reset(key)
        state = state.replace(step=jnp.int32(0))
        return state, restart(self.num_agents, self._observe(views, state), {})

    def step(self, state: Any, action: Array) -> tuple[Any, TimeStep]:
        if self.action_range == "box":  # the simulator takes 0 .. 1
            action = (action + 1.0) / 2.0
        actions = dict(zip(self.simulator.agents, action, strict=True))
        unused = jax.random.key(0)  # its noise is zero
        views, state, rewards, _, _ = self.simulator.step_env(unused, state, actions)
        last = state.done
        return state, TimeStep(
            step_type=jnp.where(last, StepType.LAST, StepType.MID).astype(jnp.int8),
            reward=jnp.stack([rewards[agent] for agent in self.simulator.agents]),
            discount=wrappers.discount(last, last, self.ends),
            observation=self._observe(views, state),
            metrics={},
        )

    def _observe(self, views: dict[str, Array], state: Any) -> Observation:
        stacked = jnp.stack([views[agent] for agent in self.simulator.agents])
        mask = jnp.ones((self.num_agents, self.action_dim), bool)
        return wrappers.observe(stacked, mask, state.step, self.global_state)
