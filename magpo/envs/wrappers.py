"""Code that all suites share: agent ids, the global state, automatic restarts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magpo.types import Array, Environment, Observation, TimeStep

ENDS = ("bootstrapped", "released")  # truncation or termination at a limit


def discount(last: Array, truncated: Array, ends: str) -> Array:
    """Return () float32, 0 where an episode terminated or, if `ends` is released, was cut off."""
    terminated = last & ~truncated if ends == "bootstrapped" else last
    return 1.0 - terminated.astype(jnp.float32)


def observe(
    views: Array,
    action_mask: Array,
    step_count: Array,
    global_state: bool,
    own_state: Array | None = None,
) -> Observation:
    """Return an observation from the agents' `views` (N, F) and action mask (N, A).

    The one-hot agent id becomes the first N features of each view. The global state, if requested,
    is the simulator's own, (G,), or else all agents' features without ids, (N * F,).
    """
    views = views.astype(jnp.float32)
    whole = views.reshape(-1) if own_state is None else own_state
    return Observation(
        agents_view=jnp.concatenate([jnp.eye(len(views)), views], axis=1),
        action_mask=action_mask,
        step_count=step_count,
        global_state=whole if global_state else None,
    )


def random_action(env: Environment, mask: Array, key: Array) -> Array:
    """Return random legal actions for a mask (..., N, A)."""
    if env.action_kind == "continuous":
        return jax.random.uniform(key, mask.shape, minval=-1.0)
    return jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))


def strong(tree: Any) -> Any:
    """Return the same values without weak types, since a scan's carry must keep its types."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)


class AutoResetState(NamedTuple):
    """The state of E environments, with spare starts of coming episodes, drawn E at a time.

    Episodes are numbered in the order in which they begin: number j is env.reset(fold_in(key, j)).
    """

    env: Any  # (E, ...) states
    episode_return: Array  # (E,) float32, so far
    episode_length: Array  # (E,) int32, so far
    key: Array  # ()
    begun: Array  # () int32, episodes begun, which is the next episode's number
    spares: tuple[Any, Observation]  # (E, ...) states and first observations
    first_spare: Array  # () int32, the number of the first spare, at most `begun`


class _Restarts(NamedTuple):
    """Running episodes and spare starts, before and after ended episodes restart."""

    due: Array  # () bool
    running: tuple[Any, Observation]  # (E, ...)
    spares: tuple[Any, Observation]  # (E, ...)
    first_spare: Array  # ()


@dataclass(frozen=True)
class AutoReset:
    """A batch of E environments stepped together, each restarted when its episode ends.

    A step that ends an episode returns that episode's reward, discount, metrics and LAST, but the
    next episode's first observation. If `env.truncates`, `terminal_observation` is the observation
    before any restart, otherwise None. The metrics gain "episode_return", the sum so far of the
    reward's mean over agents, and "episode_length".

    A reset can cost many times a step, so most steps compute none: ended environments take spare
    starts, and E new spares are drawn at once when these run out.
    """

    env: Environment
    num_envs: int

    def reset(self, key: Array) -> tuple[AutoResetState, TimeStep]:
        """Begin E episodes; the timestep has the same structure as one of `step`."""
        num_envs = self.num_envs
        starts = self._starts(key, jnp.arange(2 * num_envs))
        env_state, timestep = jax.tree.map(lambda leaf: leaf[:num_envs], starts)
        spare_state, spare = jax.tree.map(lambda leaf: leaf[num_envs:], starts)
        state = AutoResetState(
            env=env_state,
            episode_return=jnp.zeros(num_envs),
            episode_length=jnp.zeros(num_envs, jnp.int32),
            key=key,
            begun=jnp.int32(num_envs),
            spares=(spare_state, spare.observation),
            first_spare=jnp.int32(num_envs),
        )
        timestep = timestep._replace(metrics=_with_statistics(timestep.metrics, state))
        if self.env.truncates:
            unused = jax.tree.map(jnp.copy, timestep.observation)
            timestep = timestep._replace(terminal_observation=unused)
        return state, timestep

    def step(self, state: AutoResetState, action: Array) -> tuple[AutoResetState, TimeStep]:
        """Step every environment with its action, (E, N) or (E, N, A)."""
        env_state, timestep = jax.vmap(self.env.step)(state.env, action)
        ended = timestep.last()
        state = state._replace(
            episode_return=state.episode_return + timestep.reward.mean(axis=-1),
            episode_length=state.episode_length + 1,
        )
        metrics = _with_statistics(timestep.metrics, state)

        begun = state.begun + ended.sum()

        # A loop of at most one iteration: most steps end no episode, but a `lax.cond` vmapped over
        # seeds would run its branch on every step.
        def restart_ended(restarts: _Restarts) -> _Restarts:
            spares, first_spare = self._refill(state, begun, restarts)
            number = state.begun + jnp.cumsum(ended) - 1  # the next episode's, where one ended
            taken = number - first_spare
            running = jax.tree.map(
                lambda spare, old: _where(ended, spare.at[taken].get(mode="clip"), old),
                spares,
                restarts.running,
            )
            return _Restarts(jnp.bool_(False), running, spares, first_spare)

        restarts = jax.lax.while_loop(
            lambda restarts: restarts.due,
            restart_ended,
            _Restarts(
                due=ended.any(),
                running=(env_state, timestep.observation),
                spares=state.spares,
                first_spare=state.first_spare,
            ),
        )
        env_state, observation = restarts.running
        state = AutoResetState(
            env=env_state,
            episode_return=jnp.where(ended, 0.0, state.episode_return),
            episode_length=jnp.where(ended, 0, state.episode_length),
            key=state.key,
            begun=begun,
            spares=restarts.spares,
            first_spare=restarts.first_spare,
        )
        timestep = timestep._replace(
            observation=observation,
            metrics=metrics,
            terminal_observation=timestep.observation if self.env.truncates else None,
        )
        return state, timestep

    def _refill(
        self, state: AutoResetState, begun: Array, restarts: "_Restarts"
    ) -> tuple[tuple[Any, Observation], Array]:
        """Return enough spares for the episodes before number `begun`, and the first's number."""
        used = state.begun - restarts.first_spare

        # Again at most one iteration. The draw depends on the carry; otherwise XLA would move it
        # out of the loop.
        def draw(carry: tuple[Any, Array]) -> tuple[Any, Array]:
            first = carry[1] + used
            spare_state, spare = self._starts(state.key, first + jnp.arange(self.num_envs))
            return (spare_state, spare.observation), first

        return jax.lax.while_loop(
            lambda carry: begun - carry[1] > self.num_envs,  # also right if the numbers overflow
            draw,
            (restarts.spares, restarts.first_spare),
        )

    def _starts(self, key: Array, numbers: Array) -> tuple[Any, TimeStep]:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
        return jax.vmap(self.env.reset)(keys)


def _with_statistics(metrics: dict[str, Array], state: AutoResetState) -> dict[str, Array]:
    return metrics | {
        "episode_return": state.episode_return,
        "episode_length": state.episode_length,
    }


def _where(rows: Array, new: Array, old: Array) -> Array:
    """Return `new` in the `rows` (E,) that are true, otherwise `old`; both are (E, ...)."""
    return jnp.where(rows.reshape(rows.shape + (1,) * (old.ndim - 1)), new, old)


def terminal_value(timestep: TimeStep, value: Callable[[Observation], Array]) -> Array | None:
    """Return the values (E, N) of truncated episodes' last observations, 0 elsewhere.

    `value` computes them from the observations before any restart, and only at steps that truncate
    an episode. On suites that never truncate, returns None.
    """
    terminal, truncated = timestep.terminal_observation, timestep.truncated()
    if terminal is None:
        return None
    return jax.lax.cond(
        truncated.any(),
        lambda: jnp.where(truncated[:, None], value(terminal), 0.0),
        lambda: jnp.zeros_like(timestep.reward),
    )
