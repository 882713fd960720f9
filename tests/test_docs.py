"""The README against the code: metrics, commands, tasks."""

import re
import shlex
from pathlib import Path

import jax
import pytest

import magpo.envs
from magpo import config
from magpo.systems import magpo as system

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readme_explains_every_metric_that_magpo_emits():
    settings = config.load("magpo", ["env=coordsum/3x10-30"])
    built = system.make(settings.algorithm, magpo.envs.make("coordsum/3x10-30"))
    state = jax.eval_shape(lambda key: system.init(built, key), jax.random.key(0))
    _, metrics = jax.eval_shape(lambda state: system.train_chunk(built, state), state)
    explained = re.findall(r"`((?:loss|policy|rollout)/\w+)`", README)
    assert sorted(explained) == sorted(metrics)


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"^python -m (magpo\.systems\.\S+ .*env=.*)$", README, re.M)))
)
def test_the_readmes_commands_are_accepted(command):
    module, *overrides = shlex.split(command, comments=True)
    if "--multirun" in overrides:  # its jobs: each value of the sweep by itself
        overrides = [text.partition(",")[0] for text in overrides if not re.match("--|hydra", text)]
    config.load(module.rpartition(".")[2], overrides)
