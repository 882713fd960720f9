from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo import envs
from magpo.envs.wrappers import AutoReset

# Few actions, so that sums and guesses are often right, and three episodes of 20 steps.
SMALL = {"num_agents": 2, "num_actions": 3, "max_target": 6, "time_limit": 20}
HISTORIES = {"per_target": lambda target: target, "released": lambda target: min(target, 2)}
E, T = 3, 60


def slow_rewards(targets, actions, ends, row_of):
    """Compute one environment's rewards with lists; `row_of` maps a target to its history."""
    histories, rewards = {}, []
    for target, action, end in zip(targets, actions, ends, strict=True):
        past = histories.setdefault(row_of(target), [])
        counts = Counter(past)
        guess = min(counts, key=lambda a: (-counts[a], a)) if past else 0
        right = sum(action) == target
        rewards.append((1 if guess == action[0] else 2) if right else 0)
        past.append(action[0])
        if end:
            histories = {}
    return rewards


@pytest.fixture(scope="module")
def games():
    """Return targets (T, E), actions and rewards (T, E, N) and ends (T, E), by history."""
    actions = jax.random.randint(jax.random.key(0), (T, E, SMALL["num_agents"]), 0, 3)

    def run(history):
        batch = AutoReset(envs.make("coordsum/3x10-30", **SMALL, opponent_history=history), E)
        state, first = batch.reset(jax.random.key(1))
        _, timesteps = jax.lax.scan(batch.step, state, actions)
        views = jnp.concatenate([first.observation.agents_view[None], timesteps.observation[0]])
        return views[:-1, :, 0, 2].astype(int), actions, timesteps.reward, timesteps.last()

    return {h: jax.tree.map(np.asarray, jax.jit(run, static_argnums=0)(h)) for h in HISTORIES}


@pytest.mark.parametrize("history", HISTORIES)
def test_rewards_match_the_slow_model(games, history):
    targets, actions, rewards, ends = games[history]
    assert ends.sum() == T // 20 * E
    for e in range(E):
        slow = slow_rewards(targets[:, e], actions[:, e].tolist(), ends[:, e], HISTORIES[history])
        np.testing.assert_array_equal(rewards[:, e], np.array([slow, slow]).T)
    assert set(np.unique(rewards)) == {0, 1, 2}


def test_the_opponent_histories_give_different_rewards(games):
    (targets, _, rewards, _), (same_targets, _, others, _) = games.values()
    np.testing.assert_array_equal(targets, same_targets)
    assert (rewards != others).any()


def test_targets_are_uniform_and_change(games):
    env = envs.make("coordsum/3x10-30")
    keys = jax.random.split(jax.random.key(2), 3000)
    views = jax.vmap(lambda key: env.reset(key)[1].observation.agents_view)(keys)
    counts = np.bincount(np.asarray(views[:, 0, 3], int))
    assert len(counts) == 30  # 0 .. max_target - 1
    assert counts.min() > 60  # 100 expected
    assert counts.max() < 140
    targets = games["per_target"][0]
    assert len(np.unique(targets[:20, 0])) > 3
    assert (targets[:20, 0] != targets[20:40, 0]).any()


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({}, lambda target, step: [target, step]),
        ({"observation": "scaled"}, lambda target, step: [target / 6, step / 20]),
        ({"observation": "one_hot"}, lambda target, step: [*np.eye(6)[target], step / 20]),
        ({"opponent_history": "released"}, lambda target, step: [target]),
        (
            {"opponent_history": "released", "observation": "one_hot"},
            lambda target, step: np.eye(6)[target],
        ),
    ],
)
def test_observations(options, features):
    env = envs.make("coordsum/3x10-30", **SMALL, global_state=True, **options)
    state, timestep = jax.jit(env.reset)(jax.random.key(3))
    for step in (0, 1):
        expected = features(int(state.target), step)
        views = np.stack([[*identity, *expected] for identity in np.eye(2)])
        np.testing.assert_allclose(timestep.observation.agents_view, views, rtol=1e-6)
        joined = timestep.observation.global_state
        np.testing.assert_allclose(joined, [*expected, *expected], rtol=1e-6)
        state, timestep = jax.jit(env.step)(state, jnp.array([0, 1]))
