"""MAPPO: contiguous chunks, and the inputs of its critic."""

import jax
import jax.numpy as jnp
import numpy as np

from magpo.systems import mappo
from systems import cases


def test_chunks_are_contiguous_and_complete():
    """Check that a sequence is one environment's steps in order, with its own first carry."""
    setup = cases.build("mappo").setup  # 6 environments, 8 steps, chunks of 4
    T, E, N = 8, 6, 2
    time, env = jnp.meshgrid(jnp.arange(T), jnp.arange(E), indexing="ij")
    each = jnp.broadcast_to((10.0 * env + time)[..., None], (T, E, N))
    fields = dict.fromkeys(mappo.Transition._fields, each)
    fields |= {"discount": jnp.ones((T, E)), "ended": jnp.zeros((T, E), bool)}
    transitions = mappo.Transition(**fields | {"terminal_value": None})
    starts = 10.0 * jnp.arange(E) + jnp.array([[0.0], [4.0]])  # (T / C, E)
    carry = mappo.Carry(*[jnp.broadcast_to(starts[..., None, None], (2, E, N, 3))] * 2)
    collected = mappo.Rollout(transitions, carry, last_value=jnp.zeros((E, N)), episodes={})
    batch = mappo.sequences(setup.config.hyper, collected)
    first = batch.steps.action[:, 0, 0]
    assert sorted(np.asarray(first)) == sorted(np.asarray(starts).ravel())
    np.testing.assert_array_equal(batch.steps.action[..., 1], first[:, None] + jnp.arange(4.0))
    np.testing.assert_array_equal(batch.carry.actor[:, 0, 0], first)


def values(name):
    """Return the first values, and those with agent 0's view and the global state changed."""
    _, setup, env = cases.build(name, "lbf/2s-8x8-2p-2f-coop", "network.critic.hidden_dim=32")

    @jax.jit
    def run(key):
        state = mappo.init(setup, env, key)
        observation, reset_before = state.timestep.observation, state.timestep.last()
        changed = observation._replace(agents_view=observation.agents_view.at[:, 0].add(1.0))
        if setup.config.needs_global_state:
            changed = changed._replace(global_state=changed.global_state + 1.0)
        params, carry = state.params.critic, state.carry.critic
        return [
            setup.critic.step(params, carry, given, reset_before)[1]
            for given in (observation, changed)
        ]

    return run(jax.random.key(0))


def test_an_observation_critic_sees_only_its_own_agent():
    before, after = values("ippo")
    same = np.isclose(before, after, atol=1e-6)
    assert not same[..., 0].any() and same[..., 1].all()


def test_a_state_critic_sees_the_global_state():
    before, after = values("mappo")
    assert not np.isclose(before, after, atol=1e-6).any()
