"""The contract of every environment: all tasks are traced, a selection of them is played."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from envs.conftest import random_actions
from magpo import envs
from magpo.envs import registry
from magpo.envs.wrappers import AutoReset
from magpo.types import EnvSpec, StepType, action_spec, spec

B = 6
# Shorter episodes, so that some end, and options that differ from the defaults.
SHORT = {"rware": {"time_limit": 60}, "mabrax": {"time_limit": 25}, "coordsum": {"time_limit": 30}}
OPTIONS = {
    "coordsum/5x20-80": {"opponent_history": "released", "observation": "one_hot"},
    "coordsum/8x15-100": {"observation": "scaled"},
    "lbf/8x8-2p-2f-coop": {"ends": "released"},
    "mpe/simple_spread_5ag": {"ends": "released", "action_range": "released"},
    "mabrax/ant-8x1": {"mapping": "corrected", "backend": "spring"},
    "mabrax/humanoid-9-8": {"mapping": "corrected"},
    "smax/smacv2_5_units": {"ends": "released"},
}
# Played with auto-reset and random legal actions: tasks that cover all code, small and large.
PLAYED = [
    *OPTIONS,
    *("coordsum/3x10-30", "lbf/15x15-4p-5f", "connector/con-5x5x3a", "connector/con-10x10x10a"),
    *("mpe/simple_spread_3ag", "rware/tiny-2ag", "rware/large-8ag", "smax/3m"),
    *("smax/3s5z_vs_3s6z", "mabrax/hopper-3x1"),
]


class Played:
    """T steps of B environments; `first` is (B, ...), actions and timesteps are (T, B, ...)."""

    def __init__(self, task):
        options = SHORT.get(task.partition("/")[0], {}) | OPTIONS.get(task, {})
        self.env = env = envs.make(task, global_state=True, **options)
        self.T = env.time_limit + 7
        batch = AutoReset(env, B)

        @jax.jit
        def run(key):
            def step(carry, key):
                state, mask = carry
                action = random_actions(env, key, mask)
                state, timestep = batch.step(state, action)
                return (state, timestep.observation.action_mask), (action, timestep)

            begin, act = jax.random.split(key)
            state, first = batch.reset(begin)
            loop = state, first.observation.action_mask
            _, played = jax.lax.scan(step, loop, jax.random.split(act, self.T))
            return first, *played

        self.run = lambda seed: jax.tree.map(np.asarray, run(jax.random.key(seed)))
        self.first, self.actions, self.timesteps = self.run(1)


@pytest.mark.parametrize("task", envs.tasks())
def test_a_scan_can_carry_the_state_and_the_spec_holds(task):
    """Compare structure, shapes and dtypes after reset and step; allow no weak types."""
    env = envs.make(task, global_state=True, **OPTIONS.get(task, {}))
    state, first = jax.eval_shape(env.reset, jax.random.key(0))
    after = jax.eval_shape(env.step, state, action_spec(env))
    assert jax.tree.structure((state, first)) == jax.tree.structure(after)
    for leaf, other in zip(jax.tree.leaves((state, first)), jax.tree.leaves(after), strict=True):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        assert not leaf.weak_type and not other.weak_type
    seen = first.observation
    assert seen.agents_view.shape[0] == env.num_agents and seen.agents_view.dtype == np.float32
    assert (seen.action_mask.shape, seen.action_mask.dtype) == (
        (env.num_agents, env.action_dim),
        bool,
    )
    assert first.reward.shape == (env.num_agents,)
    assert env.headline in {"episode_return", *first.metrics}
    assert EnvSpec(**json.loads(json.dumps(dataclasses.asdict(spec(env))))) == spec(env)


def test_every_suite_is_played():
    assert {task.partition("/")[0] for task in PLAYED} == registry.SUITES.keys()


@pytest.fixture(scope="module", params=PLAYED)
def played(request):
    return Played(request.param)


def test_shapes_and_dtypes_match_the_spec(played):
    env, (_, first) = played.env, jax.eval_shape(played.env.reset, jax.random.key(0))
    assert played.actions.shape[2:] == action_spec(env).shape
    for timestep, lead in ((played.first, (B,)), (played.timesteps, (played.T, B))):
        for found, promised in zip(timestep.observation, first.observation, strict=True):
            assert (found.shape, found.dtype) == ((*lead, *promised.shape), promised.dtype)
        assert (timestep.step_type.shape, timestep.step_type.dtype) == (lead, np.int8)
        assert timestep.reward.shape == (*lead, env.num_agents)
        assert timestep.reward.dtype == timestep.discount.dtype == np.float32
        assert timestep.discount.shape == lead
        assert (timestep.terminal_observation is not None) == env.truncates
        assert all(value.shape == lead for value in timestep.metrics.values())
        assert env.headline in timestep.metrics
    assert played.first.metrics.keys() == played.timesteps.metrics.keys()


def test_values_are_valid(played):
    env = played.env
    for timestep in (played.first, played.timesteps):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(timestep))
        seen = timestep.observation
        assert seen.action_mask.any(axis=-1).all()
        views, ids = seen.agents_view, np.eye(env.num_agents)
        if getattr(env, "mapping", "") == "jaxmarl":  # its ids and features overlap
            assert (np.diagonal(views[..., : env.num_agents], axis1=-2, axis2=-1) == 1).all()
        else:
            assert (views[..., : env.num_agents] == ids).all()
    assert (played.first.step_type == StepType.FIRST).all()
    assert (played.first.discount == 1).all() and (played.first.reward == 0).all()
    assert (played.first.observation.step_count == 0).all()


def test_episodes_end_and_restart_correctly(played):
    """Count lengths and returns in Python, environment by environment."""
    env, steps = played.env, played.timesteps
    assert steps.last().any()
    for e in range(B):
        length, total = 0, 0.0
        for t in range(played.T):
            at = jax.tree.map(lambda leaf, t=t, e=e: leaf[t, e], steps)
            length, total = length + 1, total + np.mean(at.reward, dtype=np.float64)
            assert at.metrics["episode_length"] == length <= env.time_limit
            np.testing.assert_allclose(at.metrics["episode_return"], total, rtol=2e-4, atol=2e-4)
            if env.truncates:
                assert at.terminal_observation.step_count == length
            if at.last():
                assert at.observation.step_count == 0
                if at.discount > 0:
                    assert env.truncates and length == env.time_limit
                length, total = 0, 0.0
            else:
                assert (at.step_type, at.discount) == (StepType.MID, 1)
                assert at.observation.step_count == length < env.time_limit


def test_a_key_determines_its_episodes(played):
    first, actions, timesteps = played.run(1)
    found, expected = (first, actions, timesteps), (played.first, played.actions, played.timesteps)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    other, _, _ = played.run(2)
    if played.env.name not in ("coordsum/3x10-30",):  # its 30 targets may coincide
        assert (other.observation.agents_view != first.observation.agents_view).any()
