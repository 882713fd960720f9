"""The writer thread, the files it writes, the console and the learning curve."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from magpo.config import members
from magpo.config.schema import DistributedConfig, EnvConfig, LoggerConfig, RunConfig
from magpo.files import write_aside
from magpo.report import console as console_module
from magpo.report import curve
from magpo.report.console import Console, spread
from magpo.report.measurements import Measurement, Run
from magpo.report.sinks import JsonLines, LearningCurve, MarlEval
from magpo.report.writer import LoggingError, Writer


def make_run(folder, seeds=(5, 2), headline="episode_return", vary=None):
    trained = members.members(tuple(seeds), members.settings(vary or {}))
    return Run(folder, "magpo", "lbf", "8x8-2p-2f-coop", trained, headline, 64, folder.name)


def measure(chunk, num_members=2, **metrics):
    """Return a measurement with these metrics, (M,) each, the same in two episodes."""
    metrics = metrics or {"episode_return": np.arange(num_members) + (chunk or 0)}
    evaluation = {k: np.float32([[x, x] for x in v]) for k, v in metrics.items()}
    steps = (128 * (chunk or 0),) * num_members
    return Measurement(chunk, steps, 1.5, evaluation, {}, {"evaluation_s": 1.0, "training_s": 4.0})


def logged_returns(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["value"] for r in records if r.get("name") == "eval/episode_return"]


class Recorded:
    def __init__(self, fail_on=()):
        self.written, self.saves, self.fail_on = [], 0, fail_on

    def write(self, measurement):
        if measurement.chunk in self.fail_on:
            raise ValueError(f"no chunk {measurement.chunk}")
        self.written.append(measurement.chunk)

    def save(self):
        self.saves += 1


def test_writer_keeps_the_order_and_saves_at_the_end():
    sink = Recorded()
    with Writer([sink], queue_size=2) as writer:
        for chunk in range(20):
            writer.put(measure(chunk))
    assert sink.written == list(range(20))
    assert sink.saves == 1


def test_a_writer_error_is_reported_once_and_raised_at_the_end():
    broken, sound, warned = Recorded(fail_on=(3, 5)), Recorded(), []

    def work():
        with Writer([broken, sound], warned.append, queue_size=2) as writer:
            for chunk in range(9):
                writer.put(measure(chunk))

    with pytest.raises(LoggingError, match="Recorded: no chunk 5"):
        work()
    assert warned == ["Recorded: no chunk 3; training continues"]
    assert broken.written == [0, 1, 2, 4, 6, 7, 8]
    assert sound.written == list(range(9))
    assert sound.saves == 1


def test_writer_forgets_a_failed_save_once_a_later_one_succeeds():
    failures = [OSError(28, "No space left on device"), None]

    def save():
        if error := failures.pop(0):
            raise error

    with Writer([], queue_size=2) as writer:
        writer.put(save)
        writer.put(save)
    assert not failures


def test_jobs_run_in_the_order_in_which_they_were_put(tmp_path):
    sink = Recorded()
    with Writer([sink]) as writer:
        writer.put(measure(0))
        writer.put(lambda: sink.written.append("job"))
        writer.put(measure(1))
    assert sink.written == [0, "job", 1]


def test_writer_error_at_the_last_measurement_is_raised_on_exit():
    with (
        pytest.raises(LoggingError, match="no chunk 0"),
        Writer([Recorded(fail_on=(0,))]) as writer,
    ):
        writer.put(measure(0))


def test_writer_that_fails_with_a_full_queue_does_not_block():
    gate = threading.Event()

    class Stuck(Recorded):
        def write(self, measurement):
            gate.wait()
            raise ValueError

    def work():
        with pytest.raises(LoggingError), Writer([Stuck()], queue_size=2) as writer:  # noqa: PT012
            for chunk in range(9):
                writer.put(measure(chunk))
        done.set()

    done = threading.Event()
    threading.Thread(target=work, daemon=True).start()
    assert not done.wait(0.2)  # the queue is full by now
    gate.set()
    assert done.wait(5)


def test_writer_does_not_hide_the_error_that_ended_the_run():
    with pytest.raises(KeyboardInterrupt), Writer([Recorded(fail_on=(0,))]) as writer:  # noqa: PT012
        writer.put(measure(0))
        raise KeyboardInterrupt


def test_writer_queue_is_bounded():
    gate = threading.Event()
    sink = Recorded()
    sink.write = lambda measurement: gate.wait()
    with Writer([sink], queue_size=2) as writer:
        producer = threading.Thread(target=lambda: [writer.put(measure(i)) for i in range(9)])
        producer.start()
        producer.join(0.2)
        assert producer.is_alive()
        gate.set()
        producer.join()


def test_write_aside_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    write_aside(path, lambda aside: aside.write_text("old"))

    def fail(aside):
        aside.write_text("ne")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        write_aside(path, fail)
    assert path.read_text() == "old"


def test_json_lines_are_exact_and_valid(tmp_path):
    sink = JsonLines(make_run(tmp_path))
    values = [0.1, np.inf]
    sink.write(measure(1, episode_return=values))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["value"] for line in lines if line["name"] == "eval/episode_return"] == [0.1, None]


def test_json_lines_catch_up_after_a_full_disk(tmp_path):
    sink = JsonLines(make_run(tmp_path))
    file = sink.file

    class Full:
        def __init__(self, free):
            self.free = free

        def write(self, data):
            if not self.free:
                raise OSError(28, "No space left on device")
            written, self.free = file.write(data[: self.free]), 0
            return written

        def __getattr__(self, name):
            return getattr(file, name)

    sink.write(measure(0, episode_return=[1, 2]))
    sink.file = Full(free=40)
    sink.write(measure(1, episode_return=[3, 4]))
    with pytest.raises(OSError, match="No space"):
        sink.save()
    sink.file = file
    sink.write(measure(2, episode_return=[5, 6]))
    assert logged_returns(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_json_lines_survive_the_removal_of_their_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    sink = JsonLines(make_run(folder))
    sink.write(measure(0, episode_return=[1, 2]))
    shutil.rmtree(folder)
    sink.write(measure(1, episode_return=[3, 4]))
    assert logged_returns(folder) == [1, 2, 3, 4]


def test_json_lines_continue_from_a_checkpoint(tmp_path):
    sink = JsonLines(make_run(tmp_path))
    sink.write(measure(0, episode_return=[1, 2]))
    size = sink.size
    sink.write(measure(1, episode_return=[3, 4]))
    again = JsonLines(make_run(tmp_path), size)
    again.write(measure(1, episode_return=[5, 6]))
    assert logged_returns(tmp_path) == [1, 2, 5, 6]


def replace(path):
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


def edit(path):
    """Replace the first line with a foreign one, as an editor or `sed -i` saves a file."""
    _, *lines = path.read_text().splitlines(keepends=True)
    path.with_name("new").write_text('{"mine": 1}\n' + "".join(lines).strip())
    path.with_name("new").replace(path)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [replace, edit, truncate, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("resumed", [False, True])
def test_json_lines_lose_nothing_when_others_write_the_file(tmp_path, spoil, resumed):
    warned, run = [], make_run(tmp_path)
    sink = JsonLines(run, warn=warned.append)
    sink.write(measure(0, episode_return=[1, 2]))
    if resumed:
        sink = JsonLines(run, sink.size, warned.append)
    sink.write(measure(1, episode_return=[3, 4]))
    for _ in range(2):
        spoil(tmp_path / "metrics.jsonl")
        sink.save()
    sink.write(measure(2, episode_return=[5, 6]))
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(row) for row in rows]
    assert logged_returns(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert len(set(rows)) == len(rows)
    assert {"mine": 1} not in records
    changed = (tmp_path / "metrics.jsonl.changed").read_text()
    assert ('{"mine": 1}' in changed) == (spoil is edit)
    assert len(warned) == 1 and "written again" in warned[0]
    again = JsonLines(run, sink.ends[1])
    again.write(measure(2, episode_return=[7, 8]))
    assert logged_returns(tmp_path) == [1, 2, 3, 4, 7, 8]


@pytest.mark.parametrize("line", ["", "mine\n", "no newline"])
def test_json_lines_set_aside_what_others_append(tmp_path, line):
    run, path = make_run(tmp_path), tmp_path / "metrics.jsonl"
    sink = JsonLines(run)
    sink.write(measure(0, episode_return=[1, 2]))
    with path.open("a") as file:
        file.write(line)
    sink.write(measure(1, episode_return=[3, 4]))
    sink.write(measure(2, episode_return=[5, 6]))
    again = JsonLines(run, sink.ends[1])
    again.write(measure(2, episode_return=[7, 8]))
    rows = path.read_text().splitlines()
    assert line.strip() not in rows
    changed = path.with_name("metrics.jsonl.changed")
    assert changed.exists() == bool(line) and (not line or changed.read_text().endswith(line))
    values = [json.loads(row)["value"] for row in rows if "eval/episode_return" in row]
    assert values == [1, 2, 3, 4, 7, 8]


def test_marl_eval_keeps_absolute_metrics_separate(tmp_path):
    sink = MarlEval(make_run(tmp_path))
    sink.write(measure(0))
    sink.write(measure(None, episode_return=[7, 8]))
    sink.save()
    data = json.loads((tmp_path / "marl_eval.json").read_text())
    seed = data["lbf"]["8x8-2p-2f-coop"]["magpo"]["seed_2"]
    assert seed["absolute_metrics"] == {"episode_return": [8, 8]}
    assert seed["step_0"] == {"step_count": 0, "elapsed_time": 1.5, "episode_return": [1, 1]}


@pytest.mark.parametrize("num_seeds", [1, 3, 6])
@pytest.mark.parametrize("num_settings", [1, 2, 13])
def test_learning_curve_is_drawn_for_any_number_of_members(tmp_path, num_seeds, num_settings):
    vary = {"system.delta": tuple(1.0 + i for i in range(num_settings))}
    run = make_run(tmp_path, range(num_seeds), "win_rate", vary if num_settings > 1 else {})
    number = num_seeds * num_settings
    sink = LearningCurve(run)
    sink.save()  # nothing measured yet, so no figure
    assert not list(tmp_path.iterdir())
    for chunk in (0, 1, 2, None):
        scores = np.arange(number) + (chunk or 0)
        sink.write(measure(chunk, number, episode_return=scores, win_rate=scores))
        sink.save()
        assert [path.name for path in tmp_path.iterdir()] == ["learning_curve.png"]


def test_band_is_the_range_of_few_seeds_or_an_interval_of_many():
    few = np.array([[1.0, 3.0, 2.0]])
    low, high, _ = curve.band(few)
    assert (low[0], high[0]) == (1, 3)
    many = np.linspace(0, 1, 10)[None]
    low, high, label = curve.band(many)
    error = many.std() / np.sqrt(10)
    np.testing.assert_allclose([low[0], high[0]], 0.5 + np.array([-1.96, 1.96]) * error, atol=0.03)
    assert "95 %" in label


def make_console(folder, suite="lbf", budget="quick", headline="episode_return", vary=None):
    config = RunConfig(
        system="magpo",
        env=EnvConfig(f"{suite}/task", {}),
        algorithm=None,
        seeds=(5, 2),
        vary=vary or {},
        vary_in_step=False,
        seeds_per_batch=None,
        total_steps=1024,
        num_envs=8,
        rollout_length=16,
        num_evaluations=8,
        eval_episodes=2,
        absolute_metric=True,
        budget=budget,
        tuned=True,
        published=False,
        imports={},
        precision="float32",
        platform="auto",
        logger=LoggerConfig(True, True, False, False, None, False, False, ()),
        results_dir="results",
        keep=2,
        checkpoint_share=1.0,
        resume=None,
        allow_changes=(),
        distributed=DistributedConfig(None, None, None),
    )
    run = make_run(folder, headline=headline, vary=vary)._replace(suite=suite)
    return Console(run, config)


def test_time_left_counts_chunks_evaluations_and_the_absolute_metric(tmp_path, capsys):
    console = make_console(tmp_path)
    console.update(measure(0)._replace(timing={}))
    assert "left" not in capsys.readouterr().out  # nothing trained yet, so no pace
    for chunk in (1, 2, 3):
        slow = measure(chunk)._replace(timing={"evaluation_s": 1.0, "training_s": 40.0})
        console.update(slow if chunk == 2 else measure(chunk))
    left = 5 * (4 + 1) + 10  # one slow chunk does not move the median
    assert f"0:00:{left} left" in capsys.readouterr().out


@pytest.mark.parametrize("earlier_s", [0, 1000])
def test_the_time_a_run_took_includes_compiling(tmp_path, capsys, monkeypatch, earlier_s):
    now = 50.0
    monkeypatch.setattr(console_module.time, "perf_counter", lambda: now)
    console = make_console(tmp_path)
    if earlier_s:
        console.resume(measure(1)._replace(wall_s=float(earlier_s)))
    with console.compiling():
        now += 100
    now += 400  # training, evaluation, and the absolute metric
    console.update(measure(2)._replace(wall_s=350.0 + earlier_s))
    measurements = [measure(i) for i in range(3)]
    console.finished(measurements, np.array([2, 2]), None)
    out = capsys.readouterr().out.splitlines()
    assert "compiled in 100.0 s" in out
    assert out[-2:] == [
        "done in 0:25:00 (0:01:40 of it compiling, 0:16:40 before it was resumed)"
        if earlier_s
        else "done in 0:08:20 (0:01:40 of it compiling)",
        f"results: {tmp_path}",
    ]


def test_console_line_has_pace_and_spread(tmp_path, capsys):
    console = make_console(tmp_path, headline="win_rate")
    console.update(measure(2, episode_return=[1, 3], win_rate=[0, 1]))
    console.update(measure(3, episode_return=[0, 4], win_rate=[0, 1]))
    line = capsys.readouterr().out.splitlines()[-1]
    for part in (
        "384 of 1,024 steps",
        "64 steps/s",  # 2 seeds x 128 steps in 4 s
        "return 2.00 ± 2.83",
        "win_rate 0.50 ± 0.71",
        "best return 2.50 ± 2.12",
    ):
        assert part in line


def test_console_line_shows_the_best_setting(tmp_path, capsys):
    console = make_console(tmp_path, vary={"system.delta": (1.5, 2.0, None)})
    console.update(measure(2, 6, episode_return=[1, 3, 5, 9, np.nan, 9]))
    line = capsys.readouterr().out.splitlines()[-1]
    assert "delta=2 (best of 3 settings): return 7.00 ± 2.83, best return 7.00 ± 2.83" in line
    assert "192 steps/s over 6 members" in line  # 6 x 128 steps in 4 s


def test_spread_of_one_seed_is_its_value():
    assert spread(np.array([1.234])) == "1.23"
    assert spread(np.array([150.0, 152.0])) == "151.0 ± 1.4"


@pytest.mark.parametrize(
    ("suite", "budget", "hint"),
    [("rware", "quick", True), ("rware", "paper", False), ("lbf", "quick", False)],
)
def test_header_counts_parameters_and_suggests_the_demo_for_sparse_rewards(
    tmp_path, capsys, suite, budget, hint
):
    env = SimpleNamespace(name=f"{suite}/task", num_agents=3, action_dim=5, action_kind="discrete")
    policy = {"kernel": np.zeros((2, 30, 40)), "bias": np.zeros((2, 40))}
    make_console(tmp_path, suite, budget).header(env, policy, [policy, policy])
    out = capsys.readouterr().out
    assert "1,240 in the policy, 2,480 in training" in out
    assert "tuned for this task" in out
    assert ("make demo" in out) == hint


def test_colours_of_settings_are_ordered_and_neighbours_differ():
    for number in (2, 6, 7, 20):
        shades = [curve.shade(place, number) for place in range(number)]
        assert len(set(shades)) == number
        brightness = [sum(colour[:3]) for colour, _ in shades]
        assert brightness == sorted(brightness)
    many = [dashes for _, dashes in shades]
    assert all(a != b for a, b in pairwise(many))


def test_final_table_has_every_seed_and_their_mean(tmp_path, capsys):
    returns = [[0, 0]] * 5 + [[2, 2], [3, 0], [0, 0], [1, 2]]
    measurements = [measure(i, episode_return=values) for i, values in enumerate(returns)]
    absolute = measure(None, episode_return=[2.5, 1.5])
    make_console(tmp_path).finished(measurements, np.array([6, 5]), absolute)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["5", "1.000", "3.000", "2.500", "768"] in rows
    assert ["2", "2.000", "2.000", "1.500", "640"] in rows
    mean = next(row for row in rows if row and row[0] == "mean")
    assert mean[1:] == ["1.50", "±", "0.71", "2.50", "±", "0.71", "2.00", "±", "0.71"]


class Closed:
    """A stream whose reader is gone."""

    encoding, isatty = "utf-8", staticmethod(lambda: True)

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        self.write("")


def closed():
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    return stream


def full():
    return io.TextIOWrapper(io.FileIO("/dev/full", "w"))


@pytest.mark.parametrize("stream", [Closed, closed, full, lambda: None])
def test_an_unwritable_console_is_reported_once(tmp_path, monkeypatch, capsys, stream):
    stream = stream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    console = make_console(tmp_path)
    with console.compiling(), console.progress:
        for chunk in range(8):
            console.update(measure(chunk))
            time.sleep(0.1)  # Live refreshes in a thread of its own
    console.finished([measure(0)], np.array([0, 0]), None)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in warnings] == ["warning"] * (stream is not None)


def test_a_console_without_unicode_prints_question_marks(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    make_console(tmp_path).update(measure(2, episode_return=[1, 3]))
    assert b"return 2.00 ? 1.41" in stream.buffer.getvalue()


@pytest.mark.parametrize(
    ("redirection", "error", "code"),
    [
        *((to, "", 0) for to in (">/dev/full", ">&-", ">/dev/full 2>/dev/full", "| true")),
        (">/dev/full 2>/dev/full", "ConfigError", 2),
        (">/dev/full 2>&-", "DivergenceError", 1),
        (">/dev/full 2>/dev/full", "KeyboardInterrupt", 130),
    ],
)
def test_exit_codes_without_a_console(tmp_path, redirection, error, code):
    program = tmp_path / "train.py"
    program.write_text(
        "import time; from test_loggers import *; from magpo.experiment import loop\n"
        "from magpo.errors import ConfigError; from magpo.experiment import DivergenceError\n"
        "from unittest import mock\n"
        "def train(*_, must_fit):\n"
        "    time.sleep(0.2)  # `| true` has ended\n"
        f"    make_console(Path('x')).warn('…')\n"
        f"    if {error!r}: raise {error or 'ValueError'}('this')\n"
        "    return mock.Mock(objective=1.0)\n"
        "loop.run, loop.cli.compose.load = train, lambda *_: None\n"
        "from magpo.systems import magpo; loop.main(magpo)\n"
    )
    command = f"set -o pipefail; {sys.executable} {program} {redirection}"
    paths = os.pathsep.join(map(str, [Path(__file__).parent, *sys.path]))
    done = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"PYTHONPATH": paths}, check=False
    )
    assert done.returncode == code
