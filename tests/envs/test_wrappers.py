"""AutoReset checked against a Python loop that resets every environment that ended."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.envs.wrappers import AutoReset, observe
from magpo.types import StepType, TimeStep, restart

E, T, N = 5, 30, 2


class State(NamedTuple):
    key: jax.Array
    length: jax.Array
    step_count: jax.Array


@dataclass(frozen=True)
class Fleeting:
    """Episodes of 1 or 2 steps: many end together, and spare starts run out at once."""

    truncates: bool
    num_agents: int = N
    longest: int = 2

    def reset(self, key):
        length = jax.random.randint(key, (), 1, self.longest + 1)
        state = State(key, length, jnp.int32(0))
        return state, restart(N, self.observe(state), {"length": length})

    def step(self, state, action):
        state = state._replace(step_count=state.step_count + 1)
        last = state.step_count >= state.length
        timestep = TimeStep(
            step_type=jnp.where(last, StepType.LAST, StepType.MID).astype(jnp.int8),
            reward=action.astype(jnp.float32),
            discount=jnp.where(last & (state.length < self.longest), 0.0, jnp.float32(1.0)),
            observation=self.observe(state),
            metrics={"length": state.length},
        )
        return state, timestep

    def observe(self, state):
        views = jax.random.normal(jax.random.fold_in(state.key, state.step_count), (N, 3))
        return observe(views, jnp.ones((N, 4), bool), state.step_count, global_state=True)


ACTIONS = np.random.default_rng(0).integers(0, 4, (T, E, N), np.int32)


def run(env, key):
    batch = AutoReset(env, E)
    state, first = batch.reset(key)
    return first, jax.lax.scan(batch.step, state, ACTIONS)[1]


reset = jax.jit(Fleeting.reset, static_argnums=0)
step = jax.jit(Fleeting.step, static_argnums=0)


def naive(env, key):
    """Play one environment at a time; return first timesteps (E, ...), then all (T, E, ...)."""
    starts = [reset(env, jax.random.fold_in(key, e)) for e in range(E)]
    states, begun = [state for state, _ in starts], E
    rewards, rows = [[] for _ in range(E)], []
    for t in range(T):
        row = []
        for e in range(E):
            states[e], timestep = step(env, states[e], ACTIONS[t, e])
            rewards[e].append(np.asarray(timestep.reward).mean())
            metrics = {"episode_return": sum(rewards[e]), "episode_length": len(rewards[e])}
            seen = timestep.observation
            if timestep.last():
                states[e], start = reset(env, jax.random.fold_in(key, begun))
                timestep = timestep._replace(observation=start.observation)
                begun, rewards[e] = begun + 1, []
            timestep = timestep._replace(metrics=timestep.metrics | metrics)
            if env.truncates:
                timestep = timestep._replace(terminal_observation=seen)
            row.append(timestep)
        rows.append(row)
    return stack([start for _, start in starts]), stack([stack(row) for row in rows])


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize("truncates", [False, True])
def test_auto_reset_equals_resetting_each_environment(truncates):
    env, key = Fleeting(truncates), jax.random.key(1)
    first, timesteps = jax.jit(run, static_argnums=0)(env, key)
    slow_first, slow = naive(env, key)
    assert_equal(timesteps, slow)
    assert_equal(first.observation, slow_first.observation)
    assert jax.tree.structure(first) == jax.tree.structure(timesteps)
    assert {1, 3, E} <= set(timesteps.last().sum(axis=1).tolist())  # ends in one step
    assert timesteps.truncated().any()
    assert (timesteps.terminal_observation is not None) == truncates


def test_seeds_in_one_program_equal_each_seed_alone():
    env, keys = Fleeting(truncates=True), jax.random.split(jax.random.key(1), 3)
    _, together = jax.jit(jax.vmap(run, in_axes=(None, 0)), static_argnums=0)(env, keys)
    for seed, key in enumerate(keys):
        assert_equal(jax.tree.map(lambda leaf, s=seed: leaf[s], together), naive(env, key)[1])


def test_statistics_cover_whole_episodes():
    env = Fleeting(truncates=False)
    _, timesteps = jax.jit(run, static_argnums=0)(env, jax.random.key(1))
    for e in range(E):
        ends = np.flatnonzero(timesteps.last()[:, e])
        episodes = np.split(ACTIONS[:, e].mean(axis=1), ends + 1)[: len(ends)]
        lengths = timesteps.metrics["episode_length"][ends, e]
        np.testing.assert_array_equal(lengths, [len(episode) for episode in episodes])
        np.testing.assert_array_equal(lengths, timesteps.metrics["length"][ends, e])
        returns = timesteps.metrics["episode_return"][ends, e]
        np.testing.assert_allclose(returns, [episode.sum() for episode in episodes], rtol=1e-6)


def test_a_scan_can_carry_the_state():
    batch = AutoReset(Fleeting(truncates=True), E)
    state, first = jax.eval_shape(batch.reset, jax.random.key(0))
    after = jax.eval_shape(batch.step, state, ACTIONS[0])
    assert jax.tree.structure((state, first)) == jax.tree.structure(after)
    for leaf, other in zip(jax.tree.leaves((state, first)), jax.tree.leaves(after), strict=True):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        assert not leaf.weak_type
        assert not other.weak_type


@dataclass(frozen=True)
class Sorting(Fleeting):
    """An environment whose reset can be recognised in the compiled program."""

    def reset(self, key):
        state, timestep = Fleeting.reset(self, key)
        return state._replace(length=jax.random.permutation(key, jnp.arange(50))[0]), timestep


def test_no_reset_is_computed_outside_the_loop():
    """Vmap over seeds, where XLA once moved resets before the loop, into every step."""
    batch, keys = AutoReset(Sorting(truncates=False), E), jax.random.split(jax.random.key(1), 3)
    states, _ = jax.eval_shape(jax.vmap(batch.reset), keys)
    step = jax.jit(jax.vmap(batch.step, in_axes=(0, None)))
    program = step.lower(states, ACTIONS[0]).compile().as_text()
    branches, _, main = program.partition("\nENTRY ")
    assert " sort(" in branches
    assert " sort(" not in main


def test_starts_differ_when_episode_numbers_overflow():
    batch = AutoReset(Fleeting(truncates=False, longest=1), E)
    state, _ = batch.reset(jax.random.key(0))
    nearly = jnp.int32(2**31 - 12)
    state = state._replace(begun=nearly, first_spare=nearly - E)
    _, timesteps = jax.lax.scan(batch.step, state, ACTIONS)
    views = np.asarray(timesteps.observation.agents_view).reshape(T * E, -1)
    assert len(np.unique(views, axis=0)) == T * E
