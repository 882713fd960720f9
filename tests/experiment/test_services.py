"""TensorBoard and Neptune, each read back by its own means."""

import dataclasses
from pathlib import Path

import neptune
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiment.counting import SEEDS, K, U, records, run
from magpo.errors import ConfigError
from magpo.experiment import loop
from magpo.report import writer
from magpo.runs import resume


def test_tensorboard_has_what_the_log_has(config):
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


def test_tensorboard_hides_what_a_resumed_run_does_again(config, monkeypatch):
    logger = dataclasses.replace(config.logger, tensorboard=True)
    offer = resume.Saver.offer

    def never_the_last(self, chunk, *args):
        if chunk == 2:
            self.next = 0.0
            offer(self, chunk, *args)

    monkeypatch.setattr(resume.Saver, "offer", never_the_last)
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


def test_a_missing_client_is_said_before_anything_is_written(config, monkeypatch):
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install magpo\[neptune\]"):
        run(config, logger=dataclasses.replace(config.logger, neptune=True))
    assert not Path(config.results_dir).exists()


def test_a_service_that_fails_does_not_stop_the_run(config, monkeypatch, capsys):
    def refuse(**options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(neptune, "init_run", refuse)
    folder = None
    with pytest.raises(writer.LoggingError, match="Neptune: no route to host"):
        folder = run(config, logger=dataclasses.replace(config.logger, neptune=True))
    assert folder is None
    assert capsys.readouterr().out.count("warning: Neptune: no route to host") == 1
