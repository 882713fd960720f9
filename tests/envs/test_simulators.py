"""RWARE, LBF and Connector checked against jumanji's simulators, given the same actions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jumanji.environments import Connector, LevelBasedForaging, RobotWarehouse
from jumanji.environments.routing.connector.generator import LegacyRandomWalkGenerator as Walks
from jumanji.environments.routing.lbf.generator import RandomGenerator as Boards
from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator as Warehouses

from magpo import envs
from magpo.envs.wrappers import AutoReset


def simulate(simulator, keys, actions):
    """Return the simulator's own timesteps, (T + 1, B, ...)."""
    state, timestep = jax.jit(jax.vmap(simulator.reset))(keys)
    step, timesteps = jax.jit(jax.vmap(simulator.step)), [timestep]
    for action in actions:
        state, timestep = step(state, jnp.asarray(action))
        timesteps.append(timestep)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *timesteps)


def with_ids(views):
    """Prepend the agents' one-hot ids: (..., N, F) -> (..., N, N + F)."""
    ids = np.broadcast_to(np.eye(views.shape[-2]), (*views.shape[:-1], views.shape[-2]))
    return np.concatenate([ids, views], axis=-1)


@pytest.fixture(scope="module")
def warehouse(play):
    """Play our small warehouse, with nearly every shelf requested, and jumanji's."""
    sizes = {"shelf_rows": 1, "shelf_columns": 3, "column_height": 2, "num_agents": 2}
    sizes |= {"sensor_range": 1, "request_queue_size": 7}
    env = envs.make("rware/tiny-2ag", global_state=True, time_limit=60, **sizes)
    played = play(env, 1, 32)
    raw = simulate(RobotWarehouse(Warehouses(**sizes), time_limit=60), played.keys, played.actions)
    return played, raw


def test_rware_matches_jumanji(warehouse):
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


def test_rware_terminates_by_collision_and_at_the_time_limit(warehouse):
    played, _ = warehouse
    assert 0 < (played.ends == 59).sum() < 32
    assert played.ends.max() == 59
    assert not played.timesteps.truncated().any()


@pytest.fixture(scope="module")
def board():
    """Play a small board with AutoReset, and its first episodes in jumanji."""
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
    return first, timesteps, simulate(simulator, keys, actions)


def test_lbf_matches_jumanji(board):
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


def test_lbf_terminates_when_all_food_is_eaten_and_truncates_at_the_time_limit(board):
    _, timesteps, _ = board
    ends = np.argmax(timesteps.last(), axis=0)
    final = jax.tree.map(lambda leaf: leaf[ends, np.arange(8)], timesteps)
    cleared = final.metrics["percent_eaten"] == 100
    assert 0 < cleared.sum() < 8
    np.testing.assert_array_equal(final.discount, np.where(cleared, 0, 1))
    np.testing.assert_array_equal(final.truncated(), ~cleared)
    np.testing.assert_array_equal(ends[~cleared], 99)
    np.testing.assert_allclose(final.metrics["episode_return"], cleared, rtol=1e-6)


@pytest.fixture(scope="module", params=["legal actions", "any actions"])
def wires(play, request):
    env = envs.make("connector/con-5x5x3a", time_limit=12)
    played = play(env, 1, 64)
    if request.param == "any actions":
        actions = np.random.default_rng(0).integers(0, 5, played.actions.shape, np.int32)
        state, _ = jax.vmap(env.reset)(played.keys)
        _, timesteps = jax.jit(partial(jax.lax.scan, jax.vmap(env.step)))(state, actions)
        timesteps = jax.tree.map(np.asarray, timesteps)
        ends = np.argmax(timesteps.last(), axis=0)
        played = played._replace(actions=actions, timesteps=timesteps, ends=ends)
    raw = simulate(Connector(Walks(5, 3), time_limit=12), played.keys, played.actions)
    return played, raw


def test_connector_matches_jumanji(wires):
    played, raw = wires
    ours, until = played.timesteps, played.until_end
    np.testing.assert_array_equal(ours.step_type[until], raw.step_type[1:][until])
    mask = raw.observation.action_mask
    np.testing.assert_array_equal(ours.observation.action_mask[until], mask[1:][until])
    np.testing.assert_array_equal(played.first.observation.action_mask, mask[0])
    team = raw.reward.sum(-1)[1:][until]
    for agent in range(3):
        np.testing.assert_allclose(ours.reward[until][:, agent], team, rtol=1e-5)
    for name, values in raw.extras.items():
        np.testing.assert_array_equal(ours.metrics[name][until], values[1:][until])
    won = raw.extras["ratio_connections"][1:] == 1
    np.testing.assert_array_equal(ours.metrics["win_rate"][until], won[until])


def test_connector_terminates_when_all_are_connected_or_stuck_and_truncates_at_the_limit(wires):
    played, raw = wires
    over = (raw.discount[1:] == 0).all(-1)
    for b, end in enumerate(played.ends):
        assert played.timesteps.discount[end, b] == (0 if over[end, b] else 1)
        assert over[end, b] or end == 11
    ended = over[played.ends, np.arange(64)]
    assert 0 < ended.sum() < 64
    won = played.timesteps.metrics["win_rate"][played.ends, np.arange(64)]
    assert 0 < won.sum() < 64


def slow_view(grid, agent):
    """Compute an agent's 54 features cell by cell."""
    size, cell = len(grid), {kind: 3 * agent + kind for kind in (2, 3)}
    (row, column), *_ = np.argwhere(grid == cell[2])
    own_target = [*np.argwhere(grid == cell[3]), np.zeros(2)][0]
    blocked, targets = [], []
    for i in range(row - 2, row + 3):
        for j in range(column - 2, column + 3):
            inside = 0 <= i < size and 0 <= j < size
            value = grid[i, j] if inside else None
            blocked.append(1 if not inside or value % 3 == 2 else -1 if value % 3 == 1 else 0)
            own = value == cell[3]
            targets.append(1 if not inside or own else -1 if value and value % 3 == 0 else 0)
    return [row / size**2, column / size**2, *own_target / size**2, *blocked, *targets]


def test_connector_views_match_the_slow_model(wires):
    played, raw = wires
    connected = 0
    for t, b in [(0, 0), (3, 1), (6, 2), (9, 3), (11, 4), *((5, b) for b in range(5, 30))]:
        grid = raw.observation.grid[t + 1, b]
        for agent in range(3):
            view = played.timesteps.observation.agents_view[t, b, agent, 3:]
            np.testing.assert_allclose(view, slow_view(grid, agent), rtol=1e-6)
            connected += not (grid == 3 * agent + 3).any()
    assert connected
