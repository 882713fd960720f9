"""The GRU against a slow NumPy model, its written-out reverse pass against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.networks import recurrent
from magpo.networks.recurrent import PerAgentCritic, RecurrentActor, gru_scan

T, B, H = 6, 5, 4


@pytest.fixture(scope="module")
def arguments():
    keys = jax.random.split(jax.random.key(0), 5)
    return (
        jax.random.normal(keys[0], (B, H)),
        jax.random.normal(keys[1], (T, B, 3 * H)),
        jax.random.bernoulli(keys[2], 0.3, (T, B)).at[0, 0].set(True),
        jax.random.normal(keys[3], (H, 3 * H)),
        jax.random.normal(keys[4], (H,)),
    )


def slow_gru(hidden, inputs, reset_before, kernel, bias):
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    out = np.zeros((T, B, H))
    for b in range(B):
        h = hidden[b]
        for t in range(T):
            if reset_before[t, b]:
                h = np.zeros(H)
            (xr, xz, xn), (hr, hz, hn) = (np.split(x, 3) for x in (inputs[t, b], h @ kernel))
            z = sigmoid(xz + hz)
            h = (1 - z) * np.tanh(xn + sigmoid(xr + hr) * (hn + bias)) + z * h
            out[t, b] = h
    return out


def test_gru_is_the_slow_one(arguments):
    slow = slow_gru(*(np.asarray(x, np.float64) for x in arguments))
    np.testing.assert_allclose(gru_scan(*arguments), slow, atol=1e-5)


def test_reverse_pass_is_autodiffs(arguments):
    hidden, inputs, reset_before, kernel, bias = arguments
    weight = jnp.arange(T * B * H).reshape(T, B, H) / 50.0

    def by_hand(*differentiable):
        hidden, inputs, kernel, bias = differentiable
        return jnp.sum(weight * gru_scan(hidden, inputs, reset_before, kernel, bias))

    def plain(*differentiable):  # the forward function without its custom rule
        hidden, inputs, kernel, bias = differentiable
        return jnp.sum(weight * gru_scan.fun(hidden, inputs, reset_before, kernel, bias))

    differentiable = (hidden, inputs, kernel, bias)
    ours = jax.grad(by_hand, argnums=(0, 1, 2, 3))(*differentiable)
    autodiff = jax.grad(plain, argnums=(0, 1, 2, 3))(*differentiable)
    for ours_x, autodiff_x in zip(ours, autodiff, strict=True):
        np.testing.assert_allclose(ours_x, autodiff_x, rtol=1e-4, atol=1e-4)


def test_a_sequence_in_one_go_is_step_by_step():
    actor = RecurrentActor(action_dim=3, action_kind="discrete", hidden_dim=H)
    keys = jax.random.split(jax.random.key(1), 3)
    view = jax.random.normal(keys[0], (T, B, 7))
    mask = jnp.ones((T, B, 3), bool)
    reset_before = jax.random.bernoulli(keys[1], 0.3, (T, B))
    hidden = jnp.ones((B, H))
    params = actor.init(keys[2], hidden, view, mask, reset_before)

    last, policy = actor.apply(params, hidden, view, mask, reset_before)
    for t in range(T):
        now = slice(t, t + 1)
        hidden, step = actor.apply(params, hidden, view[now], mask[now], reset_before[now])
        np.testing.assert_allclose(step.log_probs[0], policy.log_probs[t], atol=1e-6)
    np.testing.assert_allclose(hidden, last, atol=1e-6)


def test_the_gradient_of_the_per_agent_critic_is_autodiffs(monkeypatch):
    critic = PerAgentCritic(3, 5, "discrete", H, sees_actions=True)
    action = jax.random.randint(jax.random.key(0), (T, B, 3), 0, 5)
    given = jnp.ones((B, H)), jnp.ones((T, B, 2)), action, jnp.zeros((T, B), bool)
    params = critic.init(jax.random.key(1), *given)
    weight = jnp.cos(jnp.arange(T * B * 3)).reshape(T, B, 3)

    def gradient():
        return jax.grad(lambda params: (weight * critic.apply(params, *given)[1]).sum())(params)

    ours = gradient()
    for name in ("_look_up", "_sum_of_others"):  # without their custom rules
        monkeypatch.setattr(recurrent, name, getattr(recurrent, name).fun)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ours, gradient())
