"""Data that crosses module borders.

Axis letters, used in every shape comment: S seeds, T rollout steps, E environments, N agents,
L = T * N tokens, O observation features, G global-state features, A actions (a discrete count, or
the dimensions of a continuous action).
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class StepType:
    """dm_env's step types."""

    FIRST = 0
    MID = 1
    LAST = 2


class Observation(NamedTuple):
    """What the agents see; agents are an array axis."""

    agents_view: Array  # (N, O) float32, the one-hot agent id first
    action_mask: Array  # (N, A) bool, true where legal
    step_count: Array  # () int32, steps since the episode began
    global_state: Array | None = None  # (G,) float32, for centralised critics


class TimeStep(NamedTuple):
    """One transition's outcome; under auto-reset `observation` is already the next episode's."""

    step_type: Array  # () int8
    reward: Array  # (N,) float32
    discount: Array  # () float32, 0 only where the episode terminated
    observation: Observation
    metrics: dict[str, Array]  # () each; a finished episode's figures, meaningful where last()
    terminal_observation: Observation | None = None  # only under auto-reset, where `truncates`

    def last(self) -> Array:
        return self.step_type == StepType.LAST

    def truncated(self) -> Array:
        """The episode was cut off: its last observation still has a value."""
        return self.last() & (self.discount > 0)


class Environment(Protocol):
    """One environment: pure functions, no batch axis."""

    name: str  # "rware/tiny-4ag"
    num_agents: int
    action_dim: int
    action_kind: Literal["discrete", "continuous"]
    time_limit: int  # steps; no episode is longer
    truncates: bool  # whether an episode can end by truncation
    headline: str  # the metric its papers report: "episode_return" or "win_rate"

    @property
    def terminates(self) -> str: ...  # what ends an episode before its limit; "": nothing

    @property
    def observation_spec(self) -> Observation: ...  # leaves are jax.ShapeDtypeStruct

    def reset(self, key: Array) -> tuple[Any, TimeStep]: ...

    def step(self, state: Any, action: Array) -> tuple[Any, TimeStep]: ...


@dataclass(frozen=True)
class EnvSpec:
    """What of an environment a policy depends on. A system's `make` takes it for one."""

    name: str
    num_agents: int
    num_features: int  # O
    action_dim: int
    action_kind: Literal["discrete", "continuous"]
    time_limit: int
    truncates: bool
    headline: str


class Card(NamedTuple):
    """What a system is: a row of `python -m magpo.systems`, and how its policies are loaded."""

    centralised: str  # what sees all agents
    deployed: Literal["each agent's policy", "a joint policy"]
    memory: str  # of what is deployed
    parameters: Literal["shared", "each agent's own"]  # of what is deployed


def spec(env: Environment) -> EnvSpec:
    """An environment's EnvSpec."""
    num_features = env.observation_spec.agents_view.shape[-1]
    names = [field.name for field in fields(EnvSpec) if field.name != "num_features"]
    return EnvSpec(num_features=num_features, **{name: getattr(env, name) for name in names})


def action_spec(env: Environment) -> jax.ShapeDtypeStruct:
    """What `env.step` takes: (N,) int32, or (N, A) float32 if continuous."""
    shaped: Any = jax.ShapeDtypeStruct
    discrete = env.action_kind == "discrete"
    spec: jax.ShapeDtypeStruct = shaped(
        (env.num_agents,) if discrete else (env.num_agents, env.action_dim),
        jnp.int32 if discrete else jnp.float32,
    )
    return spec


def restart(num_agents: int, observation: Observation, metrics: dict[str, Array]) -> TimeStep:
    """The first timestep of an episode."""
    return TimeStep(
        step_type=jnp.int8(StepType.FIRST),
        reward=jnp.zeros(num_agents),
        discount=jnp.float32(1.0),
        observation=observation,
        metrics=metrics,
    )
