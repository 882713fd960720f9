"""A user's own logger, passed as `sinks=`."""

import csv

import pytest

from experiment.counting import SEEDS, SYSTEM, Count, K, records
from experiment.test_resume import stop_after
from magpo import experiment
from magpo.report import Measurement, Run, scalars
from magpo.report.writer import LoggingError


class Table:
    """returns.csv: every seed's mean return at every evaluation."""

    def __init__(self, run: Run) -> None:
        self.run, self.rows = run, []

    def write(self, measurement: Measurement) -> None:
        for place, env_steps, name, value in scalars(self.run, measurement):
            if name == "eval/episode_return":
                self.rows.append((self.run.members[place].seed, env_steps, value))

    def save(self) -> None:
        with (self.run.folder / "returns.csv").open("w", newline="") as file:
            csv.writer(file).writerows(self.rows)


class Broken(Table):
    def write(self, measurement):
        raise ConnectionError("no route to host")


def rows(folder):
    with (folder / "returns.csv").open() as file:
        return [(int(seed), int(steps), float(value)) for seed, steps, value in csv.reader(file)]


def test_a_sink_receives_every_evaluation(config):
    folder = experiment.run(SYSTEM, config, Count(), sinks=[Table]).folder
    evaluations = [r for r in records(folder) if r["name"] == "eval/episode_return"]
    assert rows(folder) == [(r["seed"], r["env_steps"], r["value"]) for r in evaluations]
    assert len(evaluations) == len(SEEDS) * (K + 1)


def test_a_resumed_run_gives_its_sinks_the_earlier_evaluations(config, monkeypatch):
    import dataclasses

    folder = stop_after(monkeypatch, config, 3)
    config = dataclasses.replace(config, resume=str(folder))
    assert experiment.run(SYSTEM, config, Count(), sinks=[Table]).folder == folder
    assert [steps for _, steps, _ in rows(folder)] == sorted(
        config.steps_per_chunk * chunk for chunk in range(K + 1) for _ in SEEDS
    )


def test_a_broken_sink_is_reported(config):
    with pytest.raises(LoggingError, match="Broken: no route to host"):
        experiment.run(SYSTEM, config, Count(), sinks=[Broken])
