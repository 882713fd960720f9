import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from magpo import commands, envs, files, published
from magpo.envs import __main__ as tasks_table
from magpo.envs import registry
from magpo.types import action_spec, spec

ROOT = Path(__file__).parents[2]

# num_agents, features without the agent id, num_actions, time_limit
TASKS = {
    "connector/con-5x5x3a": (3, 54, 5, 25),
    "connector/con-7x7x5a": (5, 54, 5, 49),
    "connector/con-10x10x10a": (10, 54, 5, 100),
    "connector/con-15x15x23a": (23, 54, 5, 225),
    "mabrax/ant-4x2": (4, 18, 2, 1000),
    "mabrax/ant-8x1": (8, 17, 1, 1000),
    "mabrax/halfcheetah-6x1": (6, 9, 1, 1000),
    "mabrax/hopper-3x1": (3, 9, 1, 1000),
    "mabrax/humanoid-9-8": (2, 248, 9, 1000),
    "mabrax/walker2d-6x1": (6, 7, 1, 1000),
    "mpe/simple_spread_3ag": (3, 18, 5, 26),
    "mpe/simple_spread_5ag": (5, 30, 5, 26),
    "mpe/simple_spread_10ag": (10, 60, 5, 26),
    "smax/2s3z": (5, 127, 10, 101),
    "smax/3s5z": (8, 205, 13, 101),
    "smax/3s5z_vs_3s6z": (8, 218, 14, 101),
    "smax/3s_vs_5z": (3, 101, 10, 101),
    "smax/6h_vs_8z": (6, 179, 13, 101),
    "smax/5m_vs_6m": (5, 140, 11, 101),
    "smax/10m_vs_11m": (10, 270, 16, 101),
    "smax/27m_vs_30m": (27, 738, 35, 101),
    "smax/smacv2_5_units": (5, 127, 10, 101),
    "smax/smacv2_10_units": (10, 257, 15, 101),
    "smax/3m": (3, 75, 8, 101),
    "smax/1s1z": (2, 49, 7, 101),
    "coordsum/3x10-30": (3, 2, 10, 100),
    "coordsum/3x30-50": (3, 2, 30, 100),
    "coordsum/5x20-80": (5, 2, 20, 100),
    "coordsum/8x15-100": (8, 2, 15, 100),
    "lbf/10x10-3p-3f": (3, 18, 6, 100),
    "lbf/15x15-3p-5f": (3, 24, 6, 100),
    "lbf/15x15-4p-3f": (4, 21, 6, 100),
    "lbf/15x15-4p-5f": (4, 27, 6, 100),
    "lbf/2s-10x10-3p-3f": (3, 18, 6, 100),
    "lbf/2s-8x8-2p-2f-coop": (2, 12, 6, 100),
    "lbf/8x8-2p-2f-coop": (2, 12, 6, 100),
    "rware/large-4ag": (4, 66, 5, 500),
    "rware/large-4ag-hard": (4, 66, 5, 500),
    "rware/large-8ag": (8, 66, 5, 500),
    "rware/large-8ag-hard": (8, 66, 5, 500),
    "rware/medium-4ag": (4, 66, 5, 500),
    "rware/medium-4ag-hard": (4, 66, 5, 500),
    "rware/medium-6ag": (6, 66, 5, 500),
    "rware/small-4ag": (4, 66, 5, 500),
    "rware/small-4ag-hard": (4, 66, 5, 500),
    "rware/tiny-2ag": (2, 66, 5, 500),
    "rware/tiny-2ag-hard": (2, 66, 5, 500),
    "rware/tiny-4ag": (4, 66, 5, 500),
    "rware/tiny-4ag-hard": (4, 66, 5, 500),
    "rware/xlarge-4ag": (4, 66, 5, 500),
    "rware/xlarge-4ag-hard": (4, 66, 5, 500),
}
# grid (height, width), shelves, requested shelves
WAREHOUSES = {
    "rware/tiny-2ag": ((11, 10), 32, 2),
    "rware/tiny-2ag-hard": ((11, 10), 32, 1),
    "rware/tiny-4ag": ((11, 10), 32, 4),
    "rware/tiny-4ag-hard": ((11, 10), 32, 2),
    "rware/small-4ag": ((20, 10), 80, 4),
    "rware/small-4ag-hard": ((20, 10), 80, 2),
    "rware/medium-4ag": ((20, 16), 144, 4),
    "rware/medium-4ag-hard": ((20, 16), 144, 2),
    "rware/medium-6ag": ((20, 16), 144, 6),
    "rware/large-4ag": ((29, 16), 224, 4),
    "rware/large-4ag-hard": ((29, 16), 224, 2),
    "rware/large-8ag": ((29, 16), 224, 8),
    "rware/large-8ag-hard": ((29, 16), 224, 4),
    "rware/xlarge-4ag": ((38, 16), 304, 4),
    "rware/xlarge-4ag-hard": ((38, 16), 304, 2),
}
# grid, field of view, food, forced cooperation
BOARDS = {
    "lbf/8x8-2p-2f-coop": (8, 8, 2, True),
    "lbf/2s-8x8-2p-2f-coop": (8, 2, 2, True),
    "lbf/10x10-3p-3f": (10, 10, 3, False),
    "lbf/2s-10x10-3p-3f": (10, 2, 3, False),
    "lbf/15x15-3p-5f": (15, 15, 5, False),
    "lbf/15x15-4p-3f": (15, 15, 3, False),
    "lbf/15x15-4p-5f": (15, 15, 5, False),
}


@cache
def made(task):
    return registry.make(task)


def test_tasks_are_those_of_the_papers_and_two_more():
    papers = {row.task for row in published.rows()}
    assert len(papers) == 49
    assert sorted(envs.tasks()) == sorted(TASKS) == sorted(papers | {"smax/3m", "smax/1s1z"})


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_the_listed_sizes(task):
    num_agents, num_features, num_actions, time_limit = TASKS[task]
    env = made(task)
    assert (env.name, env.num_agents, env.time_limit) == (task, num_agents, time_limit)
    continuous = task.startswith(("mabrax/", "mpe/"))
    assert (env.action_dim, env.action_kind == "continuous") == (num_actions, continuous)
    assert action_spec(env).shape == ((num_agents, num_actions) if continuous else (num_agents,))
    found = spec(env)
    assert (found.num_features, found.num_state_features) == (num_agents + num_features, None)
    assert env.truncates != task.startswith(("coordsum/", "rware/"))
    won = task.startswith(("connector/", "smax/"))
    assert env.headline == ("win_rate" if won else "episode_return")


@pytest.mark.parametrize("task", WAREHOUSES)
def test_warehouses_have_the_listed_sizes(task):
    simulator = made(task).simulator
    built = simulator.grid_size, len(simulator.shelf_ids), simulator.request_queue_size
    assert built == WAREHOUSES[task]


@pytest.mark.parametrize("task", BOARDS)
def test_lbf_boards_have_the_listed_sizes(task):
    simulator = made(task).simulator
    generator = simulator._generator
    assert (generator.grid_size, generator.fov, generator.num_food) == BOARDS[task][:3]
    assert generator.force_coop is BOARDS[task][3]
    assert (generator.max_agent_level, simulator.normalize_reward, simulator.penalty) == (
        2,
        True,
        0,
    )


def test_options_come_from_the_file_and_overrides_replace_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the files are found from any folder
    assert envs.options("coordsum/3x10-30") == {
        "num_agents": 3,
        "num_actions": 10,
        "max_target": 30,
        "time_limit": 100,
        "opponent_history": "per_target",
        "observation": "raw",
    }
    env = envs.make("coordsum/3x10-30", num_agents=5, time_limit=7)
    assert (env.num_agents, env.time_limit, env.max_target) == (5, 7, 30)


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_file_lists_only_what_differs_from_its_suite(task):
    root = ROOT / "configs" / "env"
    suite = yaml.safe_load((root / f"{task.partition('/')[0]}.yaml").read_text())
    own = yaml.safe_load((root / f"{task}.yaml").read_text())
    required = {option for option, value in suite.items() if value == "???"}
    assert required <= own.keys() <= suite.keys()
    assert not own.items() & suite.items()
    assert list(envs.options(task).items()) == list((suite | own).items())


def test_a_task_without_a_required_value_gives_a_one_line_error(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs" / "env", tmp_path / "env")
    (tmp_path / "env" / "lbf" / "9x9.yaml").write_text("grid_size: 9\nfov: 9\n")
    monkeypatch.setattr(files, "configs", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"^lbf/9x9\.yaml must .* for num_agents, num_food$"):
        envs.options("lbf/9x9")


def test_two_environments_of_a_task_are_equal():
    """Check that jit need not compile again for a second object."""
    first, second = envs.make("lbf/10x10-3p-3f"), envs.make("lbf/10x10-3p-3f")
    assert first == second
    assert hash(first) == hash(second)
    assert first != envs.make("lbf/10x10-3p-3f", fov=3)


def test_the_global_state_is_added_on_request():
    env = envs.make("rware/tiny-4ag", global_state=True)
    assert spec(env).num_state_features == 4 * 66


@pytest.mark.parametrize(
    ("task", "overrides", "parts"),
    [
        ("rwar/tiny-4ag", {}, ["'rwar/tiny-4ag'", "did you mean 'rware/tiny-4ag'", "lbf/..."]),
        ("rware/tiny-4a", {}, ["did you mean 'rware/tiny-4ag'", "rware/xlarge-4ag-hard"]),
        ("coordsum", {}, ["'coordsum'", "coordsum/3x10-30"]),
        ("../env/rware/tiny-4ag", {}, ["unknown task"]),
        ("rware/tiny-4ag", {"num_agent": 3}, ["'num_agent'", "'num_agents'", "time_limit"]),
        ("rware/tiny-4ag", {"num_agents": 0}, ["rware/tiny-4ag: num_agents", "least 1", "not 0"]),
        ("rware/tiny-4ag", {"num_agents": "4"}, ["num_agents must be of type int, not '4'"]),
        ("rware/tiny-4ag", {"num_agents": 2.0}, ["num_agents must be of type int, not 2.0"]),
        ("rware/tiny-4ag", {"num_agents": True}, ["num_agents must be of type int, not True"]),
        ("rware/tiny-4ag", {"num_agents": 111}, ["num_agents must be at most 110"]),
        ("rware/tiny-4ag", {"shelf_columns": 4}, ["shelf_columns must be odd, not 4"]),
        ("rware/tiny-4ag", {"request_queue_size": 32}, ["request_queue_size must be at most 31"]),
        ("rware/tiny-4ag", {"sensor_range": 0}, ["sensor_range must be at least 1"]),
        ("coordsum/3x10-30", {"opponent_history": "release"}, ["did you mean 'released'"]),
        ("coordsum/3x10-30", {"observation": "grid"}, ["observation", "raw, scaled, one_hot"]),
        ("coordsum/3x10-30", {"max_target": 0}, ["max_target must be at least 1, not 0"]),
        ("coordsum/3x10-30", {"time_limit": 0}, ["time_limit must be at least 1, not 0"]),
        ("lbf/8x8-2p-2f-coop", {"grid_size": 4}, ["grid_size must be at least 5"]),
        ("lbf/8x8-2p-2f-coop", {"fov": 9}, ["fov must be at most 8 where grid_size is 8, not 9"]),
        (
            "lbf/8x8-2p-2f-coop",
            {"num_food": 7},
            ["num_food must be at most 6 where grid_size is 8, not 7"],
        ),
        (
            "lbf/8x8-2p-2f-coop",
            {"grid_size": 5, "fov": 5},
            ["num_food must be at most 1 where grid_size is 5"],
        ),
        ("lbf/8x8-2p-2f-coop", {"penalty": -0.1}, ["penalty must be at least 0, not -0.1"]),
        ("lbf/8x8-2p-2f-coop", {"penalty": float("nan")}, ["penalty must be finite, not nan"]),
        ("lbf/8x8-2p-2f-coop", {"ends": "realeased"}, ["did you mean 'released'"]),
        ("lbf/8x8-2p-2f-coop", {"time_limit": 2**31}, ["time_limit must be at most 2147483647"]),
        (
            "lbf/8x8-2p-2f-coop",
            {"grid_size": 5, "fov": 5, "num_agents": 4},
            ["num_agents must be at most 3 where grid_size is 5, not 4"],
        ),
        ("coordsum/3x10-30", {"num_agents": 10**9}, ["num_agents must be at most 10000"]),
        ("rware/tiny-4ag", {"shelf_columns": 1}, ["shelf_columns must be at least 3, not 1"]),
        (
            "connector/con-5x5x3a",
            {"num_agents": 9},
            ["num_agents must be at most 3 where grid_size is 5, not 9"],
        ),
        ("connector/con-5x5x3a", {"grid_size": 2}, ["grid_size must be at least 3, not 2"]),
        ("connector/con-5x5x3a", {"num_agents": 0}, ["num_agents must be at least 1, not 0"]),
        ("mpe/simple_spread_3ag", {"local_ratio": 1.5}, ["local_ratio must be at most 1"]),
        ("mpe/simple_spread_3ag", {"num_agents": 1}, ["num_agents must be at least 2"]),
        ("smax/3m", {"scenario": "5m_vs_6"}, ["did you mean '5m_vs_6m'"]),
        ("smax/3m", {"attack_mode": "nearest"}, ["closest, random"]),
        ("mabrax/ant-4x2", {"split": "ant_2x4"}, ["unknown split of mabrax/ant-4x2 'ant_2x4'"]),
        ("mabrax/ant-4x2", {"backend": "mjc"}, ["did you mean 'mjx'"]),
        ("mabrax/ant-4x2", {"mapping": "correct"}, ["did you mean 'corrected'"]),
    ],
)
def test_bad_requests_give_a_one_line_error(task, overrides, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        envs.make(task, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_an_integer_is_accepted_for_a_float():
    assert envs.make("lbf/8x8-2p-2f-coop", penalty=1).penalty == 1


MISSING = "mabrax needs brax, which is not installed: pip install 'magpo[mabrax]'"


def test_a_missing_library_error_says_how_to_install_it():
    code = "import sys; sys.modules['brax'] = None; from magpo import commands, envs\n"
    code += "envs.make('mpe/simple_spread_3ag'); envs.make('mabrax/ant-4x2')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1] == f"magpo.errors.ConfigError: {MISSING}"
    )


def test_the_table_leaves_out_suites_that_are_not_installed(monkeypatch, capsys):
    def make(task):
        if task.startswith("mabrax/"):
            raise ValueError(MISSING)
        return made(task)

    monkeypatch.setattr(envs, "make", make)
    tasks_table.main()
    out, err = capsys.readouterr()
    assert "smax/3m" in out and "mabrax" not in out
    assert err.splitlines() == [f"left out: {MISSING}"]


def test_the_docs_page_contains_the_commands_table(monkeypatch, capsys):
    monkeypatch.setattr(envs, "make", made)
    monkeypatch.setattr(sys, "argv", ["magpo.envs", "--markdown"])
    commands.run(tasks_table.__doc__, tasks_table.main)
    table = capsys.readouterr().out
    assert table in (ROOT / "docs/tasks/index.md").read_text()
    assert len(table.splitlines()) == 2 + len(envs.tasks())


def test_help_makes_no_environment(monkeypatch, capsys):
    monkeypatch.setattr(envs, "make", None)
    monkeypatch.setattr(sys, "argv", ["magpo.envs", "--help"])
    commands.run(tasks_table.__doc__, tasks_table.main)
    assert "--markdown" in capsys.readouterr().out


def test_only_the_chosen_suites_library_is_imported():
    code = "import sys; from magpo import envs; envs.make('coordsum/3x10-30'); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "magpo.envs.coordsum" in modules.stdout.split()
    assert "jumanji" not in modules.stdout.split()
