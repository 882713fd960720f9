"""Recurrent policies and critics: sequences equal single steps, and agents are independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.networks.recurrent import ActionCritic, Actors, Critic, split_time
from magpo.types import EnvSpec, Observation

B, C, N, O, G, A, H = 5, 6, 3, 7, 4, 2, 8
SPEC = EnvSpec(
    name="test/recurrent",
    num_agents=N,
    num_features=O,
    num_state_features=G,
    action_dim=A,
    action_kind="discrete",
    time_limit=9,
    truncates=False,
    headline="episode_return",
    stop_action=None,
)
NETWORKS = {
    "shared": Actors(SPEC, H),
    "separate": Actors(SPEC, H, shared=False),
    "feed-forward": Actors(SPEC, H, recurrent=False),
    "action values": Actors(SPEC, H, values=True),
    "state critic": Critic(SPEC, H),
    "observation critic": Critic(SPEC, H, "observation"),
}


@pytest.fixture(scope="module")
def sequences():
    """Return observations (B, C, ...) and episode starts (B, C)."""
    keys = jax.random.split(jax.random.key(0), 4)
    observation = Observation(
        agents_view=jax.random.normal(keys[0], (B, C, N, O)),
        action_mask=jax.random.bernoulli(keys[1], 0.7, (B, C, N, A)).at[..., 0].set(True),
        step_count=jnp.zeros((B, C), jnp.int32),
        global_state=jax.random.normal(keys[2], (B, C, G)),
    )
    return observation, jax.random.bernoulli(keys[3], 0.3, (B, C)).at[0, 0].set(True)


def at(tree, step):
    return jax.tree.map(lambda x: x[:, step], tree)


@pytest.mark.parametrize("name", NETWORKS)
def test_unrolling_equals_stepping(name, sequences):
    network = NETWORKS[name]
    params = network.init(jax.random.key(1))
    start = jax.tree.map(jnp.ones_like, network.initial_carry((B,)))
    last, outputs = jax.jit(network.unroll)(params, start, *sequences)
    carry, step = start, jax.jit(network.step)
    for t in range(C):
        carry, output = step(params, carry, *at(sequences, t))
        for x, y in zip(jax.tree.leaves(output), jax.tree.leaves(at(outputs, t)), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)
    for x, y in zip(jax.tree.leaves(carry), jax.tree.leaves(last), strict=True):
        assert x.shape == (B, *network.initial_carry(()).shape)
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_unrolling_an_action_critic_equals_stepping(sequences):
    observation, reset_before = sequences
    critic = ActionCritic(SPEC, H, "others")
    action = jax.random.randint(jax.random.key(2), (B, C, N), 0, A)
    inputs = observation.global_state, action, reset_before
    params, start = critic.init(jax.random.key(1)), jnp.ones((B, H))
    carries, values = critic.unroll(params, start, *inputs)
    carry = start
    for t in range(C):
        carry, value = critic.step(params, carry, *at(inputs, t))
        np.testing.assert_allclose(carry, carries[:, t], atol=1e-6)
        np.testing.assert_allclose(value, values[:, t], atol=1e-6)
    before = jnp.concatenate([start[:, None], carries[:, :-1]], axis=1)
    _, at_once = critic.step(params, before, *inputs)  # B * C sequences of one step
    np.testing.assert_allclose(at_once, values, atol=1e-6)


@pytest.mark.parametrize("name", ["shared", "separate"])
def test_an_agent_acts_on_its_own_view_with_its_own_parameters(name, sequences):
    """Check also that greedy actions are the policies' modes."""
    actors, (observation, _) = NETWORKS[name], at(sequences, 0)
    params, carry = actors.init(jax.random.key(1)), jnp.ones((B, N, H))
    act = jax.jit(actors.act, static_argnums=4)
    action, after = act(params, carry, observation, jax.random.key(3), True)
    expected, policy = actors.step(params, carry, observation, jnp.zeros(B, bool))
    np.testing.assert_array_equal(action, policy.mode())
    np.testing.assert_allclose(after, expected, atol=1e-6)
    changed = observation._replace(agents_view=observation.agents_view.at[:, 1].add(1.0))
    _, other = act(params, carry, changed, jax.random.key(3), True)
    same = np.isclose(after, other, atol=1e-6).all(-1)
    assert same[:, 0].all() and same[:, 2].all() and not same[:, 1].any()
    kernel = params["params"]["mix"]["kernel"]
    assert kernel.shape == ((H, H) if actors.shared else (N, H, H))


def test_time_is_split_into_contiguous_chunks():
    T, E, length = 6, 5, 2
    time, env = jnp.meshgrid(jnp.arange(T), jnp.arange(E), indexing="ij")
    split = np.asarray(split_time(10 * env + time, length))
    assert split.shape == (T // length * E, length)
    np.testing.assert_array_equal(split[:, 1], split[:, 0] + 1)
    assert sorted(split.ravel()) == sorted(np.asarray(10 * env + time).ravel())
    np.testing.assert_array_equal(split[:E, 0], 10 * np.arange(E))
