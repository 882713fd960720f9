"""Trained policies: loaded, played and exported, even where libraries are missing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from signing import sign

import magpo
from magpo import commands, config, evaluate, experiment, export, render
from magpo.errors import ConfigError
from magpo.runs import checkpoint, policy
from magpo.types import Observation

TASK = "coordsum/3x10-30"
N, O, A, B = 3, 5, 10, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train two seeds, long enough that the best policy is not the first."""
    overrides = [f"env={TASK}", "tuned=false", "seeds=[7,2]", "num_envs=4", "rollout_length=16"]
    overrides += ["total_steps=128", "num_evaluations=2", "eval_episodes=2", "env.time_limit=9"]
    overrides += ["network.guider.embed_dim=8", "network.learner.hidden_dim=8", "logger.plot=false"]
    overrides += ["absolute_metric=false", f"results_dir={tmp_path_factory.mktemp('results')}"]
    from magpo.systems import magpo as system

    return experiment.run(system, config.load("magpo", overrides)).folder


@pytest.fixture(scope="module")
def observation():
    rng = np.random.default_rng(0)
    mask = rng.random((B, N, A)) < 0.5
    mask[..., 0] = True
    views = rng.normal(size=(B, N, O)).astype(np.float32)
    return Observation(jnp.asarray(views), jnp.asarray(mask), jnp.zeros(B, jnp.int32))


def test_the_trained_config_comes_from_the_checkpoint_not_config_yaml(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    text = (copy / "config.yaml").read_text()
    edited = text.replace("hidden_dim: 8", "hidden_dim: 16").replace("- 7\n", "- 5\n- 7\n")
    assert edited.count("\n") > text.count("\n")
    (copy / "config.yaml").write_text(edited)
    assert policy.read(copy).config == policy.read(folder).config


def falsify(path, change):
    """Change a checkpoint's contents and sign it again."""
    meta = json.loads((path / "meta.json").read_text())
    record = checkpoint.load_named(path, meta, "record")
    change(meta, record)
    shutil.rmtree(path / "record")
    with checkpoint._checkpointer() as checkpointer:
        checkpointer.save(path / "record", record)
    meta["arrays"]["record"] = {n: checkpoint._describe(array) for n, array in record.items()}
    (path / "meta.json").write_text(json.dumps(meta))
    sign(path)


def convert_params(convert):
    """Return a function that converts the first best parameter; None removes it."""

    def change(meta, record):
        name = next(name for name in record if name.startswith("best.params."))
        record[name] = convert(record[name])
        if record[name] is None:
            del record[name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (convert_params(lambda x: x * np.nan), "out of range"),
        (convert_params(np.float64), "not 32 bits for each of 2 members"),
        (convert_params(lambda x: x[:1]), "not 32 bits for each of 2 members"),
        (convert_params(lambda x: np.concatenate([x, x], -1)), "its policies cannot act"),
        (convert_params(lambda x: None), "its policies cannot act"),
        (lambda meta, record: record.pop("best.score"), "its policies cannot act"),
        (lambda meta, record: record.update({"best.score": np.full(2, np.nan)}), "not 32 bits"),
        (lambda meta, record: record.update({"best.chunk": np.int32([1, 9])}), "out of range"),
        (lambda meta, record: record.update({"best.chunk": np.int32([[1], [1]])}), "not 32 bits"),
        (lambda meta, record: meta["env"].update(num_agents=4), "is not of 4 agents x 10"),
        (lambda meta, record: meta["env"].update(num_agents="3"), "env.num_agents must be"),
        (lambda meta, record: meta["config"].update(seeds=[7]), "for each of 1 members"),
        (lambda meta, record: meta["config"].pop("network"), "network is missing"),
        (lambda meta, record: meta.pop("config"), "config is missing"),
    ],
)
def test_a_wrong_checkpoint_is_reported_and_the_previous_one_used(
    folder, tmp_path, capsys, change, message
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    newest, before = checkpoint.checkpoints(copy / "checkpoints")
    falsify(newest, change)
    np.testing.assert_array_less(policy.read(copy).chunk, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {newest}: ") and message in line
    shutil.rmtree(before)
    with pytest.raises(ConfigError, match=f"no checkpoint can be used: {newest}: .*{message}"):
        policy.read(copy)


def for_agent(observation, agent):
    return observation._replace(
        agents_view=observation.agents_view[:, agent],
        action_mask=observation.action_mask[:, agent],
    )


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_loaded_policy_acts_like_the_system_with_the_best_parameters(folder, observation):
    loaded = magpo.load_policy(folder, seed=2)
    trained = policy.read(folder)
    params = jax.tree.map(lambda x: x[1], trained.params)
    setup, key = loaded.setup, jax.random.key(0)
    carry = trained.algorithm.initial_carry(setup, (B,)) + 0.3
    for greedy in (True, False):
        expected = trained.algorithm.act(setup, params, carry, observation, key, greedy)
        action, after = loaded.act(carry, observation, key, greedy)
        np.testing.assert_array_equal(action, expected[0])
        np.testing.assert_allclose(after, expected[1], atol=1e-6)
    best = magpo.load_policy(folder).params
    at = trained.best(trained.places())
    assert trained.score[at] == trained.score.max()
    jax.tree.map(np.testing.assert_array_equal, best, jax.tree.map(lambda x: x[at], trained.params))


def test_an_agent_alone_acts_as_it_does_in_the_team(folder, observation):
    together, key = magpo.load_policy(folder), jax.random.key(0)
    actions, carry = together.act(together.initial_carry((B,)), observation, key, greedy=True)
    for agent in range(N):
        alone = magpo.load_policy(folder, agent=agent)
        before = alone.initial_carry((B,))
        action, after = alone.act(before, for_agent(observation, agent), key, greedy=True)
        np.testing.assert_array_equal(action, actions[:, agent])
        np.testing.assert_allclose(after, carry[:, agent], atol=1e-6)


@pytest.mark.parametrize("batch_shape", [(), (2, 2)])
@pytest.mark.parametrize("agent", [None, 1])
def test_policies_accept_any_batch_shape(folder, observation, batch_shape, agent):
    loaded = magpo.load_policy(folder, agent=agent)
    given = observation if agent is None else for_agent(observation, agent)
    key = jax.random.key(0)
    flat, _ = loaded.act(loaded.initial_carry((B,)), given, key, greedy=True)
    shaped = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), given)
    shaped = shaped if batch_shape else jax.tree.map(lambda x: x[0, 0], shaped)
    action, _ = loaded.act(loaded.initial_carry(batch_shape), shaped, key, greedy=True)
    np.testing.assert_array_equal(action.reshape(-1), flat.reshape(-1)[: action.size])


def test_loading_needs_no_environment(folder):
    code = """if 1:
        import sys
        for name in ("jumanji", "jaxmarl", "magpo.envs.coordsum"):
            sys.modules[name] = None
        import jax, jax.numpy as jnp, magpo
        from magpo.types import Observation
        policy = magpo.load_policy(sys.argv[1])
        view, mask = jnp.ones((3, 5)), jnp.ones((3, 10), bool)
        observation = Observation(view, mask, jnp.int32(0))
        action, _ = policy.act(policy.initial_carry(), observation, jax.random.key(0))
        print(action.shape)
    """
    assert run_python(code, folder) == "(3,)\n"


def test_an_exported_policy_runs_with_jax_alone(folder, observation, tmp_path):
    loaded = magpo.load_policy(folder, agent=0)
    data, description = export.export(loaded)
    (tmp_path / "policy.stablehlo").write_bytes(data)
    given = for_agent(observation, 0)
    carry = loaded.initial_carry((B,)) + 0.3
    np.savez(tmp_path / "inputs", carry=carry, view=given.agents_view, mask=given.action_mask)
    code = """if 1:
        import sys
        for name in ("magpo", "flax", "jumanji"):
            sys.modules[name] = None
        import jax.export, json, numpy as np
        folder = sys.argv[1]
        policy = jax.export.deserialize(bytearray(open(folder + "/policy.stablehlo", "rb").read()))
        x = np.load(folder + "/inputs.npz")
        out = {}
        for size in (1, 4):
            for greedy in (True, False):
                action, carry = policy.call(
                    x["carry"][:size], x["view"][:size], x["mask"][:size],
                    np.zeros(size, np.int32), np.array([1, 2], np.uint32), np.bool_(greedy))
                out[f"{size} {greedy}"] = action.tolist(), carry.tolist()
        print(json.dumps(out))
    """
    out = json.loads(run_python(code, tmp_path))
    key = jax.random.wrap_key_data(jnp.uint32([1, 2]))
    for size in (1, B):
        part = jax.tree.map(lambda x: x[:size], given)  # noqa: B023
        for greedy in (True, False):
            action, after = loaded.act(carry[:size], part, key, greedy)
            assert out[f"{size} {greedy}"][0] == action.tolist()
            np.testing.assert_allclose(out[f"{size} {greedy}"][1], after, atol=1e-6)
    assert description["inputs"] == {
        "carry_0": "float32[batch,8]",
        "agents_view": f"float32[batch,{O}]",
        "action_mask": f"bool[batch,{A}]",
        "step_count": "int32[batch]",
        "random_bits": "uint32[2]",
        "greedy": "bool[]",
    }
    assert description["outputs"] == {"action": "int32[batch]", "carry_0": "float32[batch,8]"}


def call(monkeypatch, capsys, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    code = 0
    try:
        commands.run(module.__doc__, module.main)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_the_guides_programs_run(folder, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/guides/deploy.md").read_text()
    load, choose, exported = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(load, names := {"folder": folder})
    assert names["action"].shape == (32, N)
    member = 'seed=1, setting={"system.actor_lr": 1e-4}'
    assert member in choose
    exec(choose.replace(member, "seed=2"), names)
    assert names["policy"].member.seed == 2 and names["action"].shape == ()
    monkeypatch.chdir(tmp_path)
    export.main(run=folder, out="exported")
    exec(exported, names := {})
    assert names["action"].shape == (2,) and names["step"] == 2


def test_export_writes_the_policy_and_its_description(folder, monkeypatch, capsys, tmp_path):
    arguments = [f"run={folder}", f"out={tmp_path / 'out'}", "seed=7"]
    assert call(monkeypatch, capsys, export, *arguments)[0] == 0
    assert (tmp_path / "out" / "policy.stablehlo").stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "policy.json").read_text())["task"] == TASK


def test_evaluate_plays_every_seed(folder, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, evaluate, f"run={folder}", "episodes=3", "greedy=true")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["7", "2", "mean"]
    assert " 9.000" in out
    arguments = [f"run={folder}", "episodes=3", f"env={TASK}", "env.time_limit=5"]
    assert " 5.000" in call(monkeypatch, capsys, evaluate, *arguments)[1]
    monkeypatch.setattr(evaluate, "BATCH", 2)  # 2 episodes, then 1
    code, out, _ = call(monkeypatch, capsys, evaluate, f"run={folder}", "episodes=3")
    assert code == 0 and " 9.000" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["env=coordsum/5x20-80"], "is for 5 features and 10 discrete actions; coordsum/5x20-80"),
        (["env=coordsum/3x10-3"], "did you mean 'coordsum/3x10-30'"),
        (["env.time_limt=3"], "did you mean 'time_limit'"),
        (["episodes=0"], "episodes must be greater than 0"),
        (["episodes=many"], "episodes must be a valid integer, not 'many'"),
        (["episode=3"], "unknown key 'episode': did you mean 'episodes'"),
    ],
)
def test_bad_input_to_evaluate_gives_a_one_line_error(
    folder, monkeypatch, capsys, arguments, message
):
    code, _, err = call(monkeypatch, capsys, evaluate, f"run={folder}", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("module", [evaluate, export])
def test_bad_folders_give_a_one_line_error(module, monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, module, f"run={tmp_path}")
    assert code == 2 and "no run there" in err and err.count("\n") == 1
    assert "usage" in call(monkeypatch, capsys, module, "--help")[1]
    (tmp_path / "config.yaml").write_text("run: {system: os}")
    code, _, err = call(monkeypatch, capsys, module, f"run={tmp_path}")
    assert code == 2 and "unknown system 'os'" in err


def test_unknown_seeds_and_agents_are_refused(folder):
    with pytest.raises(ConfigError, match=r"seed=1: the run has \[7, 2\]"):
        magpo.load_policy(folder, seed=1)
    with pytest.raises(ConfigError, match=r"agent=3: must be 0 \.\. 2"):
        magpo.load_policy(folder, agent=3)


def test_a_run_without_a_checkpoint_has_no_policy(folder, tmp_path):
    for name in ("config.yaml", "run.json"):
        Path(tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        magpo.load_policy(tmp_path)


@pytest.mark.parametrize("command", [evaluate, export, render])
def test_commands_expand_a_tilde(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["", "run='~/nowhere'"])
    with pytest.raises(SystemExit):
        commands.run(command.__doc__, command.main)
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/nowhere: no run there")
    with pytest.raises(ConfigError, match=f"{tmp_path}/nowhere: no run there"):
        magpo.load_policy("~/nowhere")
