"""Retention checked against NumPy; acting in turn agrees with training in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.networks.autoregressive import init_joint
from magpo.networks.retention import Retention, chunk_weights, decays
from magpo.networks.sable import Sable, SableCarry
from magpo.types import EnvSpec, Observation

B, T, N, H, D, O, A = 5, 6, 3, 2, 4, 7, 4
RESETS = np.zeros((B, T), bool)
RESETS[0, 0] = RESETS[1, 3] = RESETS[2, (1, 2)] = RESETS[3, 5] = True  # row 4 has none


def slow_retention(query, key, value, state, kappa, causal):
    """Decay the state once per timestep; add each token's outer product before reading it."""
    out = np.zeros_like(query)
    for b, h in np.ndindex(B, H):
        s = state[b, h].copy()
        for t in range(T):
            s = kappa[h] * (np.zeros_like(s) if RESETS[b, t] else s)
            for n in range(N):
                s += np.outer(key[b, t, n, h], value[b, t, n, h])
                out[b, t, n, h] = query[b, t, n, h] @ s
            if not causal:
                for n in range(N):
                    out[b, t, n, h] = query[b, t, n, h] @ s
    return out


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_chunkwise_retention_matches_the_slow_model(chunk_size, causal):
    layer = Retention(embed_dim=H * D, n_head=H)
    keys = jax.random.split(jax.random.key(0), 4)
    x_query, x_key = jax.random.normal(keys[0], (2, B, T, N, H * D))
    state = jax.random.normal(keys[1], (B, H, D, D))
    kappa = decays(H, 0.8)
    weights = chunk_weights(jnp.asarray(RESETS), N, chunk_size, kappa)
    arguments = x_query, x_key, state, weights, causal
    params = layer.init(keys[2], *arguments, method="chunkwise")
    params = jax.tree.map(lambda x: x * 8, params)  # so that the state matters

    query = layer.apply(params, x_query, method="ask")
    key, value, gate = layer.apply(params, x_key, method="project")
    slow = slow_retention(*map(np.asarray, (query, key, value, state)), kappa, causal)
    expected = layer.apply(params, jnp.asarray(slow), gate, method="gate_and_mix")
    ours = layer.apply(params, *arguments, method="chunkwise")
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-4)


def test_decays_span_the_published_range():
    np.testing.assert_allclose(decays(3, 0.5), 0.5 * (1 - 1 / np.array([32, 128, 512])))
    assert len(decays(1, 1.0)) == 1


def sable(chunk_size: int, action_kind: str = "discrete", **changes) -> Sable:
    options = {
        "num_agents": N,
        "action_dim": A,
        "action_kind": action_kind,
        "embed_dim": H * D,
        "n_head": H,
        "n_block": 2,
        "decay_scaling_factor": 0.8,
        "chunk_size": chunk_size,
    }
    return Sable(**(options | changes))


@pytest.fixture(scope="module", params=["discrete", "continuous"])
def rollout(request):
    """Act timestep by timestep over episode ends; return the trajectory."""
    model = sable(3, request.param)
    keys = jax.random.split(jax.random.key(0), 5)
    mask = jax.random.bernoulli(keys[0], 0.7, (B, T, N, A)).at[..., 1].set(True)
    since = [
        [t - max([s for s in range(t + 1) if r[s]], default=0) for t in range(T)] for r in RESETS
    ]
    observation = Observation(
        agents_view=jax.random.normal(keys[1], (B, T, N, O)),
        action_mask=mask if request.param == "discrete" else jnp.ones((B, T, N, A), bool),
        step_count=jnp.asarray(since, jnp.int32),
    )
    carry = SableCarry(*map(tuple, jax.random.normal(keys[2], (3, 2, B, H, D, D))))
    first = jax.tree.map(lambda x: x[:, 0], observation)
    spec = EnvSpec("", N, O, None, A, request.param, 9, False, "episode_return", None)
    params = init_joint(model, keys[3], carry, first, spec)
    params = jax.tree.map(lambda x: x * 1.7, params)  # away from a uniform policy

    def step(carry, inputs):
        observation, reset_before, key = inputs
        out = model.apply(params, carry, observation, reset_before, key, method="act")
        value = model.apply(params, carry, observation, reset_before, method="value")
        return out.carry, (out.action, out.log_prob, out.value, value)

    by_time = jax.tree.map(lambda x: x.swapaxes(0, 1), (observation, jnp.asarray(RESETS)))
    inputs = (*by_time, jax.random.split(keys[4], T))
    _, out = jax.jit(lambda carry: jax.lax.scan(step, carry, inputs))(carry)
    return request.param, params, carry, observation, [x.swapaxes(0, 1) for x in out]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6])
def test_acting_agrees_with_training(rollout, chunk_size):
    kind, params, carry, observation, (action, log_prob, value, value_alone) = rollout
    model = sable(chunk_size, kind)
    apply = jax.jit(model.apply)
    values, distribution = apply(params, carry, observation, action, jnp.asarray(RESETS))
    np.testing.assert_allclose(distribution.log_prob(action), log_prob, atol=5e-4)
    np.testing.assert_allclose(values, value, atol=1e-4)
    np.testing.assert_allclose(value_alone, value, atol=1e-4)


def test_any_chunk_size_accepts_a_single_timestep(rollout):
    kind, params, carry, observation, (action, log_prob, *_) = rollout
    one = jax.tree.map(lambda x: x[:, :1], (observation, action, jnp.asarray(RESETS)))
    _, distribution = sable(3, kind).apply(params, carry, *one)
    np.testing.assert_allclose(distribution.log_prob(one[1]), log_prob[:, :1], atol=5e-4)


def test_a_team_of_another_size_is_rejected(rollout):
    kind, params, carry, observation, (action, *_) = rollout
    fewer = jax.tree.map(lambda x: x[:, :, :2] if x.ndim > 2 else x, observation)
    with pytest.raises(AssertionError):
        sable(3, kind).apply(params, carry, fewer, action[:, :, :2], jnp.asarray(RESETS))


def test_nothing_leaks_from_later_agents_later_steps_or_other_episodes(rollout):
    kind, params, carry, observation, (action, *_) = rollout
    model = sable(3, kind)

    @jax.jit
    def outputs(view, action):
        changed = observation._replace(agents_view=view)
        value, distribution = model.apply(params, carry, changed, action, jnp.asarray(RESETS))
        return value, jax.tree.leaves(distribution)[0]

    view = observation.agents_view
    value, distribution = outputs(view, action)

    # Row 1's second episode begins at step 3. Agent 1 acts differently at step 4.
    _, other = outputs(view, action.at[1, 4, 1].set(1 - action[1, 4, 1]))
    same = np.isclose(other, distribution, atol=1e-6).all(-1)
    assert same[1, :4].all() and same[1, 4, :2].all() and not same[1, 4, 2]
    assert not same[1, 5].all() and same[(0, 2, 3, 4), :].all()

    # Agent 2's view at step 2, the end of the first episode, changes only that step's values.
    other_value, other = outputs(view.at[1, 2, 2].add(1.0), action)
    same = np.isclose(other_value, value, atol=1e-6)
    assert same[1, :2].all() and not same[1, 2].any() and same[1, 3:].all()


def test_feed_forward_layers_train_or_are_absent():
    observation = Observation(
        jax.random.normal(jax.random.key(0), (B, T, N, O)),
        jnp.ones((B, T, N, A), bool),
        jnp.zeros((B, T), int),
    )
    action = jnp.zeros((B, T, N), int)
    model = sable(3)
    carry = model.initial_carry(B)
    params = model.init(jax.random.key(1), carry, observation, action, jnp.asarray(RESETS))

    def loss(params):
        value, distribution = model.apply(params, carry, observation, action, jnp.asarray(RESETS))
        return (value**2).sum() + distribution.log_prob(action).sum()

    gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
    of_ffn = [g for path, g in gradients if "feed_forward" in jax.tree_util.keystr(path)]
    assert len(of_ffn) == 8 and all((g != 0).any() for g in of_ffn)

    without = jax.eval_shape(
        sable(3, ffn=False).init, jax.random.key(1), carry, observation, action, jnp.asarray(RESETS)
    )
    structure = str(jax.tree_util.tree_structure(without))
    assert "feed_forward" not in structure
    # The layer's norm stays, as in the released code, where the layer then adds nothing.
    assert structure.count("norms_") == str(jax.tree_util.tree_structure(params)).count("norms_")
