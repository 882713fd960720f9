"""SMAX: micromanaged battles against a scripted enemy (jaxmarl's HeuristicEnemySMAX).

The team earns the share of health that the enemies lose, 1 in all, and 1 for winning. A dead team
terminates the episode; the time limit truncates it. This is jaxmarl 0.2's game: unlike in the
papers' versions, cooldowns are scaled and dead units do not move.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from magpo.envs import simulators, wrappers
from magpo.envs.registry import at_least, one_of
from magpo.types import Array, Observation, StepType, TimeStep, restart

smax_env = simulators.load("smax.smax_env")
HeuristicEnemySMAX = simulators.load("smax").HeuristicEnemySMAX
STALKER, ZEALOT = 2, 3
SCENARIOS = {
    **smax_env.MAP_NAME_TO_SCENARIO,
    "1s1z": smax_env.Scenario(jnp.array([STALKER, ZEALOT] * 2, jnp.uint8), 2, 2, False, False),
}


class State(NamedTuple):
    key: Array  # () the episode's; step t draws from fold_in(key, t)
    battle: Any  # the simulator's


@dataclass(unsafe_hash=True)
class Smax:
    """One environment; the options are explained in configs/env/smax.yaml."""

    name: str
    global_state: bool
    scenario: str
    see_enemy_actions: bool
    walls_cause_death: bool
    attack_mode: str
    time_limit: int
    ends: str
    simulator: Any = field(init=False, repr=False, compare=False)
    num_agents: int = field(init=False)
    action_dim: int = field(init=False)  # four directions, stop, and a shot at each enemy
    action_kind: Literal["discrete", "continuous"] = field(default="discrete", init=False)
    truncates: bool = field(init=False)
    headline: str = field(default="win_rate", init=False)
    terminates: ClassVar[str] = "a dead team"
    stop_action: ClassVar[int] = 4

    def __post_init__(self) -> None:
        at_least(self, time_limit=1)
        one_of(
            self,
            scenario=tuple(SCENARIOS),
            attack_mode=("closest", "random"),
            ends=wrappers.ENDS,
        )
        self.truncates = self.ends == "bootstrapped"
        self.simulator = HeuristicEnemySMAX(
            attack_mode=self.attack_mode,
            scenario=SCENARIOS[self.scenario],
            see_enemy_actions=self.see_enemy_actions,
            walls_cause_death=self.walls_cause_death,
            max_steps=self.time_limit - 1,  # checked before the simulator counts the step
        )
        self.num_agents = self.simulator.num_allies
        self.action_dim = self.simulator.num_ally_actions

    def reset(self, key: Array) -> tuple[State, TimeStep]:
        begin, battle = jax.random.split(key)
        views, state = self.simulator.reset(begin)
        state = State(battle, wrappers.strong(state))
        metrics = {"win_rate": jnp.float32(0.0)}
        return state, restart(self.num_agents, self._observe(views, state), metrics)

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:
        key = jax.random.fold_in(state.key, state.battle.state.step)
        actions = dict(zip(self.simulator.agents, action, strict=True))
        views, battle, rewards, dones, _ = self.simulator.step_env(key, state.battle, actions)
        state = State(state.key, wrappers.strong(battle))
        alive = battle.state.unit_alive
        allies, enemies = alive[: self.num_agents].any(), alive[self.num_agents :].any()
        last = dones["__all__"]
        return state, TimeStep(
            step_type=jnp.where(last, StepType.LAST, StepType.MID).astype(jnp.int8),
            reward=jnp.full(self.num_agents, rewards[self.simulator.agents[0]]),  # the team's
            discount=wrappers.discount(last, allies & enemies, self.ends),
            observation=self._observe(views, state),
            metrics={"win_rate": (allies & ~enemies).astype(jnp.float32)},
        )

    def _observe(self, views: dict[str, Array], state: State) -> Observation:
        agents, legal = self.simulator.agents, self.simulator.get_avail_actions(state.battle)
        return wrappers.observe(
            jnp.stack([views[agent] for agent in agents]),
            jnp.stack([legal[agent] for agent in agents]).astype(bool),
            state.battle.state.step,
            self.global_state,
            views["world_state"],
        )
