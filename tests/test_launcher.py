"""Sweeps on clusters, through Hydra's submitit launcher."""

import subprocess
import sys

import pytest
import small
import yaml

from magpo.config import cli
from magpo.runs import listing
from magpo.systems import mappo

SHORT = [
    *small.MAPPO,
    *("total_steps=128", "num_evaluations=2", "eval_episodes=2", "absolute_metric=false"),
]
MODULE = [sys.executable, "-m", "magpo.systems.mappo"]


def test_a_sweep_runs_on_the_launchers_local_executor(tmp_path):
    launcher = "hydra/launcher=submitit_local"
    command = [
        *MODULE,
        "--multirun",
        launcher,
        *SHORT,
        f"results_dir={tmp_path}",
        "system.gamma=0.9,0.8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = listing.summaries(tmp_path)
    assert [run.status for run in found] == ["finished"] * 2
    configs = [yaml.safe_load((run.folder / "config.yaml").read_text()) for run in found]
    assert sorted(config["system"]["gamma"] for config in configs) == [0.8, 0.9]


def test_a_sweep_whose_jobs_change_folder_writes_where_it_was_started(tmp_path):
    command = [*MODULE, "--multirun", "hydra.job.chdir=true", *SHORT, "results_dir=out"]
    command += ["system.gamma=0.9,0.8", "hydra.sweep.subdir='${hydra.job.num}'"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = sorted(str(run.folder) for run in listing.summaries(tmp_path))
    printed = [line for line in done.stdout.splitlines() if line.startswith("results: ")]
    # Each run prints its folder when it begins and when it ends.
    assert printed == [f"results: {folder}" for folder in found for _ in range(2)]
    assert len(found) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mappo", "sweeps"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("key", ["sweep.subdir", "sweep.dir"])
def test_an_unknown_interpolation_gives_a_one_line_error(tmp_path, key):
    command = [*MODULE, "--multirun", *SHORT, f"hydra.{key}='${{nope}}'"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: Interpolation key 'nope' not found\n"


def output_of(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mappo.py", *arguments])
    cli.main(mappo, None)
    return capsys.readouterr().out


def test_the_slurm_launchers_config_composes(monkeypatch, capsys):
    out = output_of(monkeypatch, capsys, "hydra/launcher=slurm", *SHORT, "--cfg", "hydra")
    launcher = yaml.safe_load(out)["hydra"]["launcher"]
    assert launcher["gpus_per_node"] == 1 and launcher["timeout_min"] == 1440
    assert launcher["_target_"].endswith("SlurmLauncher")


def test_flags_that_exclude_each_other_give_a_one_line_error(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        output_of(monkeypatch, capsys, "--multirun", "--cfg", "job", *SHORT)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: argument --cfg/-c: not allowed with argument --multirun/-m: see --help\n"
    )
