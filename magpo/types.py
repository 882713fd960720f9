"""Data types that several modules share.

Axis letters, used in every shape comment: M members, S seeds, T rollout steps, E environments, N
agents, B sequences, C steps of a sequence, L = T * N tokens, O observation features, G global-state
features, A actions (a discrete count, or the dimensions of a continuous action).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
Metrics = dict[str, Array]  # by name, as `metrics.jsonl` records them


class StepType:
    """dm_env's step types."""

    FIRST = 0
    MID = 1
    LAST = 2


class Observation(NamedTuple):
    """All agents' observations; agents are an array axis."""

    agents_view: Array  # (N, O) float32, the one-hot agent id first
    action_mask: Array  # (N, A) bool, true where legal
    step_count: Array  # () int32, steps since the episode began
    global_state: Array | None = None  # (G,) float32, for centralised critics


class TimeStep(NamedTuple):
    """One transition's outcome; under auto-reset, `observation` is already the next episode's."""

    step_type: Array  # () int8
    reward: Array  # (N,) float32
    discount: Array  # () float32, 0 only where the episode terminated
    observation: Observation
    metrics: Metrics  # () each, of the episode; meaningful where last()
    terminal_observation: Observation | None = None  # only under auto-reset, where `truncates`

    def last(self) -> Array:
        return self.step_type == StepType.LAST

    def truncated(self) -> Array:
        """Return whether the episode was cut off: its last observation still has a value."""
        return self.last() & (self.discount > 0)


class Environment(Protocol):
    """An environment: pure functions without a batch axis."""

    name: str  # "rware/tiny-4ag"
    num_agents: int
    action_dim: int
    action_kind: Literal["discrete", "continuous"]
    time_limit: int  # steps; no episode is longer
    truncates: bool  # whether an episode can end by truncation
    headline: str  # the metric its papers report: "episode_return" or "win_rate"

    @property
    def terminates(self) -> str: ...  # the event that ends an episode before its limit; "": none

    def reset(self, key: Array) -> tuple[Any, TimeStep]: ...

    def step(self, state: Any, action: Array) -> tuple[Any, TimeStep]: ...


@dataclass(frozen=True)
class EnvSpec:
    """The static properties of an environment that a system's `make` needs."""

    name: str
    num_agents: int
    num_features: int  # O
    num_state_features: int | None  # G; None without a global state
    action_dim: int
    action_kind: Literal["discrete", "continuous"]
    time_limit: int
    truncates: bool
    headline: str
    stop_action: int | None  # the action that does nothing, if there is one


def spec(env: Environment) -> EnvSpec:
    """Return an environment's EnvSpec; trace `reset` for the shapes of observations."""
    _, first = jax.eval_shape(env.reset, jax.eval_shape(lambda: jax.random.key(0)))
    views = first.observation
    return EnvSpec(
        name=env.name,
        num_agents=env.num_agents,
        num_features=views.agents_view.shape[-1],
        num_state_features=None if views.global_state is None else views.global_state.shape[-1],
        action_dim=env.action_dim,
        action_kind=env.action_kind,
        time_limit=env.time_limit,
        truncates=env.truncates,
        headline=env.headline,
        stop_action=getattr(env, "stop_action", None),
    )


def action_spec(env: Environment | EnvSpec) -> jax.ShapeDtypeStruct:
    """Return `env.step`'s action shape and dtype: (N,) int32, or (N, A) float32 if continuous."""
    if env.action_kind == "discrete":
        return jax.ShapeDtypeStruct((env.num_agents,), jnp.int32)
    return jax.ShapeDtypeStruct((env.num_agents, env.action_dim), jnp.float32)


def restart(num_agents: int, observation: Observation, metrics: Metrics) -> TimeStep:
    """Return the first timestep of an episode."""
    return TimeStep(
        step_type=jnp.int8(StepType.FIRST),
        reward=jnp.zeros(num_agents),
        discount=jnp.float32(1.0),
        observation=observation,
        metrics=metrics,
    )
