"""Composition, typed checks, and bad input: one line, the nearest match, exit code 2."""

import dataclasses
import importlib.util
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from omegaconf import OmegaConf

from magpo import config, contract, envs, errors, files, plugins, published
from magpo.config import cli, schema
from magpo.config.compose import load
from magpo.envs import registry
from magpo.errors import ConfigError
from magpo.values import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

TINY = "env=rware/tiny-4ag"
TUNED_FOLDER = files.configs() / "tuned_values"
TUNED = sorted(TUNED_FOLDER.rglob("*.yaml"))
SUITES = [f"env/{suite}" for suite in registry.SUITES]


@contract.hyperparameters
class Hyper:
    lr: PositiveFloat
    num_minibatches: PositiveInt
    ent_coef: NonNegativeFloat
    gamma: Fraction
    kind: Literal["left", "right"]
    bound: PositiveFloat | None
    share: bool


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    width: PositiveInt


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    learner: LearnerConfig
    relu: bool


@dataclasses.dataclass(frozen=True)
class Config:
    num_envs: PositiveInt
    rollout_length: PositiveInt
    updates_per_chunk: PositiveInt
    hyper: Hyper
    network: NetworkConfig
    needs_global_state = False

    def __post_init__(self):
        if self.num_envs % self.hyper.num_minibatches:
            raise ValueError(
                f"system.num_minibatches must divide num_envs={self.num_envs}, "
                f"not {self.hyper.num_minibatches}"
            )
        if self.hyper.lr > 99:
            raise ValueError("system.lr above 99 never learns")


YAML = """
rollout_length: 128
num_envs: 3  # the budget's wins
system: {lr: 0.1, num_minibatches: 2, ent_coef: 0, gamma: 0.9, kind: left, bound: 2, share: true}
network:
  learner: {width: 7}
  relu: true
"""
TUNED_YAML = """
num_envs: 32
system: {lr: 0.5, gamma: 0.8}
"""


@pytest.fixture
def mine(tmp_path) -> types.ModuleType:
    """Make a user's own system: a module, its YAML and a tuned task in one folder."""
    module = types.ModuleType("mine")
    module.__file__ = str(tmp_path / "mine.py")
    module.Config = Config
    for name in ("CARD", "make", "init", "train_chunk", "policy_params", "initial_carry", "act"):
        setattr(module, name, None)
    (tmp_path / "mine.yaml").write_text(YAML)
    (tmp_path / "tuned_values/mine/rware").mkdir(parents=True)
    (tmp_path / "tuned_values/mine/rware/tiny-4ag.yaml").write_text(TUNED_YAML)
    return module


def run_command_line(monkeypatch, system: Any, *arguments: str) -> list[config.RunConfig]:
    runs: list[config.RunConfig] = []
    monkeypatch.setattr(sys, "argv", ["mine.py", *arguments])
    cli.main(system, lambda module, run: runs.append(run))
    return runs


# Composition


def test_later_sources_win(mine):
    run = load(mine, [TINY, "system.gamma=0.7"])
    assert run.num_envs == 32  # tuned, over 128 of the budget, over 3 of the system
    assert run.algorithm.hyper.lr == 0.5  # tuned, over the system's
    assert run.algorithm.hyper.gamma == 0.7  # the command line, over tuned
    assert run.algorithm.hyper.kind == "left"  # the system's
    assert run.eval_episodes == 32  # experiment.yaml's


def test_tuned_values_can_be_turned_off(mine):
    assert load(mine, [TINY]).tuned
    assert load(mine, [TINY, "tuned=true"]).tuned
    assert load(mine, [TINY, "+tuned=false"]) == load(mine, [TINY, "tuned=false"])
    run = load(mine, [TINY, "tuned=false"])
    assert not run.tuned
    assert run.algorithm.hyper.lr == 0.1
    assert run.num_envs == 128


@pytest.mark.parametrize("suite", registry.SUITES)
def test_published_sets_the_released_options(mine, suite):
    task = next(row.task for row in published.rows() if row.task.startswith(suite))
    changed = yaml.safe_load((files.configs() / "published.yaml").read_text())[suite]
    run = load(mine, [f"env={task}", "published=true"])
    assert run.published and not load(mine, [f"env={task}"]).published
    assert run.env.options == registry.options(task) | changed
    assert all(value == "released" for value in changed.values())
    if changed:
        option, other = next(iter(changed)), registry.options(task)[next(iter(changed))]
        own = load(mine, [f"env={task}", "published=true", f"env.{option}={other}"])
        assert own.env.options[option] == other  # the command line comes later


def test_a_task_without_tuned_values_uses_the_systems_values(mine):
    run = load(mine, ["env=rware/tiny-2ag"])
    assert not run.tuned
    assert run.algorithm.hyper.lr == 0.1


@pytest.mark.parametrize("task", envs.tasks())
def test_env_options_come_from_the_task(mine, task):
    run = load(mine, [f"env={task}"])
    assert run.env == schema.EnvConfig(task, envs.options(task))


def test_env_option_is_overridden(mine):
    assert load(mine, [TINY, "env.time_limit=7"]).env.options["time_limit"] == 7


def test_budgets_set_the_steps(mine):
    paper = load(mine, [TINY, "tuned=false"])
    assert (paper.budget, paper.num_updates, paper.trained_steps) == ("paper", 1220, 19_988_480)
    assert (paper.num_evaluations, paper.updates_per_chunk) == (122, 10)
    quick = load(mine, [TINY, "tuned=false", "budget=quick"])
    assert quick.budget == "quick"
    assert quick.trained_steps == quick.total_steps < paper.total_steps


def test_steps_are_rounded_down_to_whole_chunks(mine):
    sizes = ["num_envs=6", "rollout_length=5", "num_evaluations=4"]
    run = load(mine, [TINY, *sizes, "total_steps=599"])
    assert (run.steps_per_update, run.updates_per_chunk, run.steps_per_chunk) == (30, 4, 120)
    assert (run.num_updates, run.trained_steps, run.total_steps) == (16, 480, 599)
    assert run.algorithm.updates_per_chunk == 4
    assert (run.algorithm.num_envs, run.algorithm.rollout_length) == (6, 5)


def test_whole_numbers_may_be_written_with_an_exponent(mine):
    assert load(mine, [TINY, "total_steps=2e7"]).total_steps == 20_000_000


def test_loading_does_not_depend_on_the_working_directory(mine, monkeypatch, tmp_path):
    here = load(mine, [TINY])
    monkeypatch.chdir(tmp_path)
    assert load(mine, [TINY]) == here


def test_a_systems_folder_can_add_config_files(mine, tmp_path):
    (tmp_path / "budget").mkdir()
    (tmp_path / "budget/tiny.yaml").write_text(
        "# @package _global_\ntotal_steps: 4096\nnum_envs: 8\nnum_evaluations: 2\n"
    )
    assert load(mine, [TINY, "tuned=false", "budget=tiny"]).trained_steps == 4096


def test_a_folder_without_a_system_can_add_config_files(tmp_path):
    (tmp_path / "logger").mkdir()
    (tmp_path / "logger/silent.yaml").write_text("console: false\n")
    silent = load("magpo", [TINY, "logger=silent"], tmp_path).logger
    assert silent == dataclasses.replace(load("magpo", [TINY]).logger, console=False)


def test_config_dataclasses_have_no_defaults():
    for cls in (config.RunConfig, schema.EnvConfig, schema.LoggerConfig):
        for field in dataclasses.fields(cls):
            assert field.default is field.default_factory is dataclasses.MISSING, field.name


def test_varied_values_become_members(mine):
    run = load(mine, [TINY, "vary.system.lr=[1,0.25]", "vary.system.bound=[null,3]", "seeds=[4,2]"])
    assert run.vary == {"system.lr": (1.0, 0.25), "system.bound": (None, 3.0)}
    assert len(run.settings) == 4 and len(run.members) == 8
    assert run.members[2] == (4, {"system.lr": 1.0, "system.bound": 3.0})
    assert all(type(member.setting["system.lr"]) is float for member in run.members)
    assert run.algorithm_of(run.settings[1]).hyper.bound == 3.0
    assert config.dump(run)["vary"] == {"system": {"lr": [1.0, 0.25], "bound": [None, 3.0]}}
    for spelling in ("+vary.", "++vary.", "vary."):
        assert load(mine, [TINY, f"{spelling}system.lr=[1,2]"]).vary == {"system.lr": (1.0, 2.0)}
    whole = load(mine, [TINY, "vary={system: {lr: [1,2]}}"])
    assert whole.vary == {"system.lr": (1.0, 2.0)}
    assert load(mine, [TINY]).vary == {}
    steps = ["vary_in_step=true", "vary.system.lr=[1,1]", "vary.system.bound=[null,3]"]
    run = load(mine, [TINY, *steps])
    assert [tuple(setting.values()) for setting in run.settings] == [(1.0, None), (1.0, 3.0)]
    assert config.dump(run)["vary_in_step"] is True
    assert "vary_in_step" not in config.dump(load(mine, [TINY]))


def test_a_config_file_can_set_varied_values(mine, tmp_path):
    (tmp_path / "budget").mkdir()
    text = (files.configs() / "budget/quick.yaml").read_text()
    (tmp_path / "budget/wide.yaml").write_text(f"{text}\nvary: {{system: {{lr: [1, 2]}}}}\n")
    run = load(mine, [TINY, "budget=wide", "vary.system.gamma=[0.5]"])
    assert run.vary == {"system.lr": (1.0, 2.0), "system.gamma": (0.5,)}


def test_a_module_that_is_not_a_system_gives_a_one_line_error(mine, monkeypatch, capsys):
    del mine.act
    with pytest.raises(SystemExit) as stop:
        run_command_line(monkeypatch, mine, TINY)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: mine.py is not a system: it lacks act;") and err.count("\n") == 1


# The library's own files


@pytest.mark.parametrize("system", plugins.systems())
@pytest.mark.parametrize("task", envs.tasks())
def test_every_system_composes_with_every_task(system, task):
    run = load(system, [f"env={task}", "budget=quick"])
    assert (run.system, run.env.name, run.budget) == (system, task, "quick")
    suite = task.split("/")[0]
    assert run.tuned == any(
        (TUNED_FOLDER / system / f"{name}.yaml").is_file() for name in (task, suite)
    )


@pytest.mark.parametrize("system", plugins.systems())
def test_every_system_has_its_papers_budget(system):
    gpae = dict.fromkeys(["gpae_mappo", "dae", "coma"], 610)
    updates = (gpae | {"vdn": 4880, "qmix": 4880}).get(system, 1220)
    assert load(system, ["env=rware/tiny-4ag"]).num_updates == updates
    assert load(system, ["env=rware/tiny-4ag", "budget=paper"]).num_updates == 1220


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key in node for k, v in leaves(node[key], f"{prefix}.{key}").items()}


@pytest.mark.parametrize("path", TUNED, ids=lambda path: str(path.relative_to(TUNED_FOLDER))[:-5])
def test_tuned_values_are_valid(path):
    tuned, name = yaml.safe_load(path.read_text()), path.relative_to(TUNED_FOLDER).parts[0]
    yamls = [*(files.configs() / "budget").glob("*.yaml"), files.configs() / f"{name}.yaml"]
    known = {key for file in yamls for key in leaves(yaml.safe_load(file.read_text()))}
    assert path.read_text().startswith("# ")
    assert leaves(tuned).keys() <= known
    values = [f"{key[1:]}={value}" for key, value in leaves(tuned).items()]
    run = load(name, ["env=coordsum/3x10-30", "tuned=false", *values])
    used = leaves(config.dump(run))
    assert {key: used[key] for key in leaves(tuned)} == leaves(tuned)


def test_there_are_tuned_values_for_the_papers_tasks():
    papers = {row.task for row in published.rows() if row.paper == "magpo"}
    assert len(papers) == 43
    of = defaultdict(set)
    for path in TUNED:
        system, _, names = path.relative_to(TUNED_FOLDER).as_posix()[:-5].partition("/")
        of[system].add(names)
    assert of["magpo"] == of["happo"] == of["sable"] == of["ctds"] == papers
    coordsum = {task for task in papers if task.startswith("coordsum")}
    assert of["mappo"] == of["mat"] == coordsum
    assert of["gpae_mappo"] == of["dae"] == of["coma"] == {"mabrax"}


def test_tuned_values_are_what_the_script_writes():
    script = Path(__file__).parents[1] / "scripts/tuned_from_csv.py"
    spec = importlib.util.spec_from_file_location("tuned_from_csv", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = module.texts(module.TABLE)
    committed = {path.relative_to(TUNED_FOLDER).as_posix(): path.read_text() for path in TUNED}
    assert texts == {name: committed[name] for name in texts}
    by_hand = {f"{system}/mabrax.yaml" for system in ("gpae_mappo", "dae", "coma")}
    assert committed.keys() - texts.keys() == by_hand


def test_tuned_values_spot_checks():
    root = TUNED_FOLDER / "magpo"
    rware = yaml.safe_load((root / "rware/tiny-4ag.yaml").read_text())
    assert rware["system"]["rl_coef"] == 8
    assert rware["network"]["guider"]["n_block"] == 3
    smax = yaml.safe_load((root / "smax/6h_vs_8z.yaml").read_text())
    assert smax["system"] == {
        "actor_lr": 0.001,
        "ppo_epochs": 10,
        "num_minibatches": 1,
        "clip_eps": 0.1,
        "ent_coef": 0.001,
        "max_grad_norm": 0.5,
        "delta": 1.5,
        "rl_coef": 4,
    }


@pytest.mark.parametrize("name", ["experiment", "magpo", "budget/paper", "logger/default", *SUITES])
def test_every_value_has_a_comment(name):
    for line in (files.configs() / f"{name}.yaml").read_text().splitlines():
        key, _, value = line.partition(":")
        if (value.split("#")[0].strip() and not key.startswith((" ", "#"))) or ": " in line.strip():
            assert "#" in line or line.startswith("  - "), line


# Bad input

BAD = {
    "no_task": ([], "env=<suite>/<task>"),
    "unknown_task": (["env=rware/tiny4ag"], "rware/tiny-4ag"),
    "unknown_suite": (["env=smac/3m"], "coordsum/"),
    "task_without_suite": (["env=tiny-4ag"], "rware/tiny-4ag"),
    "task_is_not_a_name": (["env=3"], "coordsum/"),
    "unknown_budget": ([TINY, "budget=quik"], "'quick'"),
    "unknown_logger": ([TINY, "logger=defalt"], "'default'"),
    "misspelt_key": ([TINY, "system.gama=0.5"], "'system.gamma'"),
    "misspelt_group": ([TINY, "systm.lr=0.5"], "'system.lr'"),
    "in_another_group": ([TINY, "system.seed=1"], "'seeds'"),
    "forgotten_group": ([TINY, "width=3"], "'network.learner.width'"),
    "misspelt_top_level_key": ([TINY, "num_env=8"], "'num_envs'"),
    "misspelt_choice": ([TINY, "budgett=quick"], "'budget'"),
    "misspelt_env_option": ([TINY, "env.timelimit=9"], "'env.time_limit'"),
    "added_env_option": ([TINY, "+env.timelimit=9"], "'env.time_limit'"),
    "added_key": ([TINY, "+system.lrr=0.5"], "'system.lr'"),
    "added_top_level_key": ([TINY, "+num_env=0.5"], "'num_envs'"),
    "removed_key": ([TINY, "~system.lr"], "a key cannot be removed"),
    "removed_task": ([TINY, "~env"], "a key cannot be removed"),
    "word_for_a_number": ([TINY, "system.lr=high"], "system.lr must be a valid number"),
    "text_for_a_number": ([TINY, "system.lr='0.1'"], "system.lr must be a valid number"),
    "fraction_for_a_whole_number": ([TINY, "num_envs=2.5"], "num_envs must be a valid integer"),
    "bool_for_a_whole_number": ([TINY, "num_envs=true"], "num_envs must be a valid integer"),
    "number_for_a_bool": ([TINY, "network.relu=1"], "network.relu must be a valid boolean"),
    "nothing_for_a_number": ([TINY, "system.lr=null"], "system.lr must be a valid number"),
    "value_for_a_group": ([TINY, "network.learner=3"], "'network.learner.width'"),
    "unknown_choice": ([TINY, "system.kind=lef"], "'left'"),
    "unknown_precision": ([TINY, "precision=float64"], "'bfloat16'"),
    "unknown_platform": ([TINY, "platform=cuda"], "'gpu'"),
    "not_positive": ([TINY, "system.lr=0"], "greater than 0"),
    "negative": ([TINY, "system.ent_coef=-0.1"], "greater than or equal to 0"),
    "above_one": ([TINY, "system.gamma=1.01"], "less than or equal to 1"),
    "nan": ([TINY, "system.lr=nan"], "finite"),
    "infinite": ([TINY, "system.lr=inf"], "finite"),
    "misspelt_varied_key": ([TINY, "vary.system.gama=[0.5]"], "vary.system.gama: only floats"),
    "varied_without_its_group": ([TINY, "vary.gamma=[0.5]"], "vary.gamma: only floats"),
    "varied_count": (
        [TINY, "vary.system.num_minibatches=[1,2]"],
        "vary.system.num_minibatches: only floats can vary: lr, ent_coef, gamma, bound",
    ),
    "varied_choice": ([TINY, "vary.system.kind=[left,right]"], "vary.system.kind: only floats"),
    "varied_bool": ([TINY, "vary.system.share=[true,false]"], "vary.system.share: only floats"),
    "varied_size": ([TINY, "vary.network.learner.width=[1,2]"], "width: only floats can vary"),
    "varied_seeds": ([TINY, "vary.seeds=[1,2]"], "vary.seeds: only floats"),
    "varied_group": ([TINY, "vary.system=[1,2]"], "vary.system: only floats"),
    "varied_not_a_list": (
        [TINY, "vary.system.lr=0.5"],
        "vary.system.lr must be a list, such as [0.5]",
    ),
    "varied_empty_list": (
        [TINY, "vary.system.lr=[]"],
        "vary.system.lr must be one or more different",
    ),
    "varied_duplicate": (
        [TINY, "vary.system.lr=[1,2,1.0]"],
        "different values, not [1.0, 2.0, 1.0]",
    ),
    "varied_null": ([TINY, "vary.system.lr=[1,null]"], "vary: system.lr must be a valid number"),
    "varied_word": ([TINY, "vary.system.lr=[1,a]"], "vary.system.lr.1 must be a valid number"),
    "varied_out_of_range": (
        [TINY, "vary.system.gamma=[0.9,1.01]"],
        "error: vary: system.gamma must be less than or equal to 1, not 1.01",
    ),
    "varied_nan": ([TINY, "vary.system.lr=[nan]"], "vary: system.lr must be a finite number"),
    "varied_fails_the_check": (
        [TINY, "vary.system.lr=[1,100]"],
        "error: vary: system.lr above 99 never",
    ),
    "in_step_unequal_lengths": (
        [TINY, "vary_in_step=true", "vary.system.lr=[1,2]", "vary.system.gamma=[0.5]"],
        "vary_in_step: keys must have equally many values",
    ),
    "in_step_duplicate": (
        [TINY, "vary_in_step=true", "vary.system.lr=[1,1]", "vary.system.gamma=[0.5,0.5]"],
        "two settings are the same",
    ),
    "vary_is_not_a_group": ([TINY, "vary=3"], "vary"),
    "varied_sweep": ([TINY, "vary.system.lr=1,2"], "--multirun"),
    "does_not_divide": ([TINY, "num_envs=9"], "must divide num_envs=9, not 2"),
    "one_seed_without_brackets": ([TINY, "seeds=3"], "seeds must be a list, such as [3], not 3"),
    "no_seeds": ([TINY, "seeds=[]"], "seeds must be one or more"),
    "duplicate_seed": ([TINY, "seeds=[4,5,4]"], "different"),
    "negative_seed": ([TINY, "seeds=[4,-1]"], "seeds.1 must be greater"),
    "seed_too_large": ([TINY, "seeds=[4294967296]"], "less than 4294967296"),
    "too_few_steps": ([TINY, "total_steps=90000"], "at least 499712 or num_evaluations at most 21"),
    "no_update": ([TINY, "total_steps=4095"], "at least 499712, not 4095"),
    "too_many_steps": ([TINY, "total_steps=1e300"], "less than 1000000000000000, not 1e+300"),
    "too_many_updates": ([TINY, "tuned=false", "total_steps=1e14"], "must be below 35184372088832"),
    "update_too_large": ([TINY, "num_envs=2147483646"], "must be below 2147483648, not 274"),
    "unfinished_list": ([TINY, "seeds=[0"], "key=[0,1]"),
    "no_value": ([TINY, "seeds"], "write key=value"),
    "sweep": ([TINY, "system.lr=0.1,0.2"], "--multirun"),
    "unknown_interpolation": ([TINY, "results_dir=${nowhere}"], "nowhere"),
    "tuned_is_not_a_bool": ([TINY, "tuned=maybe"], "true or false"),
    "published_is_not_a_bool": ([TINY, "published=1"], "published must be true or false"),
    "unpublished_task": (["env=smax/3m", "published=true"], "did you mean 'smax/3s5z'"),
    "added_tuned_is_not_a_bool": ([TINY, "+tuned=maybe"], "true or false"),
    "group_of_another_package": ([TINY, "tuned@x=false"], "write tuned=<value>"),
    "hydras_group": ([TINY, "hydra=3"], "unknown key 'hydra'"),
    "no_key": ([TINY, "=3"], "unknown key ''"),
    "key_of_a_saved_run": ([TINY, "+run.system=mappo"], "unknown key 'run.system'"),
    "resume_is_a_number": (["resume=3"], "a run's folder or auto"),
    "resume_is_a_list": (["resume=[a]"], "a run's folder or auto"),
    "resume_too_long": (["resume=" + 5000 * "a"], "no run there"),
    "added_resume": ([TINY, "++resume=/nowhere"], "no run there"),
    "number_too_long": ([TINY, "total_steps=" + 5000 * "9"], "cannot read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_a_one_line_error(mine, name, monkeypatch, capsys):
    overrides, expected = BAD[name]
    with pytest.raises(SystemExit) as stop:
        run_command_line(monkeypatch, mine, *overrides)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_the_end_of_a_key_is_enough_for_a_suggestion():
    assert "'system.actor_lr'" in errors.nearest("lr", ["logger", "system.actor_lr"])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("system.gamma.x=3", "did you mean 'system.gamma'"),
        ("run=3", "unknown key 'run'"),
        ("vary.system.gama=[1]", "vary.system.gama: only floats"),
        ("vary.system.gamma=[2]", "vary: system.gamma must be less than or equal to 1, not 2"),
        ("vary.system.kind=[left]", "vary.system.kind: only floats"),
        ("vary.system.gamma.x=[1]", "vary.system.gamma.x: only floats"),
        ("~vary.system.gamma", "a key cannot be removed"),
        ("run.system=mappo", "unknown key 'run.system'"),
        ("--multirun", "resume=auto"),
    ],
)
def test_bad_input_with_resume_gives_a_one_line_error(
    mine, argument, expected, monkeypatch, capsys, tmp_path
):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.dump(load(mine, [TINY]))))
    with pytest.raises(SystemExit) as stop:
        run_command_line(monkeypatch, mine, argument, f"resume={tmp_path}")
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert expected in err


def test_an_unknown_system_is_refused():
    with pytest.raises(ConfigError, match="unknown system 'nobody'"):
        load("nobody", [TINY])


def test_a_system_without_a_yaml_is_refused(mine, tmp_path):
    (tmp_path / "mine.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no mine\.yaml in"):
        load(mine, [TINY])


def test_a_config_error_during_the_run_is_printed(mine, monkeypatch, capsys):
    def run(*_):
        raise ConfigError("results_dir=/proc: cannot write there")

    monkeypatch.setattr(sys, "argv", ["mine.py", TINY])
    with pytest.raises(SystemExit) as stop:
        cli.main(mine, run)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: results_dir=/proc: cannot write there\n"


def test_other_errors_keep_their_traceback(mine, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mine.py", TINY])
    with pytest.raises(ZeroDivisionError):
        cli.main(mine, lambda *_: 1 // 0)


# The command line


def test_help_lists_the_keys(mine, monkeypatch, capsys):
    run_command_line(monkeypatch, mine, "--help")
    out = capsys.readouterr().out
    for expected in (
        "env=<suite>/<task>",
        "tiny-4ag",
        "budget: gpae | jaxmarl | paper | quick",
        "eval_episodes: 32",
    ):
        assert expected in out
    assert "defaults:" not in out
    assert "@package" not in out
    assert "env.num_agents" not in out


def test_help_of_a_task_has_its_options_with_their_comments(mine, monkeypatch, capsys):
    run_command_line(monkeypatch, mine, "--help", TINY)
    title, *lines = capsys.readouterr().out.rstrip().splitlines()[-8:]
    assert title == "options of rware/tiny-4ag"
    options = dict(line.split("#")[0].strip().split("=") for line in lines)
    assert options == {f"env.{k}": str(v) for k, v in registry.options("rware/tiny-4ag").items()}
    assert all(line.partition("#")[2].strip() for line in lines)
    assert "  env.column_height=8       # cells, the height of a block, >= 1" in lines


def test_help_of_a_registered_task_has_its_options(mine, monkeypatch, capsys):
    monkeypatch.setitem(registry.registered, "ring/walk", (None, {"size": 3, "name": "a b"}))
    run_command_line(monkeypatch, mine, "env=ring/walk", "--help")
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-3:] == ["options of ring/walk", "  env.size=3", "  env.name=a b"]


def test_help_of_an_unknown_task_gives_a_one_line_error(mine, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command_line(monkeypatch, mine, "--help", "env=rware/tiny-4a")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert "did you mean 'rware/tiny-4ag'" in err


@pytest.mark.parametrize("flags", [[], ["--cfg", "job"], ["--multirun"]])
def test_only_a_sweep_leaves_a_record_behind(mine, flags, monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    run_command_line(monkeypatch, mine, *flags, TINY)
    left = [path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file()]
    if "--multirun" in flags:
        assert [(parts[:2], parts[3:]) for parts in left] == [
            (("results", "sweeps"), ("multirun.yaml",))
        ]
    else:
        assert left == []
    assert Path.cwd() == folder


def test_cfg_prints_the_composed_configuration(mine, monkeypatch, capsys):
    run_command_line(monkeypatch, mine, "--cfg", "job", TINY, "tuned=false")
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.system.lr == 0.1
    assert printed.env == envs.options("rware/tiny-4ag")


def test_multirun_sweeps_over_lists_of_varied_values(mine, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runs = run_command_line(
        monkeypatch, mine, "-m", TINY, "vary.system.lr=[1,2],[3]", "seeds=[0],[1]"
    )
    found = [(run.vary["system.lr"], run.seeds) for run in runs]
    assert found == [((1, 2), (0,)), ((1, 2), (1,)), ((3,), (0,)), ((3,), (1,))]


def test_a_tilde_in_results_dir_is_expanded(mine, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (run,) = run_command_line(monkeypatch, mine, "-m", TINY, "results_dir='~/results'", "keep=3")
    assert run.results_dir == str(tmp_path / "home/results")
    assert (tmp_path / "home/results/sweeps").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("override", ["env.time_limit=5", "env.num_agents=3"])
def test_multirun_loads_every_combination(mine, override, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "-m",
        "env=rware/tiny-4ag,lbf/8x8-2p-2f-coop",
        "system.gamma=0.1,0.2",
        "tuned=false",
        override,
    ]
    runs = run_command_line(monkeypatch, mine, *arguments)
    assert [(run.env.name.split("/")[0], run.algorithm.hyper.gamma) for run in runs] == [
        ("rware", 0.1),
        ("rware", 0.2),
        ("lbf", 0.1),
        ("lbf", 0.2),
    ]
    assert not any(run.tuned for run in runs)
    assert runs[1] == load(mine, [TINY, "system.gamma=0.2", "tuned=false", override])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--multirun", TINY, "system.gamma=0.1,1.2"], "less than or equal to 1, not 1.2"),
        (["--multirun", TINY, "system.gama=0.1,0.2"], "'system.gamma'"),
        (["--multirun", TINY, "vary.system.gamma=[0.1],[2]"], "vary: system.gamma must be less"),
        (["--cfg", "job", TINY, "vary.system.gama=[0.1]"], "vary.system.gama: only"),
        (["--multirun", TINY, "system.gamma=interval(0,1)"], "sweep"),
        (["--multirun", TINY, "tuned=true,2"], "true or false"),
        (["--cfg", "job", "env=rware/tiny4ag"], "rware/tiny-4ag"),
        (["--config-name", "other", TINY], "--help"),
        (["--multirn", TINY], "--multirn"),
    ],
)
def test_bad_input_with_flags_gives_a_one_line_error(
    mine, arguments, expected, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_command_line(monkeypatch, mine, *arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""  # no job of the sweep has started, not even the valid first one
    assert err.count("\n") == 1
    assert expected in err


SCRIPT = """
import sys
from dataclasses import dataclass
from magpo import contract, values
from magpo.config import cli

CARD = make = init = train_chunk = policy_params = initial_carry = act = None

@contract.hyperparameters
class Part:
    {fields}

@dataclass(frozen=True)
class Config:
    num_envs: values.PositiveInt
    rollout_length: values.PositiveInt
    updates_per_chunk: values.PositiveInt
    hyper: Part
    network: Part
    needs_global_state = False

def report(module, run):
    print(run.system, run.algorithm.hyper.a)

if __name__ == "__main__":
    cli.main(sys.modules["__main__"], report)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        ([TINY], 0, "own 3\n", ""),
        ([TINY, "system.a=0"], 2, "", "error: system.a must be greater than 0, not 0\n"),
        (["-m", TINY, "system.b=1"], 2, "", "error: unknown key 'system.b'"),
    ],
)
def test_a_users_system_runs_as_a_script(arguments, code, out, err, tmp_path):
    (tmp_path / "own.py").write_text(SCRIPT.format(fields="a: values.PositiveInt"))
    system = "rollout_length: 128\n" + "system: {a: 3}\nnetwork: {a: 5}\n"
    (tmp_path / "own.yaml").write_text(system)
    done = subprocess.run(
        [sys.executable, "own.py", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(config.__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(err)
    assert done.stderr.count("\n") == (1 if err else 0)


def test_the_wheel_finds_its_own_configs(monkeypatch, tmp_path):
    package = tmp_path / "magpo"
    (package / "configs").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    assert files.configs() == (package / "configs").resolve()
    (package / "configs").rmdir()
    assert files.configs() == (tmp_path / "configs").resolve()
