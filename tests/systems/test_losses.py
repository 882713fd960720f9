"""Losses of all systems but MAGPO on fixed numbers, and their stopped gradients."""

import dataclasses
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.networks.heads import Categorical
from magpo.systems import ctds, gpae_mappo, happo
from systems import cases

KEY = jax.random.key(0)


def settings(name, **changes):
    values = cases.build(name).setup.config.hyper
    return dataclasses.replace(values, **{"clip_eps": 0.2, "ent_coef": 0.0} | changes)


def policy_of(*probabilities) -> Categorical:
    return Categorical(jnp.log(jnp.array([[p, 1 - p] for p in probabilities])))


def batch_of(batch_class, **fields):
    """Return a batch of one step with action 0; fields that are not given are None."""
    fields = {name: jnp.array([x]) for name, x in fields.items()}
    if "log_prob" in fields:
        fields["log_prob"] = jnp.log(fields["log_prob"])
    stored = {name: fields.pop(name) for name in ("log_prob", "value") if name in fields}
    steps = SimpleNamespace(action=jnp.zeros(1, int), **stored)
    return batch_class(**dict.fromkeys(batch_class._fields) | fields | {"steps": steps})


# The ratio is new / 0.5, clipped to [0.8, 1.2].
SURROGATES = [
    (0.5, 1.0, 1.0),  # unchanged policy
    (0.6, 1.0, 1.2),  # at the clip edge
    (0.7, 1.0, 1.2),  # beyond the edge
    (0.7, -1.0, -1.4),  # pessimistic: a bad action keeps its gradient
    (0.2, 1.0, 0.4),
    (0.2, -1.0, -0.8),
]


# MAGPO's losses depend on its learner, GPAE does not clip values: each has separate tests.
PPO = sorted({*cases.POLICY_GRADIENT} - {"magpo", "gpae_mappo"})


def joint_loss(module):
    """Return the loss of a policy and a value that share a network."""
    return module.guider_loss if hasattr(module, "guider_loss") else module.ppo_loss


def surrogate_loss(name, module, new, advantage, **more):
    """Return the policy's loss alone, with an old probability of 0.5."""
    batch = batch_of(module.Batch, log_prob=0.5, advantage=advantage, value=0.0, target=0.0, **more)
    values, policy = settings(name), policy_of(new)
    if hasattr(module, "actor_loss"):
        return module.actor_loss(values, policy, batch, KEY)[0]
    return joint_loss(module)(values, policy, jnp.zeros(1), batch, KEY)[0]


@pytest.mark.parametrize(("new", "advantage", "surrogate"), SURROGATES)
@pytest.mark.parametrize("name", PPO)
def test_the_surrogate_is_clipped(name, new, advantage, surrogate):
    module = importlib.import_module(f"magpo.systems.{name}")
    factor = {"factor": 1.0} if "factor" in module.Batch._fields else {}
    loss = surrogate_loss(name, module, new, advantage, **factor)
    np.testing.assert_allclose(loss, -surrogate, rtol=1e-5)


@pytest.mark.parametrize(("new", "advantage", "surrogate"), SURROGATES)
def test_happos_factor_scales_the_surrogate_and_not_the_entropy(new, advantage, surrogate):
    loss = surrogate_loss("happo", happo, new, advantage, factor=3.0)
    np.testing.assert_allclose(loss, -3.0 * surrogate, rtol=1e-5)
    batch = batch_of(happo.Batch, log_prob=0.5, advantage=0.0, factor=3.0)
    policy = policy_of(new)
    loss, _ = happo.actor_loss(settings("happo", ent_coef=0.1), policy, batch, KEY)
    np.testing.assert_allclose(loss, -0.1 * policy.entropy(KEY)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("center", "new", "advantage", "surrogate"),
    [
        ("current", 0.9, 1.0, 1.8),  # the ratio before the update
        ("current", 0.95, 1.0, 1.9),  # within 0.2 of that ratio
        ("current", 0.7, -1.0, -1.6),  # below the clip range
        ("behaviour", 0.9, 1.0, 1.2),  # JaxMARL's loss on old data
        ("behaviour", 0.7, -1.0, -1.4),
    ],
)
def test_gpae_clips_around_the_current_or_the_behaviour_policy(center, new, advantage, surrogate):
    """Use probabilities of 0.5 when collected and 0.9 before the update."""
    batch = batch_of(gpae_mappo.Batch, log_prob=0.5, ratio=1.8, advantage=advantage)
    values = settings("gpae_mappo", clip_center=center)
    loss, _ = gpae_mappo.actor_loss(values, policy_of(new), batch, KEY)
    np.testing.assert_allclose(loss, -surrogate, rtol=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_gpaes_gradient_is_finite_where_the_ratio_is_not(advantage):
    batch = batch_of(gpae_mappo.Batch, log_prob=0.5, ratio=1.0, advantage=advantage)
    batch.steps.log_prob -= 200.0  # e^200 overflows

    def loss(probability):
        return gpae_mappo.actor_loss(settings("gpae_mappo"), policy_of(probability), batch, KEY)[0]

    assert np.isfinite(jax.grad(loss)(0.5))


@pytest.mark.parametrize("name", PPO)
@pytest.mark.parametrize("value", [1.0, 0.1, 1.9, -3.0])
def test_the_value_loss_takes_the_larger_of_unclipped_and_clipped(name, value):
    """Set the old value to 0, the target to 2 and the clip range to 0.2."""
    module = importlib.import_module(f"magpo.systems.{name}")
    batch = batch_of(module.Batch, value=0.0, target=2.0, log_prob=0.5, advantage=0.0)
    values, given = settings(name, vf_coef=0.5), jnp.array([value])
    if hasattr(module, "critic_loss"):
        loss, _ = module.critic_loss(values, given, batch)
    else:
        loss, _ = joint_loss(module)(values, policy_of(0.5), given, batch, KEY)
    worse = max((value - 2) ** 2, (min(max(value, -0.2), 0.2) - 2) ** 2)
    np.testing.assert_allclose(loss, 0.5 * 0.5 * worse, rtol=1e-5)


def test_gpaes_value_loss_is_the_squared_error():
    batch = batch_of(gpae_mappo.Batch)._replace(target=jnp.array([2.0, 1.0]))
    loss, _ = gpae_mappo.critic_loss(
        settings("gpae_mappo", vf_coef=0.5), jnp.array([1.0, 4.0]), batch
    )
    np.testing.assert_allclose(loss, 0.5 * (1.0 + 9.0) / 2, rtol=1e-6)


@pytest.mark.parametrize("direction", ["guider_to_learner", "learner_to_guider"])
@pytest.mark.parametrize("rl_coef", [0.0, 2.0])
def test_ctds_learner_loss(direction, rl_coef):
    mu, pi = policy_of(0.6), policy_of(0.3)
    batch = batch_of(ctds.Batch, log_prob=0.5, advantage=1.0)
    values = settings("ctds", learner_kl=direction, rl_coef=rl_coef)
    loss, _ = ctds.learner_loss(values, mu, pi, batch)
    p, q = (mu, pi) if direction == "guider_to_learner" else (pi, mu)
    np.testing.assert_allclose(loss, p.kl(q)[0] - rl_coef * 0.6, rtol=1e-5)

    def loss_given_guider(log_probs):
        return ctds.learner_loss(values, Categorical(log_probs), pi, batch)[0]

    assert (jax.grad(loss_given_guider)(mu.log_probs) == 0).all()
