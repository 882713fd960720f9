"""What every environment promises, over whole episodes of random legal actions."""

import jax
import numpy as np
import pytest

from magpo import envs

TASKS = {
    "coordsum/3x10-30": {},
    "coordsum/5x20-80": {"opponent_history": "released", "observation": "one_hot"},
    "lbf/15x15-4p-5f": {},
    "rware/tiny-2ag": {"column_height": 2, "request_queue_size": 7, "time_limit": 60},
    "rware/medium-6ag": {"time_limit": 20},
}
B = 32


@pytest.fixture(scope="module", params=TASKS)
def episodes(request, play):
    env = envs.make(request.param, global_state=True, **TASKS[request.param])
    return env, play(env, 1, B)


def test_shapes_and_dtypes_are_the_spec_s(episodes):
    env, played = episodes
    first, timesteps = played.first, played.timesteps
    T, spec = env.time_limit, env.observation_spec
    for found, promised in zip(first.observation, spec, strict=True):
        assert (found.shape, found.dtype) == ((B, *promised.shape), promised.dtype)
    for found, promised in zip(timesteps.observation, spec, strict=True):
        assert (found.shape, found.dtype) == ((T, B, *promised.shape), promised.dtype)
    assert played.actions.shape[2:] == env.action_spec.shape
    for timestep, lead in ((first, (B,)), (timesteps, (T, B))):
        assert (timestep.step_type.shape, timestep.step_type.dtype) == (lead, np.int8)
        assert timestep.reward.shape == (*lead, env.num_agents)
        assert timestep.reward.dtype == timestep.discount.dtype == np.float32
        assert timestep.discount.shape == lead
        assert timestep.terminal_observation is None
        assert all(value.shape == lead for value in timestep.metrics.values())
    assert first.metrics.keys() == timesteps.metrics.keys()


def test_a_scan_can_carry_the_state(episodes):
    """Same structure, shapes and dtypes after reset and step, and nothing weakly typed."""
    env, _ = episodes
    key = jax.random.key(0)
    state, first = jax.eval_shape(env.reset, key)
    after = jax.eval_shape(env.step, state, env.action_spec)
    assert jax.tree.structure((state, first)) == jax.tree.structure(after)
    for leaf, other in zip(jax.tree.leaves((state, first)), jax.tree.leaves(after), strict=True):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        assert not leaf.weak_type
        assert not other.weak_type


def test_values_are_sound(episodes):
    env, played = episodes
    first, timesteps = played.first, played.timesteps
    for timestep in (first, timesteps):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(timestep))
        assert timestep.observation.action_mask.any(axis=-1).all()
        ids = timestep.observation.agents_view[..., : env.num_agents]
        assert (ids == np.eye(env.num_agents)).all()
        features = timestep.observation.agents_view[..., env.num_agents :]
        flat = features.reshape(*features.shape[:-2], -1)
        np.testing.assert_array_equal(timestep.observation.global_state, flat)
    assert (first.step_type == 0).all()
    assert (first.discount == 1).all()
    assert (first.reward == 0).all()
    assert (first.observation.step_count == 0).all()
    for b, end in enumerate(played.ends):
        assert timesteps.step_type[: end + 1, b].tolist() == [1] * end + [2]
        assert (timesteps.discount[:end, b] == 1).all()
        count = timesteps.observation.step_count[: end + 1, b]
        assert count.tolist() == list(range(1, end + 2))
        if env.truncates:
            assert end == env.time_limit - 1 or timesteps.discount[end, b] == 0
        else:
            assert timesteps.discount[end, b] == 0


def test_the_same_key_is_the_same_episode(episodes, play):
    env, episode = episodes
    again = play.__wrapped__(env, 1, B)  # past the fixture's cache
    for field in ("first", "actions", "timesteps"):
        ours, theirs = getattr(again, field), getattr(episode, field)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    views = play(env, 2, B).first.observation.agents_view
    assert (views != episode.first.observation.agents_view).any()
