"""Values and gradients of kernels, checked against references; the GRU also against NumPy."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.networks import gru, gru_gpu, kernels

T, B, N, H = 6, 5, 3, 4
KEYS = jax.random.split(jax.random.key(0), 5)
HIDDEN = jax.random.normal(KEYS[0], (B, H))
INPUTS = jax.random.normal(KEYS[1], (T, B, 3 * H))
RESETS = jax.random.bernoulli(KEYS[2], 0.3, (T, B)).at[0, 0].set(True)
KERNEL = jax.random.normal(KEYS[3], (H, 3 * H))
BIAS = jax.random.normal(KEYS[4], (H,))


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


def assert_matches(kernel, reference, *arguments):
    """Compare two functions and their gradients with respect to all arguments."""
    chex.assert_trees_all_close(kernel(*arguments), reference(*arguments), atol=1e-6)

    def gradients(function):
        def loss(*arguments):
            out = function(*arguments)
            return (jnp.cos(jnp.arange(out.size)).reshape(out.shape) * out).sum()

        return jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)

    chex.assert_trees_all_close(gradients(kernel), gradients(reference), rtol=1e-4, atol=1e-4)


def test_the_gru_reference_matches_numpy():
    arguments = HIDDEN, INPUTS, RESETS, KERNEL, BIAS
    slow = slow_gru(*(np.asarray(x, np.float64) for x in arguments))
    np.testing.assert_allclose(gru.gru_reference(*arguments), slow, atol=1e-5)


def with_fixed_resets(function):
    """Fix the resets, which have no gradients."""
    return lambda hidden, inputs, *weights: function(hidden, inputs, RESETS, *weights)


def test_gru():
    arguments = HIDDEN, INPUTS, KERNEL, BIAS
    assert_matches(with_fixed_resets(gru.gru), with_fixed_resets(gru.gru_reference), *arguments)


@pytest.mark.parametrize("seeds", [None, 2])
def test_the_gpu_gru_matches_its_reference(monkeypatch, seeds):
    def interpreted(function, steps, width):
        return partial(getattr(gru_gpu, function.__name__), interpret=True)

    monkeypatch.setattr(gru, "_fastest", interpreted)
    ours = with_fixed_resets(gru.gru)
    reference = with_fixed_resets(gru.gru_reference)
    arguments = HIDDEN, INPUTS, KERNEL, BIAS
    if seeds:
        ours, reference = jax.vmap(ours), jax.vmap(reference)
        arguments = [jnp.stack([x, -x]) for x in arguments]
    assert "pallas_call" in str(jax.make_jaxpr(ours)(*arguments))
    assert_matches(ours, reference, *arguments)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="compiles for a GPU")
def test_a_gpu_runs_a_gru_as_one_kernel():
    arguments = jnp.zeros((B, 64)), jnp.zeros((T, B, 192)), RESETS, jnp.eye(64, 192), jnp.ones(64)
    assert "triton" in jax.jit(gru.gru).lower(*arguments).as_text()


def test_the_gru_rejects_a_hidden_state_that_would_broadcast():
    with pytest.raises(AssertionError):
        gru.gru(HIDDEN[:1], INPUTS, RESETS, KERNEL, BIAS)


def test_look_up():
    action = jax.random.randint(KEYS[0], (T, B, N), 0, 2)  # repeats rows 0 and 1, never row 2
    table = jax.random.normal(KEYS[1], (N, 3, H))
    assert_matches(
        lambda x: kernels.look_up(x, action), lambda x: kernels.look_up_reference(x, action), table
    )


def test_sum_of_others():
    assert_matches(kernels.sum_of_others, kernels.sum_of_others_reference, INPUTS)
    x = jnp.ones((N, H)).at[0].set(1e30)  # subtracting 1e30 from the sum of all would leave 0
    np.testing.assert_array_equal(kernels.sum_of_others(x)[0], N - 1)


def test_write_in_place():
    cache = {"key": jnp.ones((B, 2, N, H)), "value": jnp.zeros((B, 2, N, H))}
    entry = {"key": jnp.full((B, 2, H), 2.0), "value": jnp.full((B, 2, H), 3.0)}
    written = kernels.write_in_place(cache, entry, jnp.int32(1), jnp.ones((B, 2, H)))
    expected = kernels.write_reference(cache, entry, jnp.int32(1))
    chex.assert_trees_all_equal(written, expected)
    assert (expected["key"][:, :, 1] == 2).all() and (expected["key"][:, :, (0, 2)] == 1).all()


def residual_block(params, x, state):
    return x + jnp.tanh(x @ params["kernel"] + state)


def test_apply_blocks():
    def blocks(function):
        def of_stacked(x, weights, states):
            params = [{"kernel": kernel} for kernel in weights]
            return function(residual_block, x, params, list(states))

        return of_stacked

    weights, states = jax.random.normal(KEYS[1], (3, H, H)), jnp.ones((3, B, H))
    ours = blocks(kernels.apply_blocks)
    assert_matches(ours, blocks(kernels.apply_blocks_reference), HIDDEN, weights, states)
    out, reverse_pass = jax.vjp(ours, HIDDEN, weights, states)
    assert "tanh" in str(jax.make_jaxpr(reverse_pass)(out))  # recomputed


def test_add_bias():
    x, bias = jax.random.normal(KEYS[0], (T, B, H)), BIAS
    assert_matches(kernels.add_bias, kernels.add_bias_reference, x, bias)


@pytest.mark.parametrize("shape", [(H,), (N, H)])
@pytest.mark.parametrize("centred", [False, True])
def test_normalise(shape, centred):
    x = 3 * jax.random.normal(KEYS[0], (T, B, *shape)) + 1
    weights = [jax.random.normal(key, shape) for key in KEYS[1 : 2 + centred]]
    assert_matches(kernels.normalise, kernels.normalise_reference, x, *weights)
