"""TensorBoard, Neptune, Weights & Biases and MLflow: what each received, read back from it."""

import dataclasses
import json
import os
import struct
import threading
from pathlib import Path

import mlflow
import neptune
import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from experiment.counting import SEEDS, K, U, records, run
from magpo.errors import ConfigError
from magpo.experiment import loop, recorder
from magpo.report import measurements, trackers, writer
from magpo.runs import resume

SECRET = "correct_horse_battery_staple_correct_hors"


def test_tensorboard_has_the_values_of_the_log(config):
    logger = dataclasses.replace(config.logger, tensorboard=True)
    folder = run(config, logger=logger).folder
    for seed in SEEDS:
        events = EventAccumulator(str(folder / "tensorboard" / f"seed_{seed}"))
        events.Reload()
        logged = [r for r in records(folder) if r["seed"] == seed]
        names = {r["name"] for r in logged if r["value"] is not None}
        assert set(events.Tags()["scalars"]) == names
        for name in names - {"absolute/episode_return", "absolute/episode_length"}:
            expected = [(r["env_steps"], r["value"]) for r in logged if r["name"] == name]
            found = [(e.step, e.value) for e in events.Scalars(name)]
            assert found == [(step, pytest.approx(value)) for step, value in expected]


def test_tensorboard_hides_values_that_a_resumed_run_repeats(config, monkeypatch):
    logger = dataclasses.replace(config.logger, tensorboard=True)
    monkeypatch.setattr(resume.Saver, "offer", save_only_after(2))
    folder = run(config, logger=logger).folder
    run(config, logger=logger, resume=str(folder))
    events = EventAccumulator(str(folder / "tensorboard" / f"seed_{SEEDS[0]}"))
    events.Reload()
    steps = [event.step for event in events.Scalars("loss/policy")]
    assert steps == [config.steps_per_update * (update + 1) for update in range(U * K)]


def test_neptune_without_a_token_writes_to_disk(config, monkeypatch):
    monkeypatch.delenv("NEPTUNE_API_TOKEN", raising=False)
    monkeypatch.delenv("NEPTUNE_DATA_DIRECTORY", raising=False)
    begun, begin = [], neptune.init_run

    def init_run(**options):
        begun.append(options)
        return begin(**options)

    monkeypatch.setattr(neptune, "init_run", init_run)
    logger = dataclasses.replace(config.logger, neptune=True, neptune_project="a/b", tags=("x",))
    folder = run(config, logger=logger).folder
    assert [options["mode"] for options in begun] == ["offline"] * len(SEEDS)
    assert {tuple(options["tags"]) for options in begun} == {("x",)}
    operations = "".join(
        file.read_text(errors="replace") for file in (folder / "neptune").rglob("*.log")
    )
    assert operations.count(folder.name) >= len(SEEDS)
    assert "rollout" in operations and "episode_return" in operations


@pytest.fixture
def secrets(monkeypatch):
    """Set secrets in environment variables, and unset those that name a server."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "SOME_PASSWORD"):
        monkeypatch.setenv(name, SECRET)


@pytest.fixture
def tracked(config, secrets, monkeypatch):
    """Return the folder of a run that stopped two chunks after its checkpoint and was resumed."""
    logger = dataclasses.replace(config.logger, wandb=True, mlflow=True, tags=("x",))
    config = dataclasses.replace(config, logger=logger)
    monkeypatch.setattr(trackers, "PATIENCE_S", 300)  # a busy machine starts the clients slowly
    with monkeypatch.context() as changed:
        changed.setattr(resume.Saver, "offer", save_only_after(2))
        changed.setattr(resume.Saver, "stop", lambda saver: None)
        changed.setattr(recorder.Recorder, "record", interrupt_after(4))
        with pytest.raises(KeyboardInterrupt):
            run(config)
    (folder,) = Path(config.results_dir).glob("*/*/*/*")
    assert json.loads((folder / "wandb/sent.json").read_text()) == [
        4 * config.steps_per_chunk,
        False,
    ]
    return run(config, resume=str(folder)).folder


def save_only_after(chosen):
    offer = resume.Saver.offer

    def one(self, chunk, *args):
        if chunk == chosen:
            self.next = 0.0
            offer(self, chunk, *args)

    return one


def interrupt_after(last):
    record = recorder.Recorder.record

    def until(self, index, *args):
        record(self, index, *args)
        if index == last:
            raise KeyboardInterrupt

    return until


def logged(folder, seed, absolute=False):
    """Return a seed's values in metrics.jsonl, by name and environment steps, without times."""
    return {
        (r["name"], r["env_steps"]): r["value"]
        for r in records(folder)
        if r["seed"] == seed
        and r["value"] is not None
        and r["name"].startswith("absolute/") == absolute
        and not r["name"].startswith("time/")  # a resumed run measures repeated chunks anew
    }


def wandb_records(file):
    """Yield the records of an offline run, a log in blocks of 32 KiB like LevelDB's."""
    data, place, record = file.read_bytes(), 7, b""
    while place < len(data):
        if (left := 2**15 - place % 2**15) < 7:  # no header fits
            place += left
            continue
        _, size, part = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_trackers_receive_each_value_once(tracked):
    check_wandb(tracked)
    check_mlflow(tracked)
    for file in filter(Path.is_file, tracked.parents[3].rglob("*")):
        assert SECRET.encode() not in file.read_bytes(), file


def check_wandb(folder):
    for place, seed in enumerate(SEEDS):
        found, summary, ids = [], {}, set()
        for file in sorted((folder / "wandb").glob(f"offline-run-*-{place}/*.wandb")):
            for record in wandb_records(file):
                for item in record.history.item:
                    name = "/".join([item.key, *item.nested_key]).strip("/")
                    found.append(((name, record.history.step.num), json.loads(item.value_json)))
                summary |= {i.key: json.loads(i.value_json) for i in record.summary.update}
                if record.HasField("run"):
                    one = record.run
                    ids.add((one.run_id, one.run_group, one.display_name, one.resume, *one.tags))
                    of_member = {i.key: json.loads(i.value_json) for i in one.config.update}
        ((run_id, *about),) = ids  # of both processes
        assert run_id.endswith(f"-{place}")
        assert about == [folder.name, f"counting test/count seed {seed}", True, "x"]
        assert of_member["seed"] == seed and of_member["num_envs"] == 4
        found = [(key, value) for key, value in found if not key[0].startswith(("_", "time/"))]
        expected = logged(folder, seed)
        assert len(found) == len(expected) and dict(found) == pytest.approx(expected)
        for (name, _), value in logged(folder, seed, absolute=True).items():
            assert summary[name] == value


def check_mlflow(folder):
    client = mlflow.MlflowClient(f"sqlite:///{folder.parents[3]}/mlflow.db")
    experiment = client.get_experiment_by_name("magpo").experiment_id
    runs = client.search_runs([experiment], f"tags.`magpo.run` = '{folder.name}'")
    assert len(runs) == len(SEEDS)
    for one in runs:
        seed = int(one.data.params["seed"])
        assert one.info.run_name == f"counting test/count seed {seed}"
        assert one.info.status == "FINISHED" and "x" in one.data.tags
        expected = logged(folder, seed) | logged(folder, seed, absolute=True)
        names = [name for name in one.data.metrics if not name.startswith("time/")]
        histories = [client.get_metric_history(one.info.run_id, name) for name in names]
        found = [((m.key, m.step), m.value) for history in histories for m in history]
        assert len(found) == len(expected) and dict(found) == expected


@pytest.mark.parametrize("client", trackers.TRACKERS)
def test_a_missing_client_is_reported_before_training(client, config, monkeypatch):
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{client} client: pip install 'magpo\[{client}\]'"):
        run(config, logger=dataclasses.replace(config.logger, **{client: True}))
    assert not Path(config.results_dir).exists()


@pytest.mark.parametrize("name", ["Neptune", "WandB", "MLflow"])
def test_a_service_that_fails_does_not_stop_the_run(name, config, monkeypatch, capsys):
    def refuse(*args, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(neptune, "init_run", refuse)
    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(mlflow, "MlflowClient", refuse)
    logger = dataclasses.replace(config.logger, **{name.lower(): True})
    with pytest.raises(writer.LoggingError, match=f"{name}: no route to host"):
        run(config, logger=logger)
    (folder,) = Path(config.results_dir).glob("*/*/*/*")
    assert records(folder)[-1]["name"].startswith("absolute/")
    assert capsys.readouterr().out.count(f"warning: {name}: no route to host") == 1


class Recording(trackers.Tracker):
    """A service that records everything sent to it."""

    sent = ()

    def begin(self):
        yield from [[] for _ in self.members]

    def log(self, one, rows):
        one.append(rows)

    def end(self, one):
        self.sent += (one,)


def test_a_tracker_sends_each_measurement_once(config, tmp_path):
    members = config.members[:1]
    facts = measurements.Run(tmp_path, "counting", "a", "b", members, "episode_return", 1, "x")

    def measure(chunk, steps):
        evaluation = {"episode_return": np.full((1, 2), steps, np.float32)}
        return measurements.Measurement(chunk, (steps,), 0.0, evaluation, {}, {})

    def sent(*measured, earlier=()):
        tracker = Recording(facts, "id", config.logger, [{}], earlier)
        for measurement in measured:
            tracker.write(measurement)
        tracker.close()
        return [rows for one in tracker.sent for rows in one]

    first, second, third = (measure(chunk, 10 * chunk) for chunk in range(3))
    best = measure(None, 10)
    name = "eval/episode_return"
    assert sent(second, earlier=[first]) == [{0: {name: 0.0}}, {10: {name: 10.0}}]
    absolute = {10: {"absolute/episode_return": 10.0}}
    assert sent(second, third, best, earlier=[first]) == [{20: {name: 20.0}}, absolute]
    assert sent(third, best, earlier=[first, second]) == []
    assert sent(measure(3, 30), best) == [{30: {name: 30.0}}, absolute]
    assert sent() == []


def test_a_service_that_never_answers_does_not_block_the_run(config, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(neptune, "init_run", lambda **options: answer.wait())
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.1)
    with pytest.raises(
        writer.LoggingError, match=r"Neptune: the service did not answer for 0\.1 s"
    ):
        run(config, logger=dataclasses.replace(config.logger, neptune=True))
    answer.set()
