"""MAPPO: contiguous chunks, and what its critic reads."""

import jax
import jax.numpy as jnp
import numpy as np

from magpo.systems import mappo
from systems import cases


def test_chunks_are_contiguous_and_whole():
    """Every sequence is one environment's, its steps in order, and begins with its own memory."""
    _, system = cases.build("mappo")  # 6 environments, 8 steps, chunks of 4
    T, E, N = 8, 6, 2
    time, env = jnp.meshgrid(jnp.arange(T), jnp.arange(E), indexing="ij")
    each = jnp.broadcast_to((10.0 * env + time)[..., None], (T, E, N))
    fields = dict.fromkeys(mappo.Transition._fields, each)
    fields |= {"discount": jnp.ones((T, E)), "ended": jnp.zeros((T, E), bool)}
    transitions = mappo.Transition(**fields | {"terminal_value": None})
    starts = 10.0 * jnp.arange(E) + jnp.array([[0.0], [4.0]])  # (K, E)
    memory = mappo.Memory(*[jnp.broadcast_to(starts[..., None, None], (2, E, N, 3))] * 2)
    batch = mappo.sequences(system, mappo.Rollout(transitions, memory, jnp.zeros((E, N)), {}))
    first = batch.action[0, :, 0]
    assert sorted(np.asarray(first)) == sorted(np.asarray(starts).ravel())
    np.testing.assert_array_equal(batch.action[..., 1], first + jnp.arange(4.0)[:, None])
    np.testing.assert_array_equal(batch.memory.actor[0, :, 0, 0], first)


def values(name):
    """What is stored for a rollout, and again with agent 0 seeing something else throughout."""
    _, system = cases.build(name)

    @jax.jit
    def run(key):
        state = mappo.init(system, key)
        observation = state.timestep.observation
        seen = jax.tree.map(lambda x: x[None], (observation, state.timestep.last()))
        view = observation.agents_view.at[:, 0].add(1.0)[None]
        changed = seen[0]._replace(agents_view=view)
        if system.config.global_state:
            changed = changed._replace(global_state=changed.global_state + 1.0)
        run_critic = mappo.run_critic
        params, hidden = state.params.critic, state.memory.critic
        return [
            run_critic(system, params, hidden, given, seen[1])[1] for given in (seen[0], changed)
        ]

    return run(jax.random.key(0))


def test_a_critic_of_observations_sees_its_own_agent_only():
    before, after = values("ippo")
    same = np.isclose(before, after, atol=1e-6)
    assert not same[..., 0].any() and same[..., 1].all()


def test_a_critic_of_the_state_sees_all_of_it():
    before, after = values("mappo")
    assert not np.isclose(before, after, atol=1e-6).any()
