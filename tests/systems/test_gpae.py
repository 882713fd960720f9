"""GPAE: what its critic may see, its traces, its buffer, forced stops."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.errors import ConfigError
from magpo.networks.recurrent import PerAgentCritic
from magpo.systems import gpae_mappo as gpae
from systems import cases

N, A = 3, 4


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_the_critic_sees_all_actions_but_the_agents_own(kind):
    critic = PerAgentCritic(N, A, kind, 8, sees_actions=True)
    key = jax.random.key(0)
    state, hidden, never = (
        jax.random.normal(key, (2, 5, 7)),
        jnp.ones((5, 8)),
        jnp.zeros((2, 5), bool),
    )
    shape = (2, 5, N) if kind == "discrete" else (2, 5, N, A)
    action = jnp.zeros(shape, int if kind == "discrete" else float)
    params = critic.init(key, hidden, state, action, never)

    @jax.jit
    def values(action):
        return critic.apply(params, hidden, state, action, never)[1]

    for agent in range(N):
        other = values(action.at[:, :, agent].add(1))
        same = np.asarray(other == values(action))
        assert same[..., agent].all()  # to the bit
        assert not np.delete(same, agent, axis=-1).any()


def test_without_actions_the_value_is_the_states_alone():
    critic = PerAgentCritic(N, A, "discrete", 8, sees_actions=False)
    key = jax.random.key(0)
    given = jnp.ones((5, 8)), jax.random.normal(key, (2, 5, 7))
    action, never = jnp.zeros((2, 5, N), int), jnp.zeros((2, 5), bool)
    params = critic.init(key, *given, action, never)
    value = critic.apply(params, *given, action, never)[1]
    assert (value == value[..., :1]).all()
    assert (value == critic.apply(params, *given, action + 1, never)[1]).all()


def settings(**changes):
    return dataclasses.replace(cases.build("gpae_mappo").setup.config.hyper, **changes)


@pytest.mark.parametrize("trace", ["dt", "st", "it", "none"])
def test_the_traces_are_those_of_equation_8(trace):
    rng = np.random.default_rng(0)
    ratio = np.exp(rng.normal(size=(4, 5, N)))
    c = gpae.traces(settings(trace=trace, eta=1.05, gae_lambda=0.9), jnp.log(ratio))
    for index in np.ndindex(ratio.shape):
        own, joint = ratio[index], ratio[index[:2]].prod()
        expected = {
            "dt": min(1.0, own * min(1.05, joint / own)),
            "st": min(1.0, joint),
            "it": min(1.0, own),
            "none": 1.0,
        }[trace]
        np.testing.assert_allclose(c[index], 0.9 * expected, rtol=1e-5)
    on_policy = gpae.traces(settings(trace=trace, gae_lambda=0.9), jnp.zeros((4, 5, N)))
    np.testing.assert_allclose(on_policy, 0.9, rtol=1e-6)


def test_off_policy_advantages_are_the_slow_sum():
    """Eq. 7 and 11, one number at a time: the trace of a step weighs what comes from it on."""
    rng, (B, T), gamma = np.random.default_rng(1), (5, 6), 0.9
    value, following, reward, log_ratio = rng.normal(size=(4, B, T, N))
    ended = rng.random((B, T)) < 0.2
    discount, trace = 1.0 - (ended & (rng.random((B, T)) < 0.5)), rng.random((B, T, N))
    given = {"reward": reward, "discount": discount, "ended": ended}
    steps = gpae.Transition(**dict.fromkeys(gpae.Transition._fields) | given)
    estimates = gpae.Estimates(log_ratio, value, following)
    arrays = jax.tree.map(jnp.asarray, (steps, estimates, trace))
    advantage, target = gpae.advantages(*arrays, gamma)
    for b, t, n in np.ndindex(B, T, N):
        total, weight = 0.0, 1.0
        for step in range(t, T):
            if step > t:
                weight *= gamma * trace[b, step, n]
            bootstrap = gamma * discount[b, step] * following[b, step, n]
            total += weight * (reward[b, step, n] + bootstrap - value[b, step, n])
            if ended[b, step]:
                break
        np.testing.assert_allclose(advantage[b, t, n], total, atol=1e-5)
        bounded = min(1.0, np.exp(log_ratio[b, t, n]))
        np.testing.assert_allclose(target[b, t, n], value[b, t, n] + bounded * total, atol=1e-5)


def test_one_of_the_last_rollouts_is_drawn_of_each_environment():
    _, setup, env = cases.build("gpae_mappo")  # reuse 3, 6 environments
    state = jax.eval_shape(lambda key: gpae.init(setup, env, key), jax.random.key(0))
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.buffer)
    given = {"buffer": empty, "num_rollouts": jnp.int32(0), "hyper": setup.config.hyper}
    state = gpae.TrainState(**dict.fromkeys(gpae.TrainState._fields) | given)
    one = jax.tree.map(lambda x: jnp.zeros(x[:, 0].shape, x.dtype), empty)
    draw = jax.jit(jax.vmap(partial(gpae.draw, setup), in_axes=(None, None, 0)))
    for number in range(1, 6):
        label = number + jnp.arange(6.0)[:, None, None] / 10  # which rollout, of which environment
        reward = label + jnp.zeros_like(one.steps.reward)
        new = one._replace(steps=one.steps._replace(reward=reward))
        states, drawn = draw(state, new, jax.random.split(jax.random.key(number), 60))
        state = jax.tree.map(lambda x: x[0], states)
        rewards = np.asarray(drawn.steps.reward)
        assert (rewards == rewards[:, :, :1, :1]).all()  # whole
        rollout, environment = np.divmod(rewards[:, :, 0, 0], 1)
        np.testing.assert_allclose(environment, np.tile(np.arange(6) / 10, (60, 1)), atol=1e-5)
        assert set(rollout.flat) == set(range(max(1, number - 2), number + 1))
        assert number == 1 or (rollout != rollout[:, :1]).any()  # each environment by itself


@pytest.fixture(scope="module")
def stopped():
    """A rollout of SMAX 3m in which a third of the steps has one agent stopped."""
    forced = ["system.anomaly_probability=0.3", "env.time_limit=101"]
    _, setup, env = cases.build("gae", "smax/3m", *forced)

    @jax.jit
    def run(key):
        state = gpae.init(setup, env, key)
        _, trajectory, _ = gpae.rollout(setup, env, state)
        _, metrics = gpae.update(setup, env, state)
        return trajectory, metrics

    return run(jax.random.key(0))


def test_forced_stops_are_legal_and_stored_with_the_policys_own_probability(stopped):
    trajectory, _ = stopped
    steps = jax.tree.map(np.asarray, trajectory.steps)
    assert 0.15 < steps.forced.any(-1).mean() < 0.45 and (steps.forced.sum(-1) <= 1).all()
    assert (steps.action[steps.forced] == 4).all()
    legal = steps.observation.action_mask[steps.forced]
    assert legal[:, 4].all() and (legal.sum(-1) > 1).all()
    np.testing.assert_allclose(steps.log_prob[steps.forced], -np.log(legal.sum(-1)), atol=0.3)


def test_gae_blames_nobody(stopped):
    assert stopped[1]["gpae/advantage_gap"] == 0.0
    assert stopped[1]["gpae/delta_c"] == pytest.approx(0.0, abs=1e-6)


def test_only_smax_has_agents_that_stop():
    with pytest.raises(ConfigError, match="anomaly_probability is for smax"):
        cases.build("gpae_mappo", "lbf/2s-8x8-2p-2f-coop", "system.anomaly_probability=0.1")
