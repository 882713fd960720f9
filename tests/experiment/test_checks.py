"""Mistakes in a fork: a one-line error that names its file, before anything compiles."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiment import counting
from experiment.counting import SYSTEM, K, U, run
from magpo import contract, experiment
from magpo.errors import ConfigError
from magpo.experiment import loop


def one_action(setup, params, carry, observation, key, greedy):
    return jnp.zeros((*carry.shape[:-1], 1), jnp.int32), carry


def float_actions(setup, params, carry, observation, key, greedy):
    return jnp.zeros(carry.shape), carry


def without_carry(setup, params, carry, observation, key, greedy):
    return jnp.zeros(carry.shape, jnp.int32)


def wrong_carry(setup, params, carry, observation, key, greedy):
    return jnp.zeros(carry.shape, jnp.int32), carry[:, :1]


def without_metrics(setup, env, state):
    return state


def changed_dtype(setup, env, state):
    return state._replace(walked=state.walked.astype(jnp.int32)), {"loss/policy": jnp.zeros(U)}


def metrics_per_epoch(setup, env, state):
    return state, {"loss/policy": jnp.zeros((U, 3))}


def uncounted_episodes(setup, env, state):
    return state, {"rollout/episode_return": jnp.zeros(U)}


def no_dictionary(state):
    return state.params, state.hyper


MISTAKES = {
    "one_action": ("act", one_action, r"actions \(B, N\) = int32\[2, 3\], not int32\[2, 1\]"),
    "float_actions": ("act", float_actions, r"not float32\[2, 3\]"),
    "without_carry": ("act", without_carry, "act must return actions and the carry after them"),
    "wrong_carry": ("act", wrong_carry, r"a carry like int32\[2, 3\], not int32\[2, 1\]"),
    "without_metrics": (
        "train_chunk",
        without_metrics,
        "must return the state and a dictionary of metrics",
    ),
    "changed_dtype": ("train_chunk", changed_dtype, "with the shapes and dtypes of init's"),
    "metrics_per_epoch": (
        "train_chunk",
        metrics_per_epoch,
        r"one value for each of 2 updates, not .*2, 3",
    ),
    "uncounted_episodes": ("train_chunk", uncounted_episodes, "needs the metric rollout/episodes"),
    "no_dictionary": (
        "policy_params",
        no_dictionary,
        "policy_params must return nested dictionaries",
    ),
    "unknown_field": (
        "CARD",
        counting.CARD._replace(per_environment=("waked",)),
        r"NamedTuple with waked; it has \['params', 'hyper', 'walked'\]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_systems_return_values_are_checked(config, monkeypatch, name):
    function, wrong, message = MISTAKES[name]
    monkeypatch.setattr(SYSTEM, function, wrong)
    monkeypatch.setattr(loop, "compile_programs", None)
    with pytest.raises(ConfigError, match=rf"^counting\.py: .*{message}") as error:
        run(config)
    assert "\n" not in str(error.value)
    assert not Path(config.results_dir).exists()


@dataclasses.dataclass(frozen=True)
class Misspelt:
    num_env: int
    hyper: counting.Hyper
    needs_global_state = False


@dataclasses.dataclass(frozen=True)
class WithoutHyper:
    num_envs: int
    needs_global_state = False


@dataclasses.dataclass(frozen=True)
class DictHyper:
    hyper: dict
    needs_global_state = False


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (Misspelt, "hyper, network, num_envs, .*; it has num_env"),
        (WithoutHyper, "Config must be a dataclass with `hyper`"),
        (DictHyper, "Config.hyper must be a class made by `hyperparameters`"),
        (dict, "Config must be a dataclass"),
    ],
)
def test_an_invalid_config_class_gives_a_one_line_error(monkeypatch, schema, message):
    monkeypatch.setattr(SYSTEM, "Config", schema)
    with pytest.raises(ConfigError, match=rf"^counting\.py: .*{message}"):
        contract.algorithm(SYSTEM)


def test_a_system_that_reads_the_setups_floats_diverges(config, monkeypatch):
    """Check that the setup's floats, those of the first setting, are hidden as NaN."""
    train_chunk = SYSTEM.train_chunk

    def reads_setup(setup, env, state):
        state, metrics = train_chunk(setup, env, state)
        return state, metrics | {"loss/value": jnp.full(U, setup.hyper.shift, jnp.float32)}

    monkeypatch.setattr(SYSTEM, "train_chunk", reads_setup)
    with pytest.raises(experiment.DivergenceError, match="update 1 of 10, seed 3: loss/value"):
        run(config)


def test_ctrl_c_while_completing_files_loses_none(config, monkeypatch):
    """Press Ctrl-C once after the last evaluation; pressing it again would kill the run."""
    from magpo.report.writer import Writer

    class Thread:
        def __init__(self, thread):
            self.thread, self.pressed = thread, False

        def __getattr__(self, name):
            return getattr(self.thread, name)

        def join(self):
            if not self.pressed:
                self.pressed = True
                raise KeyboardInterrupt
            self.thread.join()

    enter = Writer.__enter__

    def wrapped(self):
        self._thread = Thread(self._thread)
        return enter(self)

    monkeypatch.setattr(Writer, "__enter__", wrapped)
    with pytest.raises(KeyboardInterrupt):
        run(counting.with_plot(config), absolute_metric=False)
    (folder,) = Path(config.results_dir).glob("*/*/*/*")
    steps = {record["env_steps"] for record in counting.records(folder)}
    assert max(steps) == K * config.steps_per_chunk
    assert (folder / "marl_eval.json").exists() and (folder / "learning_curve.png").exists()
    assert np.any([path.name == f"{K:08d}" for path in (folder / "checkpoints").iterdir()])
