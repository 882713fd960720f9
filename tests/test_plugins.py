"""Users' own systems and tasks, in every command."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import magpo
from magpo import (
    commands,
    config,
    evaluate,
    experiment,
    export,
    files,
    load_policy,
    plugins,
    render,
)
from magpo.envs import registry
from magpo.errors import ConfigError
from magpo.runs import folders, listing

ROOT = Path(__file__).parents[1]
SMALL = [
    *("tuned=false", "num_envs=4", "rollout_length=8", "total_steps=64", "num_evaluations=2"),
    *("eval_episodes=2", "logger.plot=false", "logger.console=false", "absolute_metric=false"),
    "seeds=[0]",
    *("network.actor.hidden_dim=8", "network.critic.hidden_dim=8"),
]
IMPORTS = ["import=rendezvous.py", "import=mine.py"]
REGISTERS = "import magpo.envs\nmagpo.envs.register({task!r}, dict)\n"


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    """Forget every plugin before and after a test, as a new process would."""
    monkeypatch.setattr(plugins, "_plugins", [])
    monkeypatch.setattr(plugins, "_modules", {})
    monkeypatch.setattr(registry, "registered", {})
    monkeypatch.delitem(sys.modules, "rendezvous", raising=False)
    plugins._load_installed.cache_clear()
    yield
    plugins._load_installed.cache_clear()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Work in a folder with the guide's environment and a fork of MAPPO."""
    page = (ROOT / "docs/guides/environment.md").read_text()
    (tmp_path / "rendezvous.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    shutil.copy(Path(magpo.__file__).parent / "systems/mappo.py", tmp_path / "mine.py")
    shutil.copy(files.configs() / "mappo.yaml", tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    commands.run(module.__doc__, module.main)


def forget():
    plugins._plugins.clear()
    plugins._modules.clear()
    registry.registered.clear()


def test_every_command_accepts_a_users_environment_and_system(home, monkeypatch, capsys):
    run = config.load("mine", [*IMPORTS, "env=ring/rendezvous", *SMALL])
    assert list(run.imports) == ["mine.py", "rendezvous.py"]
    folder = experiment.run(plugins.system("mine"), run).folder
    assert re.search(r"^    mine.py: [0-9a-f]{16}$", (folder / "config.yaml").read_text(), re.M)

    forget()
    asked = [f"run={folder}"]
    commands = {
        evaluate: [*asked, "episodes=2"],
        render: [*asked, "out=a.gif", "steps=2"],
        export: asked,
    }
    for module, arguments in commands.items():
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, module, *arguments)
        assert stop.value.code == 2
        assert "needs mine.py, which is not imported: import=<its" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"needs mine\.py"):
        load_policy(folder)
    for module, arguments in commands.items():
        command(monkeypatch, module, *arguments, *IMPORTS)
    assert (home / "a.gif").stat().st_size and (folder / "policy/policy.stablehlo").exists()
    assert "warning" not in capsys.readouterr().err
    assert load_policy(folder).env.name == "ring/rendezvous"
    (listed,) = listing.summaries(home)
    assert (listed.system, listed.task) == ("mine", "ring/rendezvous")
    folders._set_status(folder, "interrupted")
    (stopped,) = listing.summaries(home)
    assert stopped.resume.startswith("python mine.py resume=")
    assert stopped.resume.endswith(" import=rendezvous.py")


def test_a_changed_file_is_reported(home, monkeypatch, capsys):
    run = config.load("mappo", ["import=rendezvous.py", "env=ring/rendezvous", *SMALL])
    folder = experiment.run(plugins.system("mappo"), run).folder
    forget()
    plugins._hash.cache_clear()
    with (home / "rendezvous.py").open("a") as file:
        file.write("\n")
    command(monkeypatch, evaluate, f"run={folder}", "episodes=2", "import=rendezvous.py")
    assert "warning: rendezvous.py has changed" in capsys.readouterr().err
    again = ["import=rendezvous.py", f"resume={folder}"]
    with pytest.raises(ConfigError, match=r"changed settings: run\.imports\.rendezvous\.py: "):
        experiment.run(plugins.system("mappo"), config.load("mappo", again))
    allowed = [*again, "allow_changes=[run.imports.rendezvous.py]"]
    experiment.run(plugins.system("mappo"), config.load("mappo", allowed))
    forget()
    with pytest.raises(ConfigError, match=r"the run needs rendezvous\.py"):
        config.load("mappo", [f"resume={folder}"])


def test_a_run_names_the_module_that_it_imported(home, monkeypatch):
    monkeypatch.syspath_prepend(home)
    run = config.load("mappo", ["import=rendezvous", "env=ring/rendezvous"])
    assert list(run.imports) == ["rendezvous"] and plugins.require(run.imports) == []
    forget()
    with pytest.raises(ConfigError, match=r"needs rendezvous, .*: import=rendezvous$"):
        plugins.require(run.imports)


def test_a_fork_may_have_the_name_of_a_system(home):
    (home / "mine.py").rename(home / "mappo.py")
    plugins.load(["mappo.py"])
    fork, original = plugins.module_of("mappo.py"), plugins.system("mappo")
    assert original.__name__ == "magpo.systems.mappo"
    recorded = plugins.needed_by(fork, "coordsum/3x10-30")
    assert list(recorded) == ["mappo.py"] and plugins.system("mappo", recorded) is fork


def test_the_jobs_of_a_sweep_import_plugins_too(home):
    task, values = "env=ring/rendezvous", "system.gamma=0.9,0.8"
    arguments = ["-m", "magpo.systems.mappo", *IMPORTS, task, *SMALL, values, "--multirun"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [run.status for run in listing.summaries(home)] == ["finished", "finished"]


@pytest.mark.parametrize(
    ("text", "imports", "message"),
    [
        ("raise KeyError(3)", ["a.py"], r"^import=a\.py: KeyError: 3 \(.*a\.py, line 1\)$"),
        ("def (", ["a.py"], r"^import=a\.py: SyntaxError: invalid syntax \(a\.py, line 1\)$"),
        ("", ["a.py"], r"^import=a\.py: registers no task .*; a\.py is not a system: it lacks "),
        ("", ["b.py"], r"^import=b\.py: no such file$"),
        ("", ["nowhere.at_all"], r"^import=nowhere\.at_all: ModuleNotFoundError: No module named"),
        (REGISTERS.format(task="lbf/mine"), ["a.py"], "'lbf/mine': must be <a suite of your own>"),
        (REGISTERS.format(task="own/a") + "1 / 0", ["a.py"], "ZeroDivisionError"),
        (REGISTERS.format(task="own/a"), ["a.py", "c.py"], r"c\.py: .*a\.py has registered own/a"),
    ],
)
def test_an_unusable_import_is_refused(tmp_path, monkeypatch, text, imports, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "c.py"):
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        plugins.load(imports)
    assert [task for p in plugins._plugins for task in p.tasks] == list(registry.registered)


def test_two_systems_with_the_same_name_are_refused(home):
    (home / "other").mkdir()
    shutil.copy(home / "mine.py", home / "other")
    with pytest.raises(ConfigError, match=r"mine\.py is a system of that name already"):
        plugins.load(["mine.py", "other/mine.py"])


@pytest.mark.parametrize("value", ["3", "[3]", "[[a.py]]"])
def test_an_import_must_be_a_name(value):
    with pytest.raises(ConfigError, match="import="):
        config.load("mappo", [f"import={value}", "env=coordsum/3x10-30"])


def install(folder, name, module):
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[magpo.plugins]\nrings = {module}\n")


def test_an_installed_plugin_needs_no_import(home, monkeypatch):
    monkeypatch.syspath_prepend(home)
    install(home, "rings", "rendezvous")
    assert config.load("mappo", ["env=ring/rendezvous"]).env.options["size"] == 7
    forget()
    install(home, "more_rings", "other_rendezvous")
    plugins._load_installed.cache_clear()
    with pytest.raises(ConfigError, match=r"two plugins are named rings: .*other_rendezvous"):
        config.load("mappo", ["env=ring/rendezvous"])
