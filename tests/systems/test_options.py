"""The options that MAPPO, HAPPO and MAGPO share: value_norm, anneal_lr, dead_agents."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo import moments
from magpo.errors import ConfigError
from magpo.metrics import masked_mean
from systems import cases

SYSTEMS = ["mappo", "happo", "magpo"]


def built(name, *overrides, task=cases.LBF):
    """Return a system's module, setup, environment and first state."""
    module = importlib.import_module(f"magpo.systems.{name}")
    _, setup, env = cases.build(name, task, *overrides)
    return module, setup, env, cases.jitted(module.init)(setup, env, jax.random.key(0))


def test_moments_are_those_of_the_last_targets():
    targets = np.random.default_rng(0).normal(3.0, 2.0, (300, 50))
    found = moments.init(True)
    for target in targets:
        found = moments.updated(found, jnp.asarray(target))
    weights = moments.DECAY ** np.arange(300)[::-1, None] * np.ones((1, 50))
    mean = np.average(targets, weights=weights)
    std = np.average((targets - mean) ** 2, weights=weights) ** 0.5
    np.testing.assert_allclose(moments.denormalise(found, 0.0), mean, rtol=1e-4)
    np.testing.assert_allclose(moments.normalise(found, mean + std), 1.0, rtol=1e-3)
    np.testing.assert_allclose(moments.normalise(found, moments.denormalise(found, 7.0)), 7.0)


def test_rare_targets_are_not_blown_up():
    found = moments.updated(moments.init(True), jnp.zeros(9))
    np.testing.assert_allclose(moments.normalise(found, 1.0), 10.0, rtol=1e-5)


def test_a_mean_over_no_agent_is_zero():
    assert masked_mean(jnp.array([1.0, jnp.nan, 5.0]), jnp.array([True, False, True])) == 3.0
    assert masked_mean(jnp.ones(2), jnp.zeros(2, bool)) == 0.0
    assert masked_mean(jnp.array([1.0, 5.0]), None) == 3.0


def test_without_targets_or_moments_values_stay():
    for none in (moments.init(True), moments.init(False), moments.updated(None, jnp.ones(3))):
        assert moments.normalise(none, 4.0) == moments.denormalise(none, 4.0) == 4.0


@pytest.mark.parametrize("name", SYSTEMS)
def test_rollouts_have_values_in_the_rewards_units_and_batches_have_normalised_ones(name):
    module, setup, env, state = built(name, "system.value_norm=true", "env.time_limit=5")
    assert env.truncates
    known = moments.Moments(*map(jnp.float32, (0.5, 0.5 * 3.0, 0.5 * (4.0 + 9.0))))  # 3 +- 2
    rollout = cases.jitted(module.rollout)
    _, raw = rollout(setup, env, state)
    _, found = rollout(setup, env, state._replace(moments=known))
    for ours, theirs in (
        (found.transitions.value, raw.transitions.value),
        (found.last_value, raw.last_value),
    ):
        np.testing.assert_allclose(ours, 3.0 + 2.0 * theirs, rtol=1e-4)
    truncated = raw.transitions.terminal_value != 0
    assert truncated.any()
    np.testing.assert_allclose(
        found.transitions.terminal_value[truncated],
        3.0 + 2.0 * raw.transitions.terminal_value[truncated],
        rtol=1e-4,
    )

    batch = module.sequences(state.hyper, found)
    after, normalised = module.normalised(state._replace(moments=known), batch)
    assert after.moments == moments.updated(known, batch.target)
    target = moments.denormalise(after.moments, normalised.target)
    np.testing.assert_allclose(target, batch.target, rtol=1e-4)
    critics_own = module.sequences(state.hyper, raw).steps.value
    np.testing.assert_allclose(normalised.steps.value, critics_own, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(normalised.advantage, batch.advantage)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_step_size_falls_linearly_to_zero(name):
    """Check it with gradients of Adam's own size: each step is as long as the step size."""
    module, setup, _, state = built(name, "system.anneal_lr=true")
    config, hyper = setup.config, state.hyper
    number = config.num_updates * hyper.ppo_epochs * hyper.num_minibatches
    adam = (
        module.optimiser(config, hyper)
        if name == "magpo"
        else module.optimisers(config, hyper).actor
    )
    params = {"w": jnp.ones(1)}
    opt_state, steps = adam.init(params), []
    for _ in range(number + 2):
        updates, opt_state = adam.update({"w": jnp.ones(1)}, opt_state, params)
        steps.append(-float(updates["w"][0]))
    expected = hyper.actor_lr * np.maximum(1 - np.arange(number + 2) / number, 0)
    np.testing.assert_allclose(steps, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", SYSTEMS)
def test_with_mask_an_update_ignores_dead_agents(name):
    """Check that the dead agents' rewards, which only their advantages contain, change nothing."""
    words = ["system.dead_agents=mask", "rollout_length=64", "num_envs=4", "total_steps=256"]
    module, setup, env = cases.build(name, "smax/3m", *words)
    env = dataclasses.replace(env, time_limit=60)  # agents die after some twenty steps
    state = cases.jitted(module.init)(setup, env, jax.random.key(0))
    _, collected = cases.jitted(module.rollout)(setup, env, state)
    batch = module.sequences(state.hyper, collected)
    dead = ~batch.learns
    assert 0 < dead.mean() < 0.5
    alive = batch.steps.observation.action_mask.sum(-1) > 1
    np.testing.assert_array_equal(batch.learns, alive)

    def changed(x):
        return jnp.where(dead, x + 100.0, x)

    other = batch._replace(
        advantage=changed(batch.advantage),
        target=changed(batch.target),
        steps=batch.steps._replace(value=changed(batch.steps.value)),
    )
    train = jax.jit(trained_by_happo if name == "happo" else trained, static_argnums=(0, 1))
    results = [train(module, setup, state, x, jax.random.key(1)) for x in (batch, other)]
    for before, *after in zip(*map(jax.tree.leaves, (state.params, *results)), strict=True):
        np.testing.assert_allclose(*after, rtol=1e-4, atol=1e-6)
        assert not np.array_equal(before, after[0])


def trained(module, setup, state, batch, key):
    """Return the networks after a gradient step on a batch."""
    return module.update_minibatch(setup, state, batch, key)[0].params


def trained_by_happo(happo, setup, state, batch, key):
    """Return HAPPO's networks after training on a batch."""
    actors, critic = map(happo.Trained, state.params, state.opt_state)
    actors, _ = happo.update_actors(setup, state.hyper, actors, batch, key)
    critic, _ = happo.train("critic", setup, state.hyper, critic, batch, key)
    return happo.Params(actors.params, critic.params)


@pytest.mark.parametrize("name", SYSTEMS)
def test_only_smax_agents_can_be_dead(name):
    with pytest.raises(ConfigError, match="dead_agents=mask is for smax"):
        built(name, "system.dead_agents=mask")
