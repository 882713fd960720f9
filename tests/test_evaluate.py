"""The evaluator, checked against a slow Python loop."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo import commands
from magpo import evaluate as evaluation
from magpo.config.members import Member
from magpo.evaluate import __doc__ as usage
from magpo.evaluate import evaluate, main
from magpo.runs import policy
from magpo.types import Observation, StepType, TimeStep, restart

N, LIMIT, B = 3, 7, 5


class RandomEnds:
    """Episodes of 2 to LIMIT steps; after an end, rewards are NaN and no other end follows."""

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
    """Choose actions from parameters, carry, observation, key and `greedy`."""
    noise = jnp.zeros_like(carry) if greedy else jax.random.randint(key, carry.shape, 0, 3)
    seen = observation.agents_view[:, :, 0].astype(jnp.int32)
    return params + carry + noise + 2 * seen, carry + 1


SYSTEM = SimpleNamespace(
    initial_carry=lambda setup, batch_shape: jnp.zeros((*batch_shape, N), jnp.int32), act=_act
)


@pytest.mark.parametrize("greedy", [True, False])
def test_evaluation_equals_a_python_loop(greedy):
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
    assert len(set(lengths)) > 2  # otherwise wrong ends could go unnoticed
    assert all(value.shape == (B,) and value.dtype == jnp.float32 for value in metrics.values())


def test_evaluation_stops_at_the_time_limit():
    class Endless(RandomEnds):
        def reset(self, key):
            state, timestep = super().reset(key)
            return state | {"length": jnp.int32(10**6)}, timestep

    metrics = evaluate(SYSTEM, None, Endless(), jnp.int32(1), jax.random.key(0), B)
    np.testing.assert_array_equal(metrics["episode_length"], LIMIT)


def test_keys_determine_the_returns():
    returns = [
        evaluate(SYSTEM, None, RandomEnds(), jnp.int32(1), jax.random.key(k), B)["episode_return"]
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(returns[0], returns[1])
    assert not np.array_equal(returns[0], returns[2])


@pytest.fixture
def trained(monkeypatch):
    """Make a run of three members, two of which are played."""
    config = SimpleNamespace(
        system="own",
        members=(Member(3, {}), Member(7, {}), Member(2, {})),
        steps_per_chunk=64,
    )
    run = SimpleNamespace(
        config=config,
        algorithm=SYSTEM,
        params=jnp.array([1, 2, 3]),
        score=np.zeros(3),
        chunk=np.int32([0, 5, 1]),
        places=lambda setting: np.array([1, 2]),
    )
    monkeypatch.setattr(policy, "read", lambda folder: run)
    monkeypatch.setattr(policy, "make_env", lambda trained, env, options: RandomEnds())
    monkeypatch.setattr(policy, "build", lambda *_, env: SimpleNamespace(setup=None))
    return run


def test_every_metric_is_printed_and_written(trained, monkeypatch, capsys, tmp_path):
    file = tmp_path / "new" / "scores.json"
    monkeypatch.setattr(evaluation, "BATCH", 8)  # 11 episodes: 8 and 3
    arguments = ["run=here", "episodes=11", "seed=4", f"json={file}"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    commands.run(usage, main)
    out, written = capsys.readouterr().out, json.loads(file.read_text())

    first, then = jax.random.key(4), jax.random.fold_in(jax.random.key(4), 11)
    played = [(jax.random.split(first, 3), 8), (jax.random.split(then, 3), 3)]
    members = written.pop("members")
    about = {"run": "here", "system": "own", "task": "test/ends"}
    assert written == about | {"episodes": 11, "greedy": False, "seed": 4}
    assert [member["seed"] for member in members] == [7, 2]
    assert [member["trained_steps"] for member in members] == [320, 64]
    for place, member in zip((1, 2), members, strict=True):
        parts = [
            evaluate(SYSTEM, None, RandomEnds(), trained.params[place], keys[place], size)
            for keys, size in played
        ]
        assert set(member["metrics"]) == {"episode_return", "episode_length", "win_rate"}
        (row,) = [line for line in out.splitlines() if line.split()[0] == str(member["seed"])]
        for name, summary in member["metrics"].items():
            values = np.concatenate([part[name] for part in parts]).astype(np.float64)
            assert summary == pytest.approx({"mean": values.mean(), "std": values.std()}, rel=1e-5)
            assert f"{summary['mean']:.3f} ± {summary['std']:.3f}" in row and name in out
    (mean,) = [line for line in out.splitlines() if line.split()[0] == "mean"]
    wins = np.array([member["metrics"]["win_rate"]["mean"] for member in members])
    assert f"{wins.mean():.2f} ± {wins.std(ddof=1):.2f}" in mean  # over seeds


def test_an_unwritable_file_is_reported_before_playing(trained, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluation, "evaluate", None)
    monkeypatch.setattr(sys, "argv", ["evaluate", "run=here", f"json={tmp_path}/file/scores.json"])
    with pytest.raises(SystemExit) as stop:
        commands.run(usage, main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(tmp_path) in err


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
def test_bad_requests_give_a_one_line_error(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "run=nowhere", argument])
    with pytest.raises(SystemExit) as stop:
        commands.run(usage, main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err
