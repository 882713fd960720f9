"""Every system in an experiment: run, resumed, loaded, and deployed agent by agent if it can be."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import magpo
from magpo import config, experiment, export
from magpo.contract import Deployed, Parameters, as_data
from magpo.errors import ConfigError
from magpo.runs import checkpoint, policy
from magpo.types import Observation, spec
from systems import cases

TASK, N, B = "coordsum/3x10-30", 3, 2  # the task that compiles fastest


@pytest.fixture(scope="module", params=cases.SYSTEMS)
def run(request, tmp_path_factory):
    """Run a system briefly; return its name, its module and the run's folder."""
    results = f"results_dir={tmp_path_factory.mktemp('runs')}"
    overrides = [*cases.short_run(request.param, TASK), "env.observation=scaled", results]
    module = cases.build(request.param).module
    result = experiment.run(module, config.load(request.param, overrides))
    return request.param, module, result.folder


def records(folder):
    """Return all records without wall-clock times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: x for key, x in line.items() if key != "wall_s"}
        for line in lines
        if not line["name"].startswith("time/")
    ]


def test_a_resumed_run_is_bitwise_identical(run, tmp_path):
    _, module, folder = run
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    checkpoints = sorted((copy / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    experiment.run(module, config.load(module.__name__.split(".")[-1], [f"resume={copy}"]))
    assert records(copy) == records(folder)
    before, after = policy.read(folder), policy.read(copy)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_a_member_trained_alone_gets_the_same_parameters(run):
    """Train one seed with its own hyperparameters, which the run holds as data."""
    _, module, folder = run
    settings, place = policy.read(folder).config, 5
    seed, setting = settings.members[place]
    env = experiment.make_env(settings)
    setup = module.make(settings.algorithm_of(setting), spec(env))
    inputs = experiment.member_inputs(settings)
    # A key whose type has the run's mesh would make the second chunk compile again.
    key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(inputs.train_keys[place])))
    state = cases.jitted(module.init)(setup, env, key)
    state = state._replace(hyper=as_data(setup.config.hyper))
    for _ in range(2):
        state, metrics = cases.jitted(module.train_chunk)(setup, env, state)
    (newest, _) = checkpoint.checkpoints(folder / "checkpoints")
    among = checkpoint.load_named(newest, checkpoint.read_meta(newest), "state")
    alone = checkpoint._named(state.params)
    assert {f"params.{name}" for name in alone} <= among.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(value, among[f"params.{name}"][place], atol=5e-4)
    last = [r for r in records(folder) if r["name"][:5] == "loss/" and r["env_steps"] == 96]

    def losses(seed, setting):
        own = (r for r in last if r["seed"] == seed and setting.items() <= r.items())
        return {r["name"]: r["value"] for r in own}

    expected = losses(seed, setting)["loss/value"]
    np.testing.assert_allclose(metrics["loss/value"][0], expected, atol=5e-4)
    assert len({tuple(losses(*member).values()) for member in settings.members}) == 8


def observation_of(env):
    rng = np.random.default_rng(0)
    views = rng.normal(size=(B, N, env.num_features)).astype(np.float32)
    mask = jnp.ones((B, N, env.action_dim), bool)
    return Observation(jnp.asarray(views), mask, jnp.zeros(B, jnp.int32))


def test_the_deployed_policy_matches_the_card(run):
    """Check that a decentralised policy acts for one agent alone and a joint one refuses."""
    _, module, folder = run
    together, key = magpo.load_policy(folder, seed=2), jax.random.key(0)
    observation = observation_of(together.env)
    carry = together.initial_carry((B,))
    for _ in range(2):  # the second step remembers the first
        actions, carry = together.act(carry, observation, key, greedy=True)
    if module.CARD.deployed is Deployed.JOINT:
        with pytest.raises(ConfigError, match="acts for all agents at once"):
            magpo.load_policy(folder, agent=1)
        return
    for agent in range(N):
        alone = magpo.load_policy(folder, seed=2, agent=agent)
        own = observation._replace(
            agents_view=observation.agents_view[:, agent],
            action_mask=observation.action_mask[:, agent],
        )
        carry = alone.initial_carry((B,))
        for _ in range(2):
            action, carry = alone.act(carry, own, key, greedy=True)
        np.testing.assert_array_equal(action, actions[:, agent])
    data, description = export.export(alone)
    assert len(data) > 1000 and description["task"] == TASK


def test_agents_share_parameters_where_the_card_says_so(run):
    _, module, folder = run
    trained = policy.read(folder)
    leaves = jax.tree.leaves(jax.tree.map(lambda x: x[0], trained.params))
    stacked = all(leaf.shape[0] == N for leaf in leaves)
    assert stacked == (module.CARD.parameters is Parameters.PER_AGENT)
    if not stacked:
        return
    with pytest.raises(ConfigError, match=r"the policy is for 3 agents, each .* has 5 agents"):
        policy.make_env(trained, "coordsum/5x20-80", {})
