"""A system whose parameters count its updates, on a task whose return depends on the count."""

import dataclasses
import json
import sys
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import Field

from magpo import experiment
from magpo.config.schema import (
    DistributedConfig,
    EnvConfig,
    LoggerConfig,
    RunConfig,
)
from magpo.contract import Card, Deployed, Parameters, as_data, hyperparameters
from magpo.envs import registry
from magpo.errors import ConfigError
from magpo.types import Observation, StepType, TimeStep, restart
from magpo.values import NonNegativeFloat, PositiveInt

N, LENGTH, U, K = 3, 2, 2, 5  # agents, steps of an episode, updates per chunk, evaluations
SEEDS = (3, 11, 4)
CARD = Card("nothing", Deployed.EACH_AGENT, "the steps acted", Parameters.SHARED, ("walked",))
SYSTEM = sys.modules[__name__]


class Count:
    """A task whose reward is the action: the return tells which parameters acted."""

    name, num_agents, action_dim, action_kind = "test/count", N, 4, "discrete"
    time_limit, truncates, headline = LENGTH, False, "episode_return"

    def __init__(self, name="test/count", global_state=False, walls=2):
        self.name = name

    def reset(self, key):
        return jnp.int32(0), restart(N, self._observe(0), {})

    def step(self, state, action):
        step_type = jnp.where(state + 1 == LENGTH, StepType.LAST, StepType.MID).astype(jnp.int8)
        reward = action.astype(jnp.float32)
        return state + 1, TimeStep(step_type, reward, jnp.float32(1), self._observe(state + 1), {})

    def _observe(self, state):
        return Observation(jnp.zeros((N, 1)), jnp.ones((N, 4), bool), jnp.int32(state))


@hyperparameters
class Hyper:
    shift: NonNegativeFloat  # delays the peak
    bound: Annotated[float, Field(gt=1)] | None  # actions are at least minus this
    repeats: PositiveInt
    nan: Literal["", "loss/policy", "parameters"]  # becomes NaN at update peak + shift


@dataclasses.dataclass(frozen=True)
class Config:
    num_envs: int
    hyper: Hyper
    updates_per_chunk: int = U
    needs_global_state = False


HYPER = Hyper(shift=0.0, bound=None, repeats=1, nan="")


class State(NamedTuple):
    params: dict  # updates: their number so far; peak: the number with the highest return
    hyper: Hyper
    walked: Any  # (E,) steps


def make(config, spec):
    if config.hyper.shift == 13:
        raise ConfigError(f"system.shift must not be 13 on {spec.name}")
    return config


def init(setup, env, key):
    peak = jax.random.randint(key, (), 1, U * K).astype(jnp.float32)
    learned = {"shift": jnp.float32(0), "bound": jnp.float32(1e9)}
    params = {"updates": jnp.float32(0), "peak": peak, **learned}
    return State(params, as_data(setup.hyper), jnp.zeros(setup.num_envs))


def train_chunk(setup, env, state):
    number = state.params["updates"] + 1 + jnp.arange(setup.updates_per_chunk)
    bad = jnp.where(number == state.params["peak"] + state.hyper.shift, jnp.nan, 0.0)
    kind = state.hyper.nan
    updates = (
        state.params["updates"]
        + setup.updates_per_chunk
        + (bad.sum() if kind == "parameters" else 0)
    )
    metrics = {
        "loss/policy": number + (bad if kind == "loss/policy" else 0),
        "rollout/episode_return": jnp.where(number % 2 == 0, number, jnp.nan),
        "rollout/episodes": (number % 2 == 0).astype(jnp.float32),
    }
    learned = {"shift": state.hyper.shift, "bound": jnp.minimum(state.hyper.bound, 1e9)}
    params = state.params | {"updates": updates, **learned}
    return state._replace(params=params, walked=state.walked + U), metrics


def policy_params(state):
    return state.params  # the same buffers, which are donated to the next chunk


def initial_carry(setup, batch_shape):
    return jnp.zeros((*batch_shape, N), jnp.int32)


def act(setup, params, carry, observation, key, greedy):
    score = -jnp.abs(params["updates"] - params["peak"] - params["shift"])
    score = jnp.maximum(score, -params["bound"])
    return jnp.full((*observation.step_count.shape, N), score, jnp.int32), carry + 1


@pytest.fixture(autouse=True)
def _restore_jax_config(tmp_path, monkeypatch):
    names = [
        "jax_compilation_cache_dir",
        "jax_default_matmul_precision",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_platforms",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(registry.registered, "test/count", (Count, {"walls": 2}))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def config(tmp_path):
    return settings(tmp_path / "results")


def settings(results_dir):
    return RunConfig(
        system="counting",
        env=EnvConfig("test/count", {"walls": 2}),
        algorithm=Config(4, HYPER),
        seeds=SEEDS,
        vary={},
        vary_in_step=False,
        seeds_per_batch=None,
        total_steps=U * K * 12 + 7,
        num_envs=4,
        rollout_length=3,
        num_evaluations=K,
        eval_episodes=3,
        absolute_metric=True,
        budget="paper",
        tuned=False,
        published=False,
        imports={},
        precision="float32",
        platform="auto",
        logger=LoggerConfig(True, False, False, False, None, False, False, ()),
        results_dir=str(results_dir),
        keep=2,
        checkpoint_share=1.0,
        resume=None,
        allow_changes=(),
        distributed=DistributedConfig(None, None, None),
    )


def run(config, **changes):
    config = dataclasses.replace(config, **changes)
    sizes = {name: getattr(config, name) for name in ("num_envs", "updates_per_chunk")}
    config = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, **sizes))
    return experiment.run(SYSTEM, config, Count())


def with_plot(config):
    """Turn on the learning curve, which takes a quarter of a run's time."""
    return dataclasses.replace(config, logger=dataclasses.replace(config.logger, plot=True))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def expected_returns(peak):
    """Return the true return after every chunk, for a seed with this peak."""
    return np.array([-LENGTH * abs(chunk * U - peak) for chunk in range(K + 1)])
