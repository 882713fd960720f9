"""MAT: acting in turn agrees with training in parallel; no action leaks to earlier agents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.networks.attention import Attention
from magpo.networks.autoregressive import init_joint
from magpo.networks.mat import MAT
from magpo.types import EnvSpec, Observation

B, N, O, A = 5, 4, 7, 3


def env_spec(action_kind):
    return EnvSpec("", N, O, None, A, action_kind, 9, False, "episode_return", None)


@pytest.fixture(scope="module", params=[("discrete", 1), ("discrete", 2), ("continuous", 2)])
def rollout(request):
    action_kind, n_head = request.param
    model = MAT(A, action_kind, embed_dim=8, n_head=n_head, n_block=2)
    keys = jax.random.split(jax.random.key(0), 4)
    mask = jnp.ones((B, N, A), bool)
    if action_kind == "discrete":
        mask = jax.random.bernoulli(keys[0], 0.7, mask.shape).at[..., 1].set(True)
    observation = Observation(jax.random.normal(keys[1], (B, N, O)), mask, jnp.zeros(B, jnp.int32))
    params = init_joint(model, keys[2], (), observation, env_spec(action_kind))
    params = jax.tree.map(lambda x: x * 6.0, params)  # away from a uniform policy
    out = jax.jit(lambda: model.apply(params, (), observation, None, keys[3], method="act"))()
    return model, params, observation, out


def test_attention_projections_are_initialised_orthogonal():
    layer = Attention(embed_dim=8, n_head=2)
    token = jnp.ones((1, N, 8))
    params = layer.init(jax.random.key(0), token, token, False)["params"]
    key, value = jnp.split(params["key_value"]["kernel"], 2, axis=1)
    for kernel in (params["query"]["kernel"], key, value, params["output"]["kernel"]):
        np.testing.assert_allclose(kernel @ kernel.T, 1e-4 * np.eye(8), atol=1e-9)


def test_acting_agrees_with_training(rollout):
    model, params, observation, out = rollout
    never = jnp.zeros(B, bool)  # MAT ignores resets, and accepts None
    value, distribution = jax.jit(model.apply)(params, (), observation, out.action, never)
    np.testing.assert_allclose(distribution.log_prob(out.action), out.log_prob, atol=1e-4)
    np.testing.assert_allclose(value, out.value, atol=1e-5)
    alone = model.apply(params, (), observation, None, method="value")
    np.testing.assert_allclose(alone, out.value, atol=1e-5)


def test_greedy_actions_are_the_most_likely(rollout):
    model, params, observation, _ = rollout
    likely = model.apply(params, (), observation, None, jax.random.key(9), True, method="act")
    _, distribution = model.apply(params, (), observation, likely.action, None)
    np.testing.assert_allclose(likely.action, distribution.mode(), atol=1e-5)


def test_an_agent_depends_on_earlier_actions_and_all_views(rollout):
    model, params, observation, out = rollout

    @jax.jit
    def outputs(view, action):
        value, distribution = model.apply(
            params, (), observation._replace(agents_view=view), action, None
        )
        return value, jax.tree.leaves(distribution)[0]

    view = observation.agents_view
    value, distribution = outputs(view, out.action)
    other_value, other = outputs(view, out.action.at[:, 1].set(1 - out.action[:, 1]))
    same = np.asarray(other == distribution).all(-1)  # compared exactly: attention starts small
    assert same[:, :2].all() and not same[:, 2:].all(axis=0).any()
    np.testing.assert_array_equal(other_value, value)
    other_value, other = outputs(view.at[:, 3, 0].add(1.0), out.action)
    for new, old in ((other_value[..., None], value[..., None]), (other, distribution)):
        same = np.asarray(new == old).all(-1)  # (B, N)
        assert not same.all(axis=0).any()  # the change reaches every agent in some environment
