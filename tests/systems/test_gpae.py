"""GPAE: the inputs of its critic, its traces, its buffer and forced stops."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.networks.recurrent import PerAgentCritic
from magpo.systems import gpae_mappo as gpae
from systems import cases

N, A = 3, 4


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_the_critic_sees_all_actions_but_the_agents_own(kind):
    critic = PerAgentCritic(N, A, kind, 8, "others")
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
        assert same[..., agent].all()  # exactly
        assert not np.delete(same, agent, axis=-1).any()


def test_without_actions_the_value_depends_on_the_state_alone():
    critic = PerAgentCritic(N, A, "discrete", 8, "state")
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
def test_the_traces_follow_equation_8(trace):
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


def test_off_policy_advantages_match_the_slow_sum():
    """Sum Eq. 7 and 11 one number at a time; a step's trace weighs it and all later steps."""
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


@pytest.fixture(scope="module", params=["sample", "all"])
def updates(request):
    """Make four updates in a run of three, keeping three rollouts; half of the ends terminate.

    Return the states before and after each update, with its minibatches.
    """
    minibatches, train = [], gpae.update_minibatch

    def recorded(setup, state, batch, key):
        jax.debug.callback(lambda batch: minibatches.append(batch), batch, ordered=True)
        return train(setup, state, batch, key)

    changes = f"system.reuse_epochs={request.param}", "system.actor_lr=0.02", "total_steps=144"
    _, setup, env = cases.build("gpae_mappo", cases.LBF, *changes)
    state = cases.jitted(gpae.init)(setup, env, jax.random.key(0))
    state, update = cases.sharpen(cases.stagger(state)), jax.jit(partial(gpae.update, setup, env))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpae, "update_minibatch", recorded)
        for key in jax.random.split(jax.random.key(1), 4):
            steps = state.buffer.steps
            terminated = steps.ended & jax.random.bernoulli(key, 0.5, steps.ended.shape)
            steps = steps._replace(discount=jnp.where(terminated, 0.0, steps.discount))
            before = state._replace(buffer=state.buffer._replace(steps=steps))
            state, _ = update(before)
            jax.effects_barrier()
            found.append((before, jax.device_get(state), [*minibatches]))
            minibatches.clear()
    return request.param, setup, found


def test_no_epoch_repeats_a_rollout_while_others_wait(updates):
    reuse_epochs, _, found = updates
    for number, (_, after, minibatches) in enumerate(found, 1):
        filled = min(number, 3)
        log_prob = after.buffer.steps.log_prob[:, :filled].reshape(6 * filled, -1)
        drawn = np.concatenate([x.steps.log_prob for x in minibatches])
        drawn = drawn.reshape(2, -1, log_prob.shape[1])  # by epoch
        assert drawn.shape[1] == {"sample": 6, "all": 18}[reuse_epochs]
        times = (drawn[:, :, None] == log_prob).all(-1).sum(1)  # (epochs, rollouts)
        assert (times.sum(1) == drawn.shape[1]).all()  # only collected rollouts
        assert (times.max(1) - times.min(1) <= 1).all()
        assert (times[0] != times[1]).any() or times.max() == times.min()  # epochs draw anew


def test_estimates_over_several_policies_match_the_slow_model(updates):
    _, setup, found = updates
    before, after, minibatches = found[-1]
    rollouts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after.buffer)
    terminated = rollouts.steps.discount == 0
    assert terminated.any() and (rollouts.steps.ended & ~terminated).any()
    expected = slow_estimates(setup, before, rollouts)
    assert np.ptp(expected[0]) > 0.01  # the policies differ
    for batch in minibatches:
        same = batch.steps.log_prob[:, None] == rollouts.steps.log_prob
        rows = same.all((-1, -2)).argmax(1)
        for name, slow in zip(("ratio", "advantage", "target"), expected, strict=True):
            np.testing.assert_allclose(getattr(batch, name), slow[rows], atol=2e-5, err_msg=name)


def test_step_sizes_are_zero_after_the_last_update_of_a_run(updates):
    _, _, found = updates
    bias = [[s.params.actor["params"]["gru"]["bias"] for s in (x, y)] for x, y, _ in found]
    assert [not np.array_equal(*pair) for pair in bias] == [True, True, True, False]


def slow_estimates(setup, state, rollouts):
    """Compute ratios, advantages and targets (B, C, N) of Eq. 7, 8 (dt) and 11 step by step."""
    params, hyper, (steps, last, carry) = state.params, state.hyper, rollouts
    never = np.zeros(len(steps.ended), bool)
    actor_step, value_of = jax.jit(setup.actor.step), jax.jit(setup.critic.step)
    actor, critic = carry
    ratio, value, after = [], [], []  # by time
    for t in range(steps.ended.shape[1]):
        now = jax.tree.map(lambda x, t=t: x[:, t], steps)
        observation, reset = now.observation, now.reset_before
        actor, policy = actor_step(params.actor, actor, observation, reset)
        ratio.append(np.exp(policy.log_prob(now.action) - now.log_prob))
        critic, v = value_of(params.critic, critic, observation.global_state, now.action, reset)
        value.append(v)
        after.append(value_of(params.critic, critic, *now.terminal, never)[1])
    value.append(value_of(params.critic, critic, *last, never)[1])
    advantage, target, following = [], [], 0.0
    for t in reversed(range(len(ratio))):
        ended = steps.ended[:, t, None]
        next_value = np.where(ended, after[t], value[t + 1])
        error = steps.reward[:, t] + hyper.gamma * steps.discount[:, t, None] * next_value
        following = np.where(ended, 0.0, hyper.gamma * following)
        a = error - value[t] + following
        advantage.insert(0, a)
        target.insert(0, value[t] + np.minimum(1.0, ratio[t]) * a)
        others = ratio[t].prod(-1, keepdims=True) / ratio[t]
        truncated = np.minimum(1.0, ratio[t] * np.minimum(hyper.eta, others))
        following = hyper.gae_lambda * truncated * a
    return [np.stack(by_time, axis=1) for by_time in (ratio, advantage, target)]


@pytest.fixture(scope="module")
def stopped():
    """Collect SMAX 3m with one agent stopped in a third of the steps, and update once."""
    forced = "system.anomaly_probability=0.3"
    _, setup, env = cases.build("gae", "smax/3m", forced)

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


def test_gae_gives_all_agents_the_same_advantage(stopped):
    assert stopped[1]["policy/advantage_gap"] == 0.0
    assert stopped[1]["gpae/delta_c"] == pytest.approx(0.0, abs=1e-6)
