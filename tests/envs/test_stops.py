"""Agents made to stop, and whom the advantages blame."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.envs import stops

SPEC = SimpleNamespace(name="smax/3m", num_agents=3, stop_action=4)
WITHOUT = SimpleNamespace(name="lbf/8x8-2p-2f-coop", num_agents=3, stop_action=None)


def test_one_agent_with_a_choice_is_made_to_stop_as_often_as_asked():
    mask = jnp.ones((4000, 3, 6), bool).at[:, 1, :4].set(False).at[:, 1, 5].set(False)
    seen = SimpleNamespace(action_mask=mask.at[:1000].set(mask[0, 1]))
    action = jnp.zeros((4000, 3), jnp.int32)
    new, forced = stops.force(SPEC, 0.3, seen, action, jax.random.key(0))
    assert not forced[:1000].any()  # nobody has a choice
    assert (forced.sum(-1) <= 1).all() and not forced[:, 1].any()
    np.testing.assert_allclose(forced[1000:].mean(0), [0.15, 0, 0.15], atol=0.02)
    np.testing.assert_array_equal(new, jnp.where(forced, 4, 0))


def test_actions_stay_in_games_without_a_stop():
    seen = SimpleNamespace(action_mask=jnp.ones((5, 3, 6), bool))
    action = jnp.arange(15).reshape(5, 3)
    new, forced = stops.force(WITHOUT, 0.0, seen, action, jax.random.key(0))
    np.testing.assert_array_equal(new, action)
    assert not forced.any() and stops.advantage_gap(WITHOUT, action, forced) == {}


def test_the_gap_is_the_others_mean_advantage_minus_the_stopped_agents():
    advantage = jnp.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0], [5.0, 5.0, 5.0]])
    forced = jnp.array([[True, False, False], [False, False, True], [False, False, False]])
    gap = stops.advantage_gap(SPEC, advantage, forced)["policy/advantage_gap"]
    assert gap == pytest.approx(((4.0 - 1.0) + (0.0 - 3.0)) / 2)
    nobody = stops.advantage_gap(SPEC, advantage, jnp.zeros((3, 3), bool))
    assert nobody["policy/advantage_gap"] == 0
