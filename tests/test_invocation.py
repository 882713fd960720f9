"""Common ways to start a program: each works, or says in one line what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small

import magpo
from magpo import files
from magpo.runs import listing

SYSTEMS = Path(magpo.__file__).parent / "systems"
SMALL = [*small.MAPPO, "total_steps=128", "num_evaluations=2", "eval_episodes=2"]


def run_python(*arguments, cwd, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_training_works_under_a_profiler(tmp_path):
    done = run_python(
        "-m", "cProfile", "-o", "out", "-m", "magpo.systems.mappo", *SMALL, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (run,) = listing.summaries(tmp_path)
    assert (run.system, run.status) == ("mappo", "finished")


@pytest.mark.parametrize("name", ["mappo", "magpo"])
def test_running_a_file_of_the_package_says_how_to_start_it(tmp_path, name):
    done = run_python(SYSTEMS / f"{name}.py", *SMALL, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: run systems as python -m magpo.systems.<name>, and")
    assert done.stderr.count("\n") == 1


def test_a_fork_runs_as_a_module_or_with_flags(tmp_path):
    shutil.copy(SYSTEMS / "mappo.py", tmp_path / "own.py")
    shutil.copy(files.configs() / "mappo.yaml", tmp_path / "own.yaml")
    for arguments in (["-m", "own"], ["own.py", "--multirun"]):
        done = run_python(*arguments, *SMALL, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert [run.system for run in listing.summaries(tmp_path)] == ["own", "own"]


def test_training_and_evaluation_work_with_nan_checks_and_64_bits(tmp_path):
    """Train and evaluate with NaN checks and 64 bits turned on."""
    modes = {"JAX_DEBUG_NANS": "1", "JAX_ENABLE_X64": "1"}
    done = run_python("-m", "magpo.systems.mappo", *SMALL, cwd=tmp_path, **modes)
    assert done.returncode == 0, done.stderr
    (run,) = listing.summaries(tmp_path)
    played = run_python(
        "-m", "magpo.evaluate", f"run={run.folder}", "episodes=2", cwd=tmp_path, **modes
    )
    assert played.returncode == 0, played.stderr


@pytest.mark.parametrize("command", ["magpo", "magpo.systems", "magpo.evaluate"])
def test_unread_or_unwritable_output_gives_no_traceback(tmp_path, command):
    """Close the output, as `| head` does, or send it to a full device."""
    unread, pipe = os.pipe()
    os.close(unread)
    for stdout, code, error in ((pipe, 1, ""), (os.open("/dev/full", os.O_WRONLY), 1, "error: ")):
        arguments = [sys.executable, "-m", command]
        done = subprocess.run(
            arguments, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(stdout)
        assert done.returncode == code and done.stderr.startswith(error)
        assert done.stderr.count("\n") == bool(error), done.stderr


def test_the_package_lists_its_commands(tmp_path):
    done = run_python("-m", "magpo", cwd=tmp_path)
    assert done.returncode == 0 and "python -m magpo.evaluate" in done.stdout
