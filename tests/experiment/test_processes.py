"""Two real processes that train one run together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import small

from experiment.test_devices import metrics
from experiment.test_resume import arrays, assert_same_logs
from magpo import config, experiment
from magpo.errors import ConfigError
from magpo.systems import mappo

SHORT = [*small.MAPPO, "eval_episodes=2", "absolute_metric=false", "keep=30"]
# Four chunks of the counting system, for tests of the loop alone.
COUNTED = ["env=test/count", "num_envs=4", "eval_episodes=2", "seeds=[0,1]", "keep=30"]
COUNTED += ["total_steps=96", "num_evaluations=4", "absolute_metric=false", "logger.plot=false"]
COUNT = """
import os, signal, sys
from experiment import counting
from magpo import envs, experiment
from magpo.runs import resume

envs.register("test/count", counting.Count, walls=2)
{}
experiment.main(counting)
"""
COUNTING = ("-c", COUNT.format(""))


def start(overrides, environment=None, program=("-m", "magpo.systems.mappo")):
    """Start a process that trains with these overrides."""
    command = [sys.executable, *program, *overrides]
    pipe = subprocess.PIPE
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | (environment or {})
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def start_two(overrides, **of_each):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    of_both = [f"distributed.coordinator={coordinator}", "distributed.num_processes=2"]
    return [start([*overrides, *of_both, f"distributed.process_id={i}"], **of_each) for i in (0, 1)]


def wait_for_exit(processes, code):
    """Wait until all processes end with this code; return what each printed."""
    printed = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), printed
    return printed


def only_run(root):
    (folder,) = root.glob("*/*/*/*")
    return folder


CHUNKS = 12  # enough for a signal after the first checkpoint to arrive before the end
# COUNTED is too small: XLA runs it inside the call, where a process one chunk ahead would wait for
# the other, and no signal could reach it.
LONG = [*SHORT, f"total_steps={64 * CHUNKS}", f"num_evaluations={CHUNKS}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train one seed in two tasks of a SLURM step; return the run's folder and their output."""
    root = tmp_path_factory.mktemp("whole")
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
    step |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid())}
    both = [*LONG, f"results_dir={root}"]
    printed = wait_for_exit([start(both, step | {"SLURM_PROCID": str(i)}) for i in range(2)], 0)
    return only_run(root), printed


def test_one_seed_over_two_tasks_of_a_slurm_step_gives_the_same_metrics(whole, tmp_path):
    folder, (first, second) = whole
    assert "2 x cpu" in first[0] and "in 2 processes" in first[0]
    assert "steps" not in second[0]
    settings = config.load("mappo", [*LONG, f"results_dir={tmp_path}"])
    alone, together = metrics(experiment.run(mappo, settings).folder), metrics(folder)
    assert alone.keys() == together.keys()
    np.testing.assert_allclose(
        list(together.values()), [alone[name] for name in together], rtol=1e-3, atol=1e-4
    )


def test_a_run_stopped_by_sigterm_and_resumed_equals_an_uninterrupted_one(whole, tmp_path):
    stopped = [*LONG, f"results_dir={tmp_path}", "resume=auto"]
    both = start_two(stopped)
    while not list(tmp_path.glob("*/*/*/*/checkpoints/0*")):
        assert both[0].poll() is None
        time.sleep(0.01)
    for process in both:
        process.send_signal(signal.SIGTERM)
    wait_for_exit(both, 143)
    folder = only_run(tmp_path)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    done = [int(path.name) for path in (folder / "checkpoints").iterdir()]
    assert 0 < max(done) < CHUNKS
    wait_for_exit(start_two(stopped), 0)
    assert_same_logs(folder, whole[0])
    again, expected = arrays(folder, CHUNKS), arrays(whole[0], CHUNKS)
    assert again.keys() == expected.keys()
    for name in again:
        np.testing.assert_array_equal(again[name], expected[name], err_msg=name)


# SIGTERM reaches process `ahead` after it offers chunk 3 for saving, and the other one before.
ONE_CHUNK_APART = """
ahead, offer = sys.argv.pop(1), resume.Saver.offer

def stopped(saver, chunk, *rest):
    if chunk < 3 or f"distributed.process_id={ahead}" in sys.argv:
        offer(saver, chunk, *rest)
    if chunk == 3:
        os.kill(os.getpid(), signal.SIGTERM)

resume.Saver.offer = stopped
"""


@pytest.mark.parametrize("ahead", ["0", "1"])
def test_processes_stopped_one_chunk_apart_keep_their_common_checkpoint(tmp_path, ahead):
    program = ("-c", COUNT.format(ONE_CHUNK_APART), ahead)
    stopped = [*COUNTED, f"results_dir={tmp_path}"]
    printed = wait_for_exit(start_two(stopped, program=program), 143)
    assert "warning" not in printed[0][0]
    checkpoints = (only_run(tmp_path) / "checkpoints").glob("0*")
    assert sorted(int(folder.name) for folder in checkpoints) == [1, 2]


def test_waiting_for_other_processes_is_reported_and_can_be_interrupted(tmp_path):
    alone, other = start_two([*COUNTED, f"results_dir={tmp_path}"], program=COUNTING)
    other.kill()
    assert "waiting, at most 5 minutes, for all processes: localhost:" in alone.stderr.readline()
    time.sleep(0.5)
    alone.send_signal(signal.SIGTERM)
    assert alone.wait(timeout=20) == -signal.SIGTERM


def test_an_error_in_the_first_process_ends_all(tmp_path):
    (tmp_path / "file").write_text("")
    refused = [*COUNTED, f"results_dir={tmp_path / 'file'}"]
    printed = wait_for_exit(start_two(refused, program=COUNTING), 2)
    for _, stderr in printed:
        assert f"error: {tmp_path / 'file'}/" in stderr
        assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["coordinator=localhost:80"], "distributed: needs coordinator, num_processes and proc"),
        (["coordinator=here", "num_processes=2", "process_id=0"], "must be host:port, not 'here'"),
        (["coordinator=a:1", "num_processes=2", "process_id=2"], "process_id must be below num_"),
    ],
)
def test_incomplete_distributed_settings_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config.load("mappo", [*SHORT, *(f"distributed.{text}" for text in overrides)])
