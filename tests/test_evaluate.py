"""The evaluator against a slow Python loop."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo import commands
from magpo.evaluate import __doc__ as usage
from magpo.evaluate import evaluate, main
from magpo.types import Observation, StepType, TimeStep, restart

N, LIMIT, B = 3, 7, 5


class RandomEnds:
    """Episodes of 2 .. LIMIT steps. What follows an end is poison: NaN rewards, no end any more."""

    name, num_agents, action_dim, action_kind = "test/ends", N, 4, "discrete"
    time_limit, truncates, headline = LIMIT, False, "win_rate"

    def reset(self, key):
        length = jax.random.randint(key, (), 2, LIMIT + 1)
        state = {"t": jnp.int32(0), "length": length}
        return state, restart(N, self._observe(state), {"win_rate": jnp.array(False)})

    def step(self, state, action):
        state = state | {"t": state["t"] + 1}
        over = state["t"] > state["length"]
        last = state["t"] == state["length"]
        reward = (action + jnp.arange(N)) * state["t"].astype(jnp.float32)
        timestep = TimeStep(
            step_type=jnp.where(last, StepType.LAST, StepType.MID).astype(jnp.int8),
            reward=jnp.where(over, jnp.nan, reward),
            discount=1.0 - last,
            observation=self._observe(state),
            metrics={"win_rate": (state["length"] % 2 == 0) & ~over},
        )
        return state, timestep

    def _observe(self, state):
        view = jnp.full((N, 2), state["t"], jnp.float32)
        return Observation(view, jnp.ones((N, 4), bool), state["t"])


def _act(setup, params, carry, observation, key, greedy):
    """Depends on parameters, carry, observation, key and `greedy`."""
    noise = jnp.zeros_like(carry) if greedy else jax.random.randint(key, carry.shape, 0, 3)
    seen = observation.agents_view[:, :, 0].astype(jnp.int32)
    return params + carry + noise + 2 * seen, carry + 1


SYSTEM = SimpleNamespace(
    initial_carry=lambda setup, batch_shape: jnp.zeros((*batch_shape, N), jnp.int32), act=_act
)


@pytest.mark.parametrize("greedy", [True, False])
def test_equals_a_python_loop(greedy):
    env, params, key = RandomEnds(), jnp.int32(2), jax.random.key(3)
    metrics = evaluate(SYSTEM, None, env, params, key, B, greedy)

    reset_key, act_key = jax.random.split(key)
    lengths = []
    for b, episode_key in enumerate(jax.random.split(reset_key, B)):
        state, timestep = env.reset(episode_key)
        carry = SYSTEM.initial_carry(None, (B,))
        total, length = 0.0, 0
        while not timestep.last():
            view = Observation(*(x if x is None else x[None] for x in timestep.observation))
            view = jax.tree.map(lambda x: jnp.repeat(x, B, 0), view)
            step_key = jax.random.fold_in(act_key, length)
            action, carry = _act(None, params, carry, view, step_key, greedy)
            state, timestep = env.step(state, action[b])
            total, length = total + np.mean(timestep.reward), length + 1
        np.testing.assert_allclose(metrics["episode_return"][b], total, rtol=1e-5)
        assert metrics["episode_length"][b] == length
        assert metrics["win_rate"][b] == float(timestep.metrics["win_rate"])
        lengths.append(length)
    assert len(set(lengths)) > 2  # else the test would not see where an episode ends
    assert all(value.shape == (B,) and value.dtype == jnp.float32 for value in metrics.values())


def test_stops_at_the_time_limit_of_an_endless_environment():
    class Endless(RandomEnds):
        def reset(self, key):
            state, timestep = super().reset(key)
            return state | {"length": jnp.int32(10**6)}, timestep

    metrics = evaluate(SYSTEM, None, Endless(), jnp.int32(1), jax.random.key(0), B)
    np.testing.assert_array_equal(metrics["episode_length"], LIMIT)


def test_keys_decide():
    returns = [
        evaluate(SYSTEM, None, RandomEnds(), jnp.int32(1), jax.random.key(k), B)["episode_return"]
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(returns[0], returns[1])
    assert not np.array_equal(returns[0], returns[2])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("episodes=0", "episodes must be greater than 0, not 0"),
        (
            "episodes=99999999999999999999",
            "episodes must be less than 2147483648, not 9999999999999999",
        ),
        ("seed=9223372036854775808", "seed must be less than 4294967296"),
        ("greedy=1", "greedy must be a valid boolean, not 1"),
    ],
)
def test_bad_requests_are_one_line(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "run=nowhere", argument])
    with pytest.raises(SystemExit) as stop:
        commands.run(usage, main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err
