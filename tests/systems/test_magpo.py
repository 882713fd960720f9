"""MAGPO: the learner along the rollout, terminal values, both losses on fixed numbers."""

import dataclasses
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.contract import as_data
from magpo.networks.heads import Categorical
from magpo.systems import ctds, magpo
from systems import cases


@pytest.fixture(scope="module")
def case():
    return cases.build("magpo")


@pytest.fixture(scope="module")
def initial(case):
    return cases.jitted(magpo.init)(case.setup, case.env, jax.random.key(0))


@pytest.fixture(scope="module")
def collected(case, initial):
    """Collect a second rollout: it starts in episodes that end at different steps."""
    _, setup, env = case
    state = cases.sharpen(cases.stagger(initial))
    rollout = cases.jitted(magpo.rollout)
    before, _ = rollout(setup, env, state)
    after, out = rollout(setup, env, before)
    return before, after, out


def test_the_learners_acting_agrees_with_its_training(case, collected):
    """Recompute the learner's carry, KL and actions, one agent and one step at a time."""
    setup, (before, after, out) = case.setup, collected
    params, transitions = before.params.learner, out.transitions

    def policy_of_one(hidden, view, mask):
        no_reset, network = jnp.zeros((1, 1), bool), setup.learner.network
        return network.apply(params, hidden[None], view[None, None], mask[None, None], no_reset)

    policy_of_all = jax.jit(jax.vmap(jax.vmap(policy_of_one)))
    act = jax.jit(magpo.act, static_argnums=(0, 5))
    hidden, log_probs = np.asarray(before.carry.learner), []
    for t in range(setup.config.rollout_length):
        observation = jax.tree.map(lambda x, t=t: x[t], transitions.observation)
        hidden = np.where(transitions.reset_before[t][:, None, None], 0, hidden)
        _, policy = policy_of_all(hidden, observation.agents_view, observation.action_mask)
        log_probs.append(policy.log_probs[:, :, 0, 0])
        action, hidden = act(setup, params, hidden, observation, jax.random.key(t), True)
        np.testing.assert_array_equal(action, log_probs[-1].argmax(-1))
    np.testing.assert_allclose(hidden, after.carry.learner, atol=1e-5)

    batch = magpo.sequences(before.hyper, out)
    _, guider = setup.guider.apply(
        before.params.guider, before.carry.guider, batch.steps.observation, batch.steps.action,
        batch.steps.reset_before,
    )  # fmt: skip
    expected = guider.kl(Categorical(jnp.stack(log_probs, axis=1))).mean()
    _, metrics = jax.jit(magpo.losses, static_argnums=1)(
        before.params, setup, before.hyper, batch, jax.random.key(0)
    )
    np.testing.assert_allclose(metrics["policy/kl_guider_to_learner"], expected, rtol=1e-4)


def test_terminal_values_are_stored_at_truncations(collected):
    _, _, out = collected
    t = out.transitions
    assert (t.terminal_value[~np.asarray(t.ended)] == 0).all()
    truncated = np.asarray(t.ended & (t.discount > 0))
    assert truncated.any() and (t.terminal_value[truncated] != 0).all()


def test_without_delta_and_rl_coef_magpo_is_ctds(initial):
    """Compare one update of both systems from the same state."""
    settings = ["system.rl_coef=0", "system.gamma=0.9"]
    _, setup, env = cases.build("magpo", "lbf/2s-8x8-2p-2f-coop", *settings, "system.delta=null")
    other = cases.build("ctds", "lbf/2s-8x8-2p-2f-coop", *settings)
    state = initial._replace(hyper=as_data(setup.config.hyper))
    same = initial._replace(hyper=as_data(other.setup.config.hyper))
    ours, metrics = jax.jit(magpo.update, static_argnums=(0, 1))(setup, env, state)
    theirs, expected = jax.jit(ctds.update, static_argnums=(0, 1))(other.setup, other.env, same)
    assert metrics["policy/masked_share"] == 0
    before, after = (jax.tree.leaves(x.params) for x in (state, ours))
    assert any(np.abs(x - y).max() > 1e-4 for x, y in zip(before, after, strict=True))
    chex.assert_trees_all_close(tuple(ours.params), tuple(theirs.params), atol=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def adaptive():
    words = ["system.delta_mode=adaptive", "system.delta=2", "system.delta_target=0.01"]
    _, setup, env = cases.build("magpo", cases.LBF, *words)
    state = cases.jitted(magpo.init)(setup, env, jax.random.key(0))
    return setup, env, state._replace(hyper=as_data(setup.config.hyper))


@pytest.mark.parametrize(
    ("delta", "kl", "masked_share", "power"),
    [
        (2.0, 0.01 * np.e**0.5, 0.0, -0.15),  # above the target: towards 1
        (2.0, 0.01 * np.e**9, 0.5, -0.3),  # at most so far in one update
        (2.0, 0.01 / np.e**0.5, 0.01, 0.15),  # below it, and delta holds the guider back
        (2.0, 0.0, 0.01, 0.3),
        (2.0, 0.01 / np.e, 0.0, 0.0),  # delta has no effect, so it does not drift
        (2.0, 0.01, 0.5, 0.0),
    ],
)
def test_delta_moves_on_a_log_scale(adaptive, delta, kl, masked_share, power):
    _, _, state = adaptive
    after = magpo.adapted(state, jnp.float32(kl), jnp.float32(masked_share))
    np.testing.assert_allclose(magpo.bound(after), delta ** np.exp(power), rtol=1e-5)


@pytest.mark.parametrize(("kl", "end"), [(1.0, 1.01), (0.0, 10.0)])
def test_delta_stays_in_its_bounds(adaptive, kl, end):
    _, _, state = adaptive
    for _ in range(40):
        state = magpo.adapted(state, jnp.float32(kl), jnp.float32(0.1))
    np.testing.assert_allclose(magpo.bound(state), end, rtol=1e-4)


def test_an_update_with_an_adapted_delta_equals_one_with_a_fixed_delta(adaptive):
    setup, env, state = adaptive
    state = cases.sharpen(state)._replace(exponent=jnp.float32(0.1))
    fixed_setup = cases.build("magpo", cases.LBF).setup
    hyper = as_data(dataclasses.replace(fixed_setup.config.hyper, delta=2.0**0.1))
    fixed = state._replace(hyper=hyper, exponent=None)
    ours, metrics = cases.jitted(magpo.update)(setup, env, state)
    theirs, expected = cases.jitted(magpo.update)(fixed_setup, env, fixed)
    assert metrics["policy/masked_share"] > 0
    chex.assert_trees_all_close(tuple(ours.params), tuple(theirs.params), atol=1e-5)
    chex.assert_trees_all_close(metrics, expected, rtol=1e-3, atol=1e-5)
    assert ours.exponent != state.exponent and ours.hyper.delta == 2.0
    assert metrics["policy/delta"] == pytest.approx(2.0**0.1, rel=1e-5)


def policy_of(*probabilities) -> Categorical:
    return Categorical(jnp.log(jnp.array(probabilities)))


def settings(**changes) -> magpo.Hyper:
    values = cases.build("magpo").setup.config.hyper
    return dataclasses.replace(values, **changes)


def fixed_batch(log_prob, advantage, value=0.0, target=0.0):
    n = len(advantage)
    steps = SimpleNamespace(
        action=jnp.zeros(n, int), log_prob=jnp.log(jnp.array(log_prob)), value=jnp.full(n, value)
    )
    advantage, target = jnp.array(advantage), jnp.full(n, target)
    return magpo.Batch(steps=steps, advantage=advantage, target=target, learns=None, carry=None)


@pytest.mark.parametrize(
    ("guider", "learner", "old", "advantage", "surrogate", "masked"),
    [
        (0.5, 0.5, 0.5, 1.0, 1.0, False),  # unchanged policies
        (0.6, 0.5, 0.5, 1.0, 1.2, False),  # at PPO's upper edge
        (0.7, 0.5, 0.5, 1.0, 1.2, False),  # beyond the edge: clipped
        (0.7, 0.5, 0.5, -1.0, -1.4, False),  # pessimistic: a bad action keeps its gradient
        (0.9, 0.5, 0.9, 1.0, 0.5 * 1.5 / 0.9, True),  # clipped by delta although the ratio is 1
        (0.2, 0.5, 0.2, 1.0, 1.0, True),  # below 1/delta: min takes the ratio
        (0.2, 0.5, 0.2, -1.0, -1.2, True),  # 0.5/1.5/0.2 = 1.67, clipped to 1.2
    ],
)
def test_guider_loss_on_fixed_numbers(guider, learner, old, advantage, surrogate, masked):
    values = settings(delta=1.5, clip_eps=0.2, ent_coef=0.0, vf_coef=0.0)
    mu, pi = policy_of([guider, 1 - guider]), policy_of([learner, 1 - learner])
    batch = fixed_batch([old], [advantage])
    loss, metrics = magpo.guider_loss(values, mu, pi, batch.steps.value, batch, jax.random.key(0))
    assert metrics["policy/masked_share"] == masked
    np.testing.assert_allclose(loss, masked * mu.kl(pi)[0] - surrogate, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, 0.5), (0.1, 0.5 * 1.9**2), (1.9, 0.5 * 1.8**2)],  # old 0, target 2, clip 0.2
)
def test_value_loss_takes_the_larger_of_unclipped_and_clipped(value, expected):
    values = settings(ent_coef=0.0, vf_coef=1.0, clip_eps=0.2)
    even = policy_of([0.5, 0.5])
    batch = fixed_batch([0.5], [0.0], value=0.0, target=2.0)
    _, metrics = magpo.guider_loss(values, even, even, jnp.array([value]), batch, jax.random.key(0))
    clipped = 0.5 * (min(max(value, -0.2), 0.2) - 2) ** 2
    np.testing.assert_allclose(metrics["loss/value"], max(expected, clipped), rtol=1e-5)


@pytest.mark.parametrize("direction", ["guider_to_learner", "learner_to_guider"])
def test_learner_loss_on_fixed_numbers(direction):
    values = settings(learner_kl=direction, rl_coef=2.0, clip_eps=0.2)
    mu, pi = policy_of([0.6, 0.4], [0.6, 0.4]), policy_of([0.3, 0.7], [0.9, 0.1])
    batch = fixed_batch([0.5, 0.5], [1.0, 1.0])
    loss, _ = magpo.learner_loss(values, mu, pi, batch)
    p, q = (mu, pi) if direction == "guider_to_learner" else (pi, mu)
    surrogate = np.array([0.3 / 0.5, 1.2])
    np.testing.assert_allclose(loss, (np.asarray(p.kl(q)) - 2.0 * surrogate).mean(), rtol=1e-5)


def test_each_loss_trains_only_its_own_network():
    values, key = settings(delta=1.1), jax.random.key(0)
    batch = fixed_batch([0.5, 0.4, 0.6], [1.0, -2.0, 0.5])
    logits = jax.random.normal(key, (2, 3, 4))

    def policies(logits):
        return (Categorical(jax.nn.log_softmax(x)) for x in logits)

    def guider_loss(logits):
        return magpo.guider_loss(values, *policies(logits), batch.steps.value, batch, key)[0]

    def learner_loss(logits):
        return magpo.learner_loss(values, *policies(logits), batch)[0]

    mu, pi = jax.grad(guider_loss)(logits)
    assert (mu != 0).any() and (pi == 0).all()
    mu, pi = jax.grad(learner_loss)(logits)
    assert (mu == 0).all() and (pi != 0).any()
