"""What DAE and COMA credit an agent with, by sums written out one number at a time."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.errors import ConfigError
from magpo.systems import coma, dae
from systems import cases

T, E, N = 6, 5, 3


@pytest.fixture(scope="module")
def transitions():
    rng = np.random.default_rng(0)
    ended = rng.random((T, E)) < 0.3
    ended[0, 0] = ended[T - 1, 1] = True
    fields = dict.fromkeys(dae.Transition._fields)
    return dae.Transition(
        **fields
        | {
            "value": jnp.asarray(rng.normal(size=(T, E, N))),
            "reward": jnp.asarray(rng.normal(size=(T, E, N))),
            "expected_reward": jnp.asarray(rng.normal(size=(T, E, N))),
            "discount": jnp.asarray(1.0 - ended),
            "ended": jnp.asarray(ended),
        }
    )


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_dae_subtracts_the_expected_rewards_of_equation_3(transitions, beta):
    found = dae.expected_rewards(transitions, 0.9, beta)
    expected = np.zeros((T, E, N))
    for t, e in np.ndindex(T, E):
        for later in range(t, T):
            steps = later - t
            expected[t, e] += (
                0.9**steps * beta ** (steps + 1) * transitions.expected_reward[later, e]
            )
            if transitions.ended[later, e]:
                break
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_daes_advantages_and_targets_leave_out_the_same(beta):
    """Check that without beta they are MAPPO's."""
    case = cases.build("dae", cases.LBF, f"system.beta={beta}")
    state = cases.jitted(dae.init)(case.setup, case.env, jax.random.key(0))
    state, collected = cases.jitted(dae.rollout)(case.setup, case.env, state)
    hyper = state.hyper
    batch = dae.sequences(hyper, collected)
    steps = collected.transitions
    plain = dae.advantages(steps, collected.last_value, hyper.gamma, hyper.gae_lambda)
    expected = dae.expected_rewards(steps, hyper.gamma * hyper.gae_lambda, beta)
    assert (expected != 0).all() == (beta > 0)
    for x, ours in zip(plain, (batch.advantage, batch.target), strict=True):
        np.testing.assert_allclose(ours, (x - expected).swapaxes(0, 1), atol=1e-6)


def test_daes_reward_loss_is_half_the_mean_squared_error():
    batch = SimpleNamespace(steps=SimpleNamespace(reward=jnp.array([1.0, 3.0])))
    assert dae.reward_loss(jnp.array([0.0, 1.0]), batch)[0] == 1.25


@pytest.mark.parametrize("system", [coma, dae])
def test_agents_made_to_stop_are_stored_and_blamed(system):
    forced = "system.anomaly_probability=0.5"
    case = cases.build(system.__name__.rpartition(".")[2], "smax/3m", forced)
    state = cases.jitted(system.init)(case.setup, case.env, jax.random.key(0))
    _, collected = cases.jitted(system.rollout)(case.setup, case.env, state)
    steps = collected.transitions
    assert 0.3 < steps.forced.any(-1).mean() < 0.7
    assert (steps.action[steps.forced] == 4).all()
    _, metrics = cases.jitted(system.update)(case.setup, case.env, state)
    assert metrics["policy/advantage_gap"] != 0


@pytest.mark.parametrize("name", ["coma", "dae", "gpae_mappo"])
def test_only_smax_agents_can_be_stopped(name):
    with pytest.raises(ConfigError, match="anomaly_probability is for smax"):
        cases.build(name, cases.LBF, "system.anomaly_probability=0.1")


def decided(task, batch):
    """Return COMA's decisions for `batch` copies of one observation, and their inputs."""
    case = cases.build("coma", task)
    state = cases.jitted(coma.init)(case.setup, case.env, jax.random.key(0))
    first = jax.tree.map(
        lambda x: jnp.repeat(x[:1], batch, axis=0), (state.carry, state.timestep.observation)
    )
    carry, observation = first
    reset = jnp.ones(batch, bool)
    params = jax.tree.map(lambda x: 2 * x, state.params)
    decide = jax.jit(coma.decide, static_argnums=0)
    made = decide(case.setup, state.hyper, params, carry, observation, reset, jax.random.key(1))
    return case.setup, params, carry, observation, reset, made


def test_comas_baseline_is_the_policys_mean_over_the_agents_own_actions():
    setup, params, carry, observation, reset, made = decided(cases.LBF, 4)
    _, policy = setup.actor.step(params.actor, carry.actor, observation, reset)
    probs, num_agents = np.exp(policy.log_probs), setup.spec.num_agents

    @jax.jit
    def values(action):
        given = observation.global_state, action, reset, action[..., None]
        return setup.critic.step(params.critic, carry.critic, *given)[1][..., 0]

    np.testing.assert_allclose(made.value, values(made.action), atol=1e-5)
    baseline = np.zeros((4, num_agents))
    for agent, action in np.ndindex(num_agents, setup.spec.action_dim):
        other = values(made.action.at[:, agent].set(action))
        baseline[:, agent] += probs[:, agent, action] * other[:, agent]
    np.testing.assert_allclose(made.baseline, baseline, atol=1e-5)
    assert np.abs(made.value - made.baseline).max() > 1e-2


@pytest.mark.parametrize("task", [cases.LBF, "mpe/simple_spread_3ag"])
def test_comas_advantages_are_zero_on_average(task):
    *_, made = decided(task, 4096)
    advantage = np.asarray(made.value - made.baseline)
    error = advantage.std(axis=0) / 64
    assert (error > 1e-4).all()
    assert (np.abs(advantage.mean(axis=0)) < 5 * error).all()
