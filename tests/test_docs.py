"""The README against the code: metrics, commands, systems."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import jax
import pytest

from magpo import config, experiment, plugins
from magpo.systems import __main__ as systems_table

README = (Path(__file__).parents[1] / "README.md").read_text()


def title(name):
    """The heading of a system: its name, in whatever case and with hyphens."""
    (found,) = re.findall(rf"^### {name.replace('_', '-')}$", README, re.M | re.I)
    return found


def section(title):
    """The text below a heading, to the next one of its level or above."""
    hashes, _, _ = title.partition(" ")
    after = README.split(f"\n{title}\n")[1]
    return re.split(rf"\n#{{1,{len(hashes)}}} ", after)[0]


@pytest.mark.parametrize("name", plugins.systems())
def test_the_readme_explains_every_metric(name):
    module = import_module(f"magpo.systems.{name}")
    settings = config.load(name, ["env=smax/3m"])  # where agents can stop
    env = experiment.make_env(settings)
    setup = experiment.make_setup(module, env, settings)
    state = jax.eval_shape(lambda key: module.init(setup, env, key), jax.random.key(0))
    _, metrics = jax.eval_shape(lambda state: module.train_chunk(setup, env, state), state)
    system = section(title(name))
    explained = re.findall(r"`((?:loss|policy|gpae)/\w+)`", system)
    shared = section("## Systems").partition("\n### ")[0]
    explained += re.findall(r"`((?:rollout|policy|value)/\w+)`", shared)
    named = {metric for metric in metrics if not metric.startswith("grad_norm/")}
    assert sorted(explained) == sorted(named - {"rollout/win_rate"})
    assert "`grad_norm/<network>`" in shared
    networks = {metric.partition("/")[2] for metric in set(metrics) - named}
    assert networks and all(f"`{network}`" in shared for network in networks)


def test_the_readmes_table_of_systems_is_the_codes(capsys):
    systems_table.main(markdown=True)
    assert capsys.readouterr().out in README


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"^python -m (magpo\.systems\.\S+ .*env=.*)$", README, re.M)))
)
def test_the_readmes_commands_are_accepted(command):
    module, *overrides = shlex.split(command, comments=True)
    if "--multirun" in overrides:  # its jobs: each value of the sweep by itself
        overrides = [text.partition(",")[0] for text in overrides if not re.match("--|hydra", text)]
    config.load(module.rpartition(".")[2], overrides)
