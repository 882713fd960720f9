"""The README and the documentation against the code: metrics, commands, tables, examples."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

from magpo import config, experiment, plugins
from magpo.envs import registry
from magpo.evaluate import evaluate
from magpo.systems import __main__ as systems_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs/systems").glob("*.md"))}
TASKS = {path.stem: path.read_text() for path in sorted((ROOT / "docs/tasks").glob("*.md"))}
TASK = "lbf/2s-8x8-2p-2f-coop"
SMALL = [
    *("env.time_limit=9", "num_envs=4", "rollout_length=12", "total_steps=96", "eval_episodes=2"),
    *("num_evaluations=2", "network.actor.hidden_dim=8", "network.critic.hidden_dim=8"),
    *("tuned=false", "absolute_metric=false", "logger.plot=false"),
]


def section(page, title):
    """Return the text below a heading, up to the next one of its level or above."""
    hashes, _, _ = title.partition(" ")
    after = page.split(f"\n{title}\n")[1]
    return re.split(rf"\n#{{1,{len(hashes)}}} ", after)[0]


def test_every_system_has_a_page():
    assert set(PAGES) == {"index", *plugins.systems()}


@pytest.mark.parametrize("name", plugins.systems())
def test_the_pages_explain_every_metric(name):
    module = import_module(f"magpo.systems.{name}")
    settings = config.load(name, ["env=smax/3m"])  # its agents can stop
    env = experiment.make_env(settings)
    setup = experiment.make_setup(module, env, settings)
    state = jax.eval_shape(lambda key: module.init(setup, env, key), jax.random.key(0))
    _, metrics = jax.eval_shape(lambda state: module.train_chunk(setup, env, state), state)
    system, shared = (section(PAGES[page], "## Metrics") for page in (name, "index"))
    if "policy/approx_kl" not in metrics:
        shared = shared.partition("### Metrics of PPO")[0]
    explained = re.findall(r"`((?:loss|policy|value|gpae)/\w+)`", system)
    explained += re.findall(r"`((?:rollout|policy|value)/\w+)`", shared)
    named = {metric for metric in metrics if not metric.startswith("grad_norm/")}
    assert sorted(explained) == sorted(named - {"rollout/win_rate"})
    assert "`grad_norm/<network>`" in shared
    networks = {metric.partition("/")[2] for metric in set(metrics) - named}
    assert networks and all(f"`{network}`" in shared for network in networks)


def test_the_table_of_systems_matches_the_code(capsys):
    systems_table.main(markdown=True)
    assert capsys.readouterr().out in PAGES["index"]


@pytest.mark.parametrize("suite", registry.SUITES)
def test_the_pages_explain_every_option(suite):
    options = OmegaConf.load(ROOT / f"configs/env/{suite}.yaml")
    rows = re.findall(r"^\| `env\.(\w+)` \| ([^|]+) \|", section(TASKS[suite], "## Options"), re.M)
    assert [name for name, _ in rows] == list(options)
    for name, default in rows:
        value = "the task's" if OmegaConf.is_missing(options, name) else str(options[name])
        assert default.partition(";")[0].strip("`").lower() == value.lower()


def test_the_speed_page_matches_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    speed_page = import_module("speed_page")
    page = speed_page.PAGE.read_text()
    assert page.count("<!-- table: ") == len(speed_page.TABLES)
    assert speed_page.filled(page) == page


COMMAND = re.compile(r"^python -m (magpo\.systems\.\S+ .*env=.*)$", re.M)


@pytest.mark.parametrize(
    "command", sorted(set(COMMAND.findall("\n".join([README, *PAGES.values(), *TASKS.values()]))))
)
def test_the_commands_are_accepted(command):
    module, *overrides = shlex.split(command, comments=True)
    if "--multirun" in overrides:  # check the first job of the sweep
        overrides = [text.partition(",")[0] for text in overrides if not re.match("--|hydra", text)]
    config.load(module.rpartition(".")[2], overrides)


def execute(block, names):
    """Run a page's block of Python briefly, on a task that compiles fast."""
    block = block.replace(TASK, "coordsum/3x10-30")
    exec(block.replace('"budget=quick"', ", ".join(map(repr, SMALL))), names)
    return names


def leaves(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (whole,) = re.findall(r"```python\n(.*?)```", section(README, "## Pure functions"), re.S)
    found = execute(whole, {})
    folder = experiment.run(found["system"], found["run"]).folder
    assert folder.resolve().is_relative_to(tmp_path)

    page = (ROOT / "docs/examples.md").read_text()
    training, rates, episode = re.findall(r"```python\n(.*?)```", page, re.S)
    assert '"budget=quick"' in training and TASK in episode
    found = execute(training, {})
    setup, env, system = found["setup"], found["env"], found["system"]
    start = jax.jit(lambda key: system.init(setup, env, key))(jax.random.key(0))
    trained = leaves(system.policy_params(found["state"]))
    assert not np.array_equal(trained[-1], leaves(system.policy_params(start))[-1])
    assert found["metrics"]["rollout/episode_return"].shape == (setup.config.updates_per_chunk,)

    found = execute(rates, found)
    kernels = leaves(system.policy_params(found["states"]))[-1]
    assert len(np.unique(kernels.reshape(4, -1), axis=0)) == 4  # one for each learning rate

    found = execute(episode, {"folder": folder})
    returns, policy = np.asarray(found["returns"]), found["policy"]
    args = policy.algorithm, policy.setup, found["env"], policy.params, jax.random.key(1), 320
    expected = np.asarray(jax.jit(evaluate, static_argnums=(0, 1, 2, 5))(*args)["episode_return"])
    assert returns.shape == (320,) and returns.std() > 0
    error = np.hypot(returns.std(), expected.std()) / np.sqrt(320)
    assert abs(returns.mean() - expected.mean()) < 4 * error
