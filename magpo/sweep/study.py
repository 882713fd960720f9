"""A study: trials in Optuna's storage, drawn in batches.

A batch's trials share the values of structural keys, which decide the shapes of a program, so that
they train in one program.

A batch can be drawn again, because each trial's values depend only on the earlier trials, on the
trial's number and on the worker, and because a trial enters the storage completely or not at all.
So a killed sweep continues with the trials that it would have drawn.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from magpo import config as configuration
from magpo.errors import ConfigError

Sampler = Literal["tpe", "random", "grid", "cmaes"]
Distributions = Mapping[str, BaseDistribution]
SEARCH = "search"  # the study's attribute that describes the search


def load(folder: Path, storage: str | None, search: dict[str, Any] | None = None) -> optuna.Study:
    """Open the study of a folder, or create it for `search`.

    Raises ConfigError if the storage cannot be used, or if its study is another search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", ExperimentalWarning)
    kwargs: dict[str, Any] = {"study_name": folder.resolve().name, "sampler": RandomSampler()}
    kwargs["pruner"] = optuna.pruners.MedianPruner()
    file = folder / "study.db"
    if search is None and storage is None and not file.is_file():
        raise ConfigError(f"{folder}: no study there")
    try:
        if search is not None:
            folder.mkdir(parents=True, exist_ok=True)
        kwargs["storage"] = _storage(storage or f"sqlite:///{file}")
        if search is None:
            return optuna.load_study(**kwargs)
        study = optuna.create_study(**kwargs, direction="maximize", load_if_exists=True)
        found = study.user_attrs.get(SEARCH)
        if found is None:
            study.set_user_attr(SEARCH, search)
    except (OptunaError, SQLAlchemyError, ImportError, OSError, ValueError, KeyError) as error:
        cause = error.__cause__ or error  # names the missing driver of a database
        first = (str(cause) or type(cause).__name__).strip().partition("\n")[0]
        raise ConfigError(f"storage={storage or file}: cannot be used: {first}") from error
    if found is not None and (changed := configuration.differences(found, search)):
        listed = "; ".join(f"{key}: {text}" for key, text in changed.items())
        raise ConfigError(f"study={folder}: is another search: {listed}; study=<another folder>")
    return study


def _storage(place: str) -> BaseStorage:
    """Return the storage at a URL or, for a file, a journal."""
    return RDBStorage(place) if "://" in place else JournalStorage(JournalFileBackend(place))


def check_sampler(name: Sampler, found: Distributions) -> None:
    """Raise ConfigError if a sampler cannot search this space."""
    choices = [k for k, d in found.items() if isinstance(d, CategoricalDistribution)]
    ranges = [key for key in found if key not in choices]
    if name == "grid" and ranges:
        raise ConfigError(f"sampler=grid: needs a list of values, not a range, for {ranges[0]}")
    if name == "cmaes" and len(ranges) < 2:
        raise ConfigError(f"sampler=cmaes: needs two ranges or more; the space has {len(ranges)}")
    if name == "cmaes" and find_spec("cmaes") is None:
        raise ConfigError("sampler=cmaes: needs cmaes: pip install 'magpo[sweep]'")


def combinations(found: Distributions) -> float:
    """Return the number of combinations of the values, infinity if there is a range."""
    choices = (
        len(d.choices) if isinstance(d, CategoricalDistribution) else math.inf
        for d in found.values()
    )
    return math.prod(choices)


def _sampler(name: Sampler, worker: int, number: int) -> BaseSampler:
    """Make the sampler of one trial's values that are not fixed."""
    seed = int(np.random.SeedSequence([worker, number]).generate_state(1)[0])
    if name == "cmaes":
        return CmaEsSampler(seed=seed, warn_independent_sampling=False)
    if name == "tpe":
        return TPESampler(seed=seed, constant_liar=True)  # running trials count as bad ones
    return RandomSampler(seed=seed)


def next_point(
    found: Distributions, data: Collection[str], tried: Sequence[FrozenTrial]
) -> dict[str, Any]:
    """Return the first point of a grid that no trial has, or {} after the last one.

    Points with the same structure follow one another.
    """
    choices = {k: d.choices for k, d in found.items() if isinstance(d, CategoricalDistribution)}
    keys = sorted(choices, key=lambda key: key in data)
    values = product(*(choices[key] for key in keys))
    points = (dict(zip(keys, point, strict=True)) for point in values)
    have = [trial.params for trial in tried]
    return next((point for point in points if point not in have), {})


def shared_structure(
    name: Sampler, found: Distributions, data: Collection[str], batch: Sequence[FrozenTrial]
) -> dict[str, Any]:
    """Return the structural values that a batch's next trial takes from an earlier one.

    As many trials share a structure as the other keys have combinations of values. CMA-ES needs the
    same ranges in all trials, so it draws each count of a range anew.
    """
    alike = combinations({k: d for k, d in found.items() if k in data})
    earlier = int(len(batch) % alike)  # trials that have the next one's structure
    if not earlier:
        return {}
    return {
        key: batch[-1].params[key]
        for key, d in found.items()
        if key not in data and (name != "cmaes" or isinstance(d, CategoricalDistribution))
    }


def ask(
    study: optuna.Study,
    name: Sampler,
    found: Distributions,
    fixed: dict[str, Any],
    batch: dict[str, int],
) -> None:
    """Draw the values that are not fixed, and add the trial to a batch.

    The sampler works on a copy in memory, so that one transaction adds the trial.
    """
    memory = optuna.create_study(direction="maximize")
    memory.add_trials(study.get_trials(deepcopy=False))
    memory.sampler = PartialFixedSampler(fixed, _sampler(name, batch["worker"], len(memory.trials)))
    memory.ask(dict(found))
    asked = memory.trials[-1]
    study.add_trial(
        create_trial(
            state=TrialState.RUNNING,
            params=asked.params,
            distributions=asked.distributions,
            system_attrs=asked.system_attrs,
            user_attrs=batch,
        )
    )


def batch(
    study: optuna.Study,
    name: Sampler,
    found: Distributions,
    data: Collection[str],
    *,
    worker: int,
    size: int,
    trials: int,
) -> list[FrozenTrial]:
    """Return the worker's unfinished batch or a new one, or [] once the study has all trials.

    `data` names the keys that are not structural.
    """
    mine = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("worker") == worker]
    facts = {"worker": worker, "batch": len(study.trials)}
    facts["batch_size"] = min(size, trials - facts["batch"])
    if mine:
        last = {key: mine[-1].user_attrs[key] for key in facts}
        members = [t for t in mine if t.user_attrs["batch"] == last["batch"]]
        unfinished = any(t.state is TrialState.RUNNING for t in members)
        if unfinished or len(members) < last["batch_size"]:
            facts = last
    while True:
        of_batch = [
            t for t in study.get_trials(deepcopy=False) if facts.items() <= t.user_attrs.items()
        ]
        if len(of_batch) >= facts["batch_size"]:
            return of_batch
        if name == "grid":
            fixed = next_point(found, data, study.get_trials(deepcopy=False))
        else:
            fixed = shared_structure(name, found, data, of_batch)
        ask(study, name, found, fixed, facts)
