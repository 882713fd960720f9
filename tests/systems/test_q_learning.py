"""VDN and QMIX: returns, mixing, target networks and exploration."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo import config, experiment
from magpo.contract import as_data
from magpo.errors import ConfigError
from magpo.networks.heads import ActionValues
from magpo.types import Observation
from systems import cases

BOTH = pytest.mark.parametrize("name", cases.VALUE_BASED)


def slow_return(hyper, t, e, steps, value, last_value, terminal_value):
    """Sum n rewards of environment e from step t, and bootstrap unless the episode terminates."""
    total, weight = 0.0, 1.0
    for step in range(t, len(value)):
        total += weight * hyper.reward_scale * steps["reward"][step, e]
        weight *= hyper.gamma
        if steps["truncated"][step, e]:
            return total + weight * terminal_value[step, e]
        if steps["ended"][step, e]:
            return total
        if step + 1 == len(value):
            return total + weight * last_value[e]
        if step + 1 == t + hyper.n_step:
            return total + weight * value[step + 1, e]
    raise AssertionError


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("n_step", [1, 3])
@BOTH
def test_returns_match_the_slow_model(name, n_step, truncates):
    """Check the order of observations in a sequence, too: an observation is its own value."""
    T, E = 9, 5
    rng = np.random.default_rng(0)
    ended = rng.random((T, E)) < 0.4
    ended[T - 1, 0] = ended[0, 1] = True
    truncated = ended & (rng.random((T, E)) < 0.6) & truncates
    value, terminal_value = rng.normal(size=(2, T, E)).astype(np.float32)
    last_value = rng.normal(size=E).astype(np.float32)
    steps = {"reward": rng.normal(size=(T, E)), "ended": ended, "truncated": truncated}

    def observed(value):
        return Observation(value[..., None, None], jnp.ones((*value.shape, 1, 2)), value)

    module = cases.build(name).module
    hyper = dataclasses.replace(
        cases.build(name).setup.config.hyper, gamma=0.9, reward_scale=2.0, n_step=n_step
    )
    transitions = module.Transition(
        observation=observed(value),
        reset_before=np.zeros((T, E), bool),
        action=np.zeros((T, E, 1), int),
        discount=1.0 - (ended & ~truncated),
        terminal=observed(terminal_value) if truncates else None,
        **steps,
    )
    collected = module.Rollout(transitions, np.zeros(E), (observed(last_value), ended[-1]), {})
    setup = SimpleNamespace(
        config=SimpleNamespace(rollout_length=T), spec=SimpleNamespace(time_limit=1)
    )
    batch = module.sequences(setup, collected)
    returns = module.targets(hyper, batch.observation.agents_view[..., 0, 0], batch)
    expected = [
        [slow_return(hyper, t, e, steps, value, last_value, terminal_value) for t in range(T)]
        for e in range(E)
    ]
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-5)


def mixed(module, setup, params, value, global_state):
    """Return the team's value from a row of agents' values."""
    state = [setup, params, value, global_state] if hasattr(setup, "mixer") else [value]
    return module.team_value(*state)


@BOTH
def test_the_loss_is_that_of_double_q_learning(name):
    """Compute the loss one step at a time, with a target network that differs."""
    module, setup, env = cases.build(name, cases.LBF, "system.n_step=1")
    state = cases.jitted(module.init)(setup, env, jax.random.key(0))
    state, collected = cases.jitted(module.rollout)(setup, env, cases.stagger(state))
    batch, hyper = module.sequences(setup, collected), state.hyper
    assert not np.array_equal(np.asarray(batch.place)[:, -1], [7] * 6)  # some episodes end
    params = jax.tree.map(lambda x: 2.0 * x, state.params)
    target_params = jax.tree.map(lambda x: 3.0 * x, state.params)
    inputs = batch.carry, batch.observation, batch.reset_before
    agents = params, target_params
    agents = [getattr(p, "agents", p) for p in agents]
    online, target = (np.asarray(setup.agents.unroll(p, *inputs)[1].value) for p in agents)
    states = batch.observation.global_state
    errors = []
    for b, t in np.ndindex(batch.reward.shape):
        here = int(batch.place[b, t])
        there = here + 1
        best = online[b, there].argmax(-1)[:, None]
        values = np.take_along_axis(target[b, there], best, axis=-1)[:, 0]
        state_of = [None, None] if states is None else [states[b, here], states[b, there]]
        following = mixed(module, setup, target_params, values, state_of[1])
        expected = hyper.reward_scale * batch.reward[b, t]
        expected += hyper.gamma * batch.discount[b, t] * following
        chosen = np.take_along_axis(online[b, here], np.asarray(batch.action[b, t])[:, None], -1)
        value = mixed(module, setup, params, chosen[:, 0], state_of[0])
        errors.append((float(value) - float(expected)) ** 2)
    loss, _ = module.loss(params, setup, hyper, target_params, batch)
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-4)
    gradient = jax.grad(lambda p: module.loss(params, setup, hyper, p, batch)[0])(target_params)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient))


@BOTH
def test_continuous_actions_are_refused(name):
    message = f"{name} needs discrete actions; mpe/simple_spread_3ag has continuous ones"
    with pytest.raises(ConfigError, match=message):
        cases.build(name, "mpe/simple_spread_3ag")


def test_a_buffer_larger_than_the_memory_is_refused(tmp_path):
    """A sequence of the buffer takes 30 kB and more."""
    overrides = ["env=smax/3m", "system.buffer_size=2147483647", f"results_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"^the training state needs \d{6,}\.\d GB of memory"):
        experiment.run(cases.build("vdn").module, config.load("vdn", overrides))
    assert not list(tmp_path.iterdir())


def test_vdn_adds_the_agents_values():
    module = cases.build("vdn").module
    np.testing.assert_allclose(module.team_value(jnp.array([[1.0, 2.5], [-1.0, 3.0]])), [3.5, 2.0])


def test_qmix_never_decreases_with_an_agents_value():
    """Draw large weights, also negative ones, so that a missing absolute value shows."""
    module, setup, _ = cases.build("qmix")
    keys = jax.random.split(jax.random.key(0), 3)
    value = jax.random.normal(keys[0], (64, setup.spec.num_agents))
    state = jax.random.normal(keys[1], (64, setup.spec.num_state_features))
    mixer = setup.mixer.init(keys[2], value, state)
    mixer = jax.tree.map(lambda x: x + 0.5 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), mixer)
    params = module.Params(agents=None, mixer=mixer)

    def team_value(value, state):
        return module.team_value(setup, params, value, state)

    slopes = jax.vmap(jax.grad(team_value))(value, state)
    assert (slopes >= 0).all() and (slopes > 0).mean() > 0.9
    assert slopes.std(0).min() > 0  # the weights depend on the state
    other = jax.vmap(team_value, in_axes=(0, None))(value, state[0])
    assert np.abs(other - jax.vmap(team_value)(value, state)).max() > 0.1


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def equal(tree, other):
    return all(np.array_equal(x, y) for x, y in zip(leaves(tree), leaves(other), strict=True))


@BOTH
def test_training_waits_and_the_target_network_follows_every_third_update(name):
    """An update takes 48 steps."""
    overrides = "system.learning_starts=96", "system.target_period=3"
    module, setup, env = cases.build(name, cases.LBF, *overrides)
    state = cases.jitted(module.init)(setup, env, jax.random.key(0))
    start = state.params
    for number in range(1, 7):
        before, state = state, cases.jitted(module.update)(setup, env, state)[0]
        assert equal(state.params, start) == (number < 2)
        copied = number % 3 == 0
        assert equal(state.target_params, state.params if copied else before.target_params)
    assert not equal(state.target_params, start)


def test_exploration_is_uniform_over_legal_actions():
    module = cases.build("vdn").module
    mask = jnp.array([True, False, True, True])
    values = ActionValues(jnp.where(mask, jnp.array([0.0, 9.0, 1.0, 0.5]), -jnp.inf))
    keys = jax.random.split(jax.random.key(0), 20_000)
    action = jax.vmap(lambda key: module.explore(values, mask, jnp.float32(0.3), key))(keys)
    shares = np.bincount(np.asarray(action), minlength=4) / len(keys)
    np.testing.assert_allclose(shares, [0.1, 0.0, 0.8, 0.1], atol=0.01)


def test_epsilon_falls_linearly_to_its_end():
    overrides = "system.epsilon_start=0.9", "system.epsilon_end=0.1", "system.epsilon_decay=0.5"
    module, setup, _ = cases.build("vdn", cases.LBF, "total_steps=384", *overrides)
    assert setup.config.num_updates == 8
    hyper = as_data(setup.config.hyper)
    found = [
        module.epsilon(setup, SimpleNamespace(hyper=hyper, update_count=jnp.int32(number)))
        for number in (0, 1, 2, 4, 7)
    ]
    np.testing.assert_allclose(found, [0.9, 0.7, 0.5, 0.1, 0.1], rtol=1e-6)
