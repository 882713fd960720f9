"""A user's own logger, passed as `sinks=`: the guide's example."""

import csv
import re
from pathlib import Path

import pytest

from experiment.counting import SEEDS, SYSTEM, Count, K, records
from experiment.test_resume import stop_after
from magpo import experiment
from magpo.report.writer import LoggingError


def guides_logger():
    """Return the guide's logger."""
    page = (Path(__file__).parents[2] / "docs/guides/logger.md").read_text()
    *_, program = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(program, names := {"__name__": "guide"})
    return names["Returns"]


Returns = guides_logger()


class Broken(Returns):
    def write(self, measurement):
        raise ConnectionError("no route to host")


def rows(folder):
    with (folder / "returns.csv").open() as file:
        _, *found = csv.reader(file)
        return [(int(seed), int(steps), float(value)) for seed, steps, value in found]


def test_a_sink_receives_every_evaluation(config):
    folder = experiment.run(SYSTEM, config, Count(), sinks=[Returns]).folder
    evaluations = [r for r in records(folder) if r["name"] == "eval/episode_return"]
    assert rows(folder) == [(r["seed"], r["env_steps"], r["value"]) for r in evaluations]
    assert len(evaluations) == len(SEEDS) * (K + 1)


def test_a_resumed_run_gives_its_sinks_the_earlier_evaluations(config, monkeypatch):
    import dataclasses

    folder = stop_after(monkeypatch, config, 3)
    config = dataclasses.replace(config, resume=str(folder))
    assert experiment.run(SYSTEM, config, Count(), sinks=[Returns]).folder == folder
    assert [steps for _, steps, _ in rows(folder)] == sorted(
        config.steps_per_chunk * chunk for chunk in range(K + 1) for _ in SEEDS
    )


def test_a_broken_sink_is_reported(config):
    with pytest.raises(LoggingError, match="Broken: no route to host"):
        experiment.run(SYSTEM, config, Count(), sinks=[Broken])
