"""Distributions checked against closed forms; action masks, also in gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from magpo.networks.heads import Categorical, PolicyHead, TanhNormal, executed_action

KEY = jax.random.key(0)


def test_illegal_actions_have_no_probability_entropy_kl_or_gradient():
    head = PolicyHead(action_dim=5, action_kind="discrete")
    features = jax.random.normal(KEY, (7, 3))
    mask = jnp.tile(jnp.array([True, False, True, False, False]), (7, 1))
    params = head.init(KEY, features, mask)
    params = jax.tree.map(lambda x: x * 100, params)  # away from uniform

    distribution = head.apply(params, features, mask)
    two = jax.nn.log_softmax((features @ params["params"]["Dense_0"]["kernel"])[:, (0, 2)])
    np.testing.assert_allclose(distribution.log_probs[:, (0, 2)], two, atol=1e-5)
    assert (jnp.exp(distribution.log_probs)[:, (1, 3, 4)] == 0).all()
    np.testing.assert_allclose(distribution.entropy(KEY), -(jnp.exp(two) * two).sum(-1), atol=1e-5)
    samples = jax.vmap(distribution.sample)(jax.random.split(KEY, 200))
    assert set(np.unique(samples)) == {0, 2}

    def total(params):
        distribution = head.apply(params, features, mask)
        other = head.apply(jax.tree.map(lambda x: -x, params), features, mask)
        return (
            distribution.entropy(KEY)
            + distribution.kl(other)
            + distribution.log_prob(jnp.zeros(7, int))
        ).sum()

    gradient = jax.grad(total)(params)["params"]["Dense_0"]["kernel"]
    assert np.isfinite(gradient).all()
    assert (gradient[:, (1, 3, 4)] == 0).all() and (gradient[:, (0, 2)] != 0).all()


def test_categorical_kl_is_the_sum_over_actions():
    p, q = (Categorical(jax.nn.log_softmax(x)) for x in jax.random.normal(KEY, (2, 4, 6)))
    a, b = np.exp(p.log_probs), np.exp(q.log_probs)
    np.testing.assert_allclose(p.kl(q), (a * np.log(a / b)).sum(-1), atol=1e-6)
    np.testing.assert_allclose(p.kl(p), 0, atol=1e-7)


def test_tanh_normal_integrates_to_one_and_ignores_padding():
    mean, std = jnp.array([0.3, 5.0]), jnp.array([0.7, 0.1])
    distribution = TanhNormal(mean, std, jnp.array([True, False]))
    action = np.linspace(-1 + 1e-6, 1 - 1e-6, 200_001)
    raw = jnp.stack([jnp.arctanh(jnp.asarray(action)), jnp.full(action.shape, 9.0)], axis=-1)
    assert (distribution.sample(KEY)[1], distribution.mode()[1]) == (0, 0)
    density = np.exp(distribution.log_prob(raw))
    assert abs(np.trapezoid(density, action) - 1) < 1e-3
    # At saturation the log-prob stays finite and the probability ratio is exactly 1.
    far = jnp.array([[40.0, 0.0]])
    assert np.isfinite(distribution.log_prob(far)).all()
    assert jnp.exp(distribution.log_prob(far) - distribution.log_prob(far)) == 1
    assert executed_action(far, "continuous")[0, 0] == 1


def test_tanh_normal_kl_and_entropy_match_estimates_from_samples():
    p = TanhNormal(jnp.array([0.2]), jnp.array([0.5]), jnp.array([True]))
    q = TanhNormal(jnp.array([-0.4]), jnp.array([0.9]), jnp.array([True]))
    samples = jax.vmap(p.sample)(jax.random.split(KEY, 40_000))
    estimate = (p.log_prob(samples) - q.log_prob(samples)).mean()  # the tanh terms cancel
    np.testing.assert_allclose(p.kl(q), estimate, atol=0.02)
    entropies = jax.vmap(p.entropy)(jax.random.split(jax.random.key(1), 40_000))
    np.testing.assert_allclose(entropies.mean(), -p.log_prob(samples).mean(), atol=0.02)
