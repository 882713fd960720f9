from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.types import Environment, TimeStep


class Play(NamedTuple):
    """Episodes of B environments under random legal actions, without restarts."""

    keys: jax.Array  # (B,) passed to reset
    first: TimeStep  # (B, ...)
    actions: np.ndarray  # (T, B, N[, A])
    timesteps: TimeStep  # (T, B, ...)
    ends: np.ndarray  # (B,) the index of the step that ended the episode

    @property
    def until_end(self) -> np.ndarray:
        """The steps (T, B) up to each episode's end."""
        return np.arange(len(self.actions))[:, None] <= self.ends


def random_actions(env, key, mask):
    """Draw uniformly from the legal actions; mask (..., A)."""
    if env.action_kind == "continuous":
        return jax.random.uniform(key, mask.shape, minval=-1.0)
    return jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf)).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 2))
def episodes(env: Environment, key, batch: int):
    def step(carry, key):
        state, mask = carry
        action = random_actions(env, key, mask)
        state, timestep = jax.vmap(env.step)(state, action)
        return (state, timestep.observation.action_mask), (action, timestep)

    start, act = jax.random.split(key)
    keys = jax.random.split(start, batch)
    state, first = jax.vmap(env.reset)(keys)
    carry = (state, first.observation.action_mask)
    _, (actions, timesteps) = jax.lax.scan(step, carry, jax.random.split(act, env.time_limit))
    return keys, first, actions, timesteps


@cache
def play_episodes(env: Environment, seed: int, batch: int) -> Play:
    keys, *played = episodes(env, jax.random.key(seed), batch)
    first, actions, timesteps = jax.tree.map(np.asarray, played)
    return Play(keys, first, actions, timesteps, np.argmax(timesteps.last(), axis=0))


@pytest.fixture(scope="session")
def play():
    return play_episodes
