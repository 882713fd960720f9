"""HAPPO: the order of its agents, their factors and their separate parameters."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.systems import happo
from systems import cases

LEARNING_RATE = ["system.actor_lr=0.01", "system.fixed_order=true", "system.ppo_epochs=1"]


@pytest.fixture(scope="module")
def updated():
    """Train three agents once, in fixed order, on one rollout."""
    _, setup, env = cases.build("happo", "lbf/15x15-3p-5f", *LEARNING_RATE)

    @jax.jit
    def run(key):
        state = happo.init(setup, env, key)
        batch = happo.sequences(state.hyper, happo.rollout(setup, env, state)[1])
        batch = batch._replace(advantage=jax.random.normal(key, batch.advantage.shape))
        before = happo.Trained(state.params.actor, state.opt_state.actor)
        after, metrics = happo.update_actors(setup, state.hyper, before, batch, key)
        return batch, before, after, metrics

    return setup, *run(jax.random.key(0))


def log_ratios(setup, batch, params):
    """Return every agent's log-ratio, new over old, under its own `params`, (N, ...)."""

    def of(agent):
        part = happo.of_agent(batch, agent)
        policy = happo.policy_of(setup, jax.tree.map(lambda x: x[agent], params), part)
        return policy.log_prob(part.steps.action) - part.steps.log_prob

    return jnp.stack([of(agent) for agent in range(setup.spec.num_agents)])  # (N, B, C, 1)


def test_an_agents_factor_is_the_product_of_earlier_agents_new_ratios(updated):
    """Train each agent alone with that factor; its parameters must be the same."""
    setup, batch, before, after, _ = updated
    factors = jnp.exp(jnp.cumsum(log_ratios(setup, batch, after.params), axis=0))
    assert factors.std() > 1e-3
    keys = jax.random.split(jax.random.split(jax.random.key(0))[1], 3)

    @jax.jit
    def alone(agent, factor, key):
        part = happo.of_agent(batch._replace(factor=factor), agent)
        start = jax.tree.map(lambda x: x[agent], before)
        return happo.train("actor", setup, setup.config.hyper, start, part, key)[0].params

    ones = jnp.ones_like(factors[0])
    for agent, factor in enumerate([ones, factors[0], factors[1]]):
        expected = alone(agent, factor, keys[agent])
        actual = jax.tree.map(lambda x, agent=agent: x[agent], after.params)
        chex.assert_trees_all_close(expected, actual, atol=1e-5)
    wrong = alone(2, ones, keys[2])
    leaves = zip(jax.tree.leaves(wrong), jax.tree.leaves(after.params), strict=True)
    assert any(not np.allclose(x, y[2], atol=1e-5) for x, y in leaves)


def test_agents_have_separate_parameters_before_and_after_training(updated):
    _, _, before, after, _ = updated
    for leaf in [*jax.tree.leaves(before.params), *jax.tree.leaves(after.params)]:
        if leaf.ndim > 2 and leaf.shape[-1] > 1:  # kernels
            assert not np.allclose(leaf[0], leaf[1])


def test_the_order_of_the_agents_is_random(updated):
    """Check that orders differ, and that the first agent of each is trained as if alone."""
    setup, batch, before, *_ = updated
    hyper = dataclasses.replace(setup.config.hyper, fixed_order=False)

    @jax.jit
    def first_trained(key):
        """Return the order drawn, and how far its first agent is from training alone."""
        after, _ = happo.update_actors(setup, hyper, before, batch, key)
        order = jax.random.permutation(jax.random.split(key)[0], 3)
        keys = jax.random.split(jax.random.split(key)[1], 3)
        part = happo.of_agent(batch, order[0])
        start = jax.tree.map(lambda x: x[order[0]], before)
        alone = happo.train("actor", setup, hyper, start, part, keys[0])[0].params
        gaps = jax.tree.map(lambda x, y: jnp.abs(x - y[order[0]]).max(), alone, after.params)
        return order, jnp.stack(jax.tree.leaves(gaps)).max()

    orders, gaps = zip(*(first_trained(jax.random.key(seed)) for seed in range(4)), strict=True)
    assert max(gaps) < 1e-5
    assert len({tuple(map(int, order)) for order in orders}) > 1
