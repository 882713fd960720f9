"""The training of a batch's trials, in as few runs as their structure allows."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from magpo import config as configuration
from magpo import contract, experiment
from magpo.config.schema import RunConfig, as_float32
from magpo.errors import ConfigError
from magpo.runs import child, folders
from magpo.sweep.space import override
from magpo.types import Environment

Values = tuple[float | None, ...]  # a setting's values, in the order of `vary`


@dataclass(frozen=True)
class Search:
    """The facts that all trials of a sweep share."""

    module: ModuleType
    system: str
    overrides: tuple[str, ...]
    data: frozenset[str]  # the keys whose values need no new compilation
    folder: Path
    env: Environment

    def load(self, changes: Sequence[str]) -> RunConfig:
        """Return the configuration of a run in the study's folder. Raises ConfigError."""
        return configuration.load(self.module, self.arguments(changes))

    def arguments(self, changes: Sequence[str]) -> list[str]:
        """Return the arguments of a run in the study's folder."""
        where = str(self.folder).replace("'", "\\'")
        return [*self.overrides, *changes, f"results_dir='{where}'"]


class Group(NamedTuple):
    """Trials that train side by side as settings of one run."""

    changes: list[str]  # to the search's overrides
    config: RunConfig
    settings: dict[int, Values]  # by trial number; trials with equal values share a setting


def plan(
    search: Search, batch: Sequence[FrozenTrial], parallel: int
) -> tuple[list[Group], dict[int, str]]:
    """Group a batch's trials by structure, at most `parallel` in each group.

    Also returns, by trial number, why the others cannot be trained.
    """
    alike, refused = dict[str, list[FrozenTrial]](), dict[int, str]()
    for trial in batch:
        try:
            config = search.load([override(k, v) for k, v in trial.params.items()])
            experiment.make_setup(contract.algorithm(search.module), search.env, config)
        except ConfigError as error:
            refused[trial.number] = str(error)
        else:
            structure = {k: v for k, v in trial.params.items() if k not in search.data}
            alike.setdefault(json.dumps(structure, sort_keys=True), []).append(trial)
    groups = [
        _group(search, trials[first : first + parallel])
        for trials in alike.values()
        for first in range(0, len(trials), parallel)
    ]
    return groups, refused


def _group(search: Search, trials: Sequence[FrozenTrial]) -> Group:
    """Return the group of these trials, which have the same structure."""
    varied = [key for key in trials[0].params if key in search.data]
    changes = [override(k, v) for k, v in trials[0].params.items() if k not in search.data]
    different, settings = dict[Values, Values](), dict[int, Values]()
    for trial in trials:
        given = (trial.params[key] for key in varied)
        values = tuple(None if value is None else float(value) for value in given)
        settings[trial.number] = different.setdefault(tuple(map(as_float32, values)), values)
    for place, key in enumerate(varied):
        changes.append(override(f"vary.{key}", [values[place] for values in different.values()]))
    if varied:
        changes.append("vary_in_step=true")
    return Group(changes, search.load(changes), settings)


class Metrics:
    """The headline metric of a run's members, read from metrics.jsonl as it grows."""

    def __init__(self, config: RunConfig, headline: str) -> None:
        self.config, self.headline = config, headline
        self.folder: Path | None = None
        self.offset = 0
        self.evaluations: dict[int, dict[Any, float]] = {}  # by steps and member
        self.absolute: dict[Any, float] = {}

    def read(self) -> bool:
        """Read the lines added since the last call; return whether there are any."""
        self.folder = self.folder or folders.newest(self.config)
        file, before = self.folder and self.folder / "metrics.jsonl", self.offset
        if file is None or not file.is_file():
            return False
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            self.offset = stream.seek(self.offset if size >= self.offset else 0)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                if b'"eval/' in line or b'"absolute/' in line:
                    self._take(line)
        return self.offset != before

    def _take(self, line: bytes) -> None:
        record = json.loads(line)
        kind, _, name = record["name"].partition("/")
        if name != self.headline or kind not in ("eval", "absolute"):
            return
        member = record["seed"], *(record[key] for key in self.config.vary)
        of_kind = self.absolute
        if kind == "eval":
            of_kind = self.evaluations.setdefault(record["env_steps"], {})
        of_kind[member] = math.nan if record["value"] is None else record["value"]

    def _mean(self, of_members: Mapping[Any, float], setting: Values) -> float | None:
        """Return a setting's mean over seeds, or None while seeds are missing."""
        values = [of_members.get((seed, *setting)) for seed in self.config.seeds]
        found = [value for value in values if value is not None]
        return math.fsum(found) / len(found) if len(found) == len(values) else None

    def means(self, setting: Values) -> dict[int, float]:
        """Return a setting's evaluations, by the number of chunks trained."""
        per_chunk = self.config.steps_per_chunk
        means = {
            at // per_chunk: self._mean(found, setting) for at, found in self.evaluations.items()
        }
        return {chunk: mean for chunk, mean in sorted(means.items()) if mean is not None}

    def diverged(self, setting: Values) -> bool:
        """Return whether a setting's last evaluation is NaN."""
        means = self.means(setting)
        return bool(means) and math.isnan(means[max(means)])

    def result(self, setting: Values) -> float | None:
        """Return a setting's absolute metric or, without absolute_metric, its last evaluation."""
        if self.config.absolute_metric:
            return self._mean(self.absolute, setting)
        return self.means(setting).get(self.config.num_evaluations)


def train_all(
    search: Search,
    study: optuna.Study,
    batch: Sequence[FrozenTrial],
    parallel: int,
    prune: bool,
    show: Callable[[], None],
) -> int:
    """Train the trials of a batch that have not ended; return an exit code as `train` does."""
    groups, refused = plan(search, batch, parallel)
    for trial in batch:
        if trial.number in refused and trial.state is TrialState.RUNNING:
            fail(study, trial, refused[trial.number])
    for group in groups:
        if _running(study, group) and (code := train(search, study, group, prune, show)):
            return code
    return 0


def train(
    search: Search, study: optuna.Study, group: Group, prune: bool, show: Callable[[], None]
) -> int:
    """Train a group, or continue its run, and tell the study how the trials end.

    A pruned trial ends at once, although it still trains beside the others; the run stops once all
    its trials are pruned. Returns 0 if all trials have ended, otherwise the exit code of a run that
    was stopped or failed for another reason than divergence.
    """
    metrics, running = Metrics(group.config, search.env.headline), _running(study, group)
    show()

    def watch() -> bool:
        nonlocal running
        if metrics.read():
            for trial in running:
                _report(study, trial, metrics, group.settings[trial.number], prune)
            running = _running(study, group)
            show()
        return not running

    stopped, code = watch(), 0
    while not stopped and _status(metrics) == "running":  # left by a sweep that was killed
        time.sleep(child.POLL_S)
        stopped = watch()
    if not stopped and _status(metrics) != "finished" and not _all_diverged(group, metrics):
        command = [sys.executable, "-m", "magpo.sweep.train", search.system]
        command += [*search.arguments(group.changes), "resume=auto", "logger.console=false"]
        code = child.run(command, watch)
        stopped = watch()
    if stopped:
        return 0
    if code and not _all_diverged(group, metrics):
        return code
    for trial in _running(study, group):
        value = metrics.result(group.settings[trial.number])
        if value is None or math.isnan(value):
            fail(study, trial, "diverged")
        else:
            study.tell(trial.number, value)
    show()
    return 0


def _all_diverged(group: Group, metrics: Metrics) -> bool:
    return all(map(metrics.diverged, group.settings.values()))


def _status(metrics: Metrics) -> str:
    return folders.status(metrics.folder) if metrics.folder else "none"


def _running(study: optuna.Study, group: Group) -> list[FrozenTrial]:
    found = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in found if trial.number in group.settings]


def fail(study: optuna.Study, trial: FrozenTrial, reason: str) -> None:
    """Tell the study that a trial failed, and why."""
    Trial(study, trial._trial_id).set_user_attr("error", reason)
    study.tell(trial.number, state=TrialState.FAIL)


def _report(
    study: optuna.Study, frozen: FrozenTrial, metrics: Metrics, setting: Values, prune: bool
) -> None:
    """Report a trial's evaluations in order.

    With `prune`, end the trial at the first evaluation, but not the last, that is below the median
    of the finished trials.
    """
    trial, reported = Trial(study, frozen._trial_id), max(frozen.intermediate_values, default=0)
    if metrics.folder and "run" not in frozen.user_attrs:
        trial.set_user_attr("run", str(metrics.folder.relative_to(metrics.config.results_dir)))
    for chunk, mean in metrics.means(setting).items():
        if chunk > reported and not math.isnan(mean):
            trial.report(mean, chunk)
        # Decide again after the newest one: a sweep may have been killed before its decision.
        may_end = prune and max(reported, 1) <= chunk < metrics.config.num_evaluations
        if may_end and trial.should_prune():
            study.tell(frozen.number, state=TrialState.PRUNED)
            return
