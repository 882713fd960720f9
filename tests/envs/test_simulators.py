"""RWARE and LBF against jumanji's own environments, stepped by hand with the same actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jumanji.environments import LevelBasedForaging, RobotWarehouse
from jumanji.environments.routing.lbf.generator import RandomGenerator as Boards
from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator as Warehouses

from magpo import envs
from magpo.envs.wrappers import AutoReset


def by_hand(simulator, keys, actions):
    """The simulator's own timesteps, (T + 1, B, ...)."""
    state, timestep = jax.jit(jax.vmap(simulator.reset))(keys)
    step, timesteps = jax.jit(jax.vmap(simulator.step)), [timestep]
    for action in actions:
        state, timestep = step(state, jnp.asarray(action))
        timesteps.append(timestep)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *timesteps)


def with_ids(views):
    """(..., N, F) -> (..., N, N + F), the agents' one-hot ids first."""
    ids = np.broadcast_to(np.eye(views.shape[-2]), (*views.shape[:-1], views.shape[-2]))
    return np.concatenate([ids, views], axis=-1)


@pytest.fixture(scope="module")
def warehouse(play):
    """Our episodes in a small warehouse where nearly every shelf is requested, and jumanji's."""
    sizes = {"shelf_rows": 1, "shelf_columns": 3, "column_height": 2, "num_agents": 2}
    sizes |= {"sensor_range": 1, "request_queue_size": 7}
    env = envs.make("rware/tiny-2ag", global_state=True, time_limit=60, **sizes)
    played = play(env, 1, 32)
    raw = by_hand(RobotWarehouse(Warehouses(**sizes), time_limit=60), played.keys, played.actions)
    return played, raw


def test_rware_is_jumanji_s(warehouse):
    played, raw = warehouse
    first, timesteps = played.first, played.timesteps
    views, masks = with_ids(raw.observation.agents_view), raw.observation.action_mask
    np.testing.assert_array_equal(first.observation.agents_view, views[0])
    np.testing.assert_array_equal(first.observation.action_mask, masks[0])
    np.testing.assert_array_equal(timesteps.observation.agents_view, views[1:])
    np.testing.assert_array_equal(timesteps.observation.action_mask, masks[1:])
    np.testing.assert_array_equal(timesteps.observation.step_count, raw.observation.step_count[1:])
    np.testing.assert_array_equal(timesteps.step_type, raw.step_type[1:])
    np.testing.assert_array_equal(timesteps.discount, raw.discount[1:])
    for agent in range(2):
        np.testing.assert_array_equal(timesteps.reward[..., agent], raw.reward[1:])
    assert raw.reward.sum() > 0


def test_rware_ends_by_collision_and_by_the_limit(warehouse):
    played, _ = warehouse
    assert 0 < (played.ends == 59).sum() < 32
    assert played.ends.max() == 59
    assert not played.timesteps.truncated().any()


@pytest.fixture(scope="module")
def board():
    """AutoReset's steps on a small board, and jumanji's for its first episodes."""
    sizes = {"grid_size": 5, "fov": 2, "num_agents": 3, "num_food": 1}
    env = envs.make("lbf/10x10-3p-3f", **sizes)
    batch, key = AutoReset(env, 8), jax.random.key(1)

    def step(carry, key):
        state, mask = carry
        action = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))
        state, timestep = batch.step(state, action)
        return (state, timestep.observation.action_mask), (action, timestep)

    @jax.jit
    def run(key):
        state, first = batch.reset(key)
        keys = jax.random.split(jax.random.key(2), env.time_limit)
        _, steps = jax.lax.scan(step, (state, first.observation.action_mask), keys)
        return first, *steps

    first, actions, timesteps = jax.tree.map(np.asarray, run(key))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(8))
    simulator = LevelBasedForaging(Boards(**sizes), time_limit=env.time_limit)
    return first, timesteps, by_hand(simulator, keys, actions)


def test_lbf_is_jumanji_s(board):
    first, timesteps, raw = board
    views = with_ids(raw.observation.agents_view)
    np.testing.assert_array_equal(first.observation.agents_view, views[0])
    for e, end in enumerate(np.argmax(timesteps.last(), axis=0)):
        ours = jax.tree.map(lambda leaf, e=e, end=end: leaf[: end + 1, e], timesteps)
        theirs = jax.tree.map(lambda leaf, e=e, end=end: leaf[1 : end + 2, e], raw)
        np.testing.assert_array_equal(ours.step_type, theirs.step_type)
        np.testing.assert_array_equal(ours.discount, theirs.discount[:, 0])
        team = theirs.reward.sum(axis=1)
        np.testing.assert_allclose(ours.reward, np.stack([team] * 3, axis=1), rtol=1e-6)
        np.testing.assert_array_equal(ours.metrics["percent_eaten"], theirs.extras["percent_eaten"])
        seen = ours.terminal_observation
        np.testing.assert_array_equal(seen.agents_view, views[1 : end + 2, e])
        np.testing.assert_array_equal(seen.action_mask, theirs.observation.action_mask)
        np.testing.assert_array_equal(seen.step_count, np.arange(1, end + 2))


def test_lbf_terminates_when_all_is_eaten_and_truncates_at_the_limit(board):
    _, timesteps, _ = board
    ends = np.argmax(timesteps.last(), axis=0)
    final = jax.tree.map(lambda leaf: leaf[ends, np.arange(8)], timesteps)
    cleared = final.metrics["percent_eaten"] == 100
    assert 0 < cleared.sum() < 8
    np.testing.assert_array_equal(final.discount, np.where(cleared, 0, 1))
    np.testing.assert_array_equal(final.truncated(), ~cleared)
    np.testing.assert_array_equal(ends[~cleared], 99)
    np.testing.assert_allclose(final.metrics["episode_return"], cleared, rtol=1e-6)
