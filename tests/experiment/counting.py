"""A system whose parameters count its updates, on a task that returns how far they have come."""

import dataclasses
import json
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo import experiment
from magpo.config import DistributedConfig, EnvConfig, LoggerConfig, RunConfig
from magpo.types import Observation, StepType, TimeStep, restart

N, LENGTH, U, K = 3, 2, 2, 5  # agents, steps of an episode, updates per chunk, evaluations
SEEDS = (3, 11, 4)


class Count:
    """The reward is the action: what is returned tells which parameters acted."""

    name, num_agents, action_dim, action_kind = "test/count", N, 4, "discrete"
    time_limit, truncates, headline = LENGTH, False, "episode_return"
    observation_spec = Observation(jax.ShapeDtypeStruct((N, 1), jnp.float32), None, None)

    def reset(self, key):
        return jnp.int32(0), restart(N, self._observe(0), {})

    def step(self, state, action):
        step_type = jnp.where(state + 1 == LENGTH, StepType.LAST, StepType.MID).astype(jnp.int8)
        reward = action.astype(jnp.float32)
        return state + 1, TimeStep(step_type, reward, jnp.float32(1), self._observe(state + 1), {})

    def _observe(self, state):
        return Observation(jnp.zeros((N, 1)), jnp.ones((N, 4), bool), jnp.int32(state))


@dataclasses.dataclass(frozen=True)
class Algorithm:
    nan: str = ""  # what becomes NaN at the update that a seed's peak names


class State(NamedTuple):
    params: dict  # updates: how many were made; peak: the count with the highest return


def init(system, key):
    peak = jax.random.randint(key, (), 1, U * K).astype(jnp.float32)
    return State({"updates": jnp.float32(0), "peak": peak})


def train_chunk(system, state):
    number = state.params["updates"] + 1 + jnp.arange(U)
    bad = jnp.where(number == state.params["peak"], jnp.nan, 0.0)
    updates = state.params["updates"] + U + (bad.sum() if system.nan == "parameters" else 0)
    metrics = {
        "loss/policy": number + (bad if system.nan == "loss/policy" else 0),
        "rollout/episode_return": jnp.where(number % 2 == 0, number, jnp.nan),
        "rollout/episodes": (number % 2 == 0).astype(jnp.float32),
    }
    return State(state.params | {"updates": updates}), metrics


def act(system, params, carry, observation, key, greedy):
    score = -jnp.abs(params["updates"] - params["peak"])
    return jnp.full((*observation.step_count.shape, N), score, jnp.int32), carry


SYSTEM = SimpleNamespace(
    make=lambda config, env: config,
    init=init,
    train_chunk=train_chunk,
    policy_params=lambda state: state.params,  # the very buffers that the next chunk takes
    initial_carry=lambda system, batch_shape: (),
    act=act,
)


@pytest.fixture(autouse=True)
def _leave_jax_as_it_is(tmp_path, monkeypatch):
    names = [
        "jax_compilation_cache_dir",
        "jax_default_matmul_precision",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_platforms",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def config(tmp_path):
    return RunConfig(
        system="fake",
        env=EnvConfig("test/count", {"walls": 2}),
        algorithm=Algorithm(),
        seeds=SEEDS,
        seeds_per_batch=None,
        total_steps=U * K * 12 + 7,
        num_envs=4,
        rollout_length=3,
        num_evaluations=K,
        eval_episodes=3,
        absolute_metric=True,
        budget="paper",
        tuned=False,
        precision="float32",
        platform="auto",
        logger=LoggerConfig(True, True, False, False, None, ()),
        results_dir=str(tmp_path / "results"),
        keep=2,
        resume=None,
        allow_changes=(),
        distributed=DistributedConfig(None, None, None),
    )


def run(config, **changes):
    return experiment.run(SYSTEM, dataclasses.replace(config, **changes), Count())


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def expected_returns(peak):
    """The true return after every chunk, for a seed with this peak."""
    return np.array([-LENGTH * abs(chunk * U - peak) for chunk in range(K + 1)])
