"""The tasks by name: `make("rware/tiny-4ag")` builds the task of configs/env/rware/tiny-4ag.yaml.

The suite's options, with comments, are in configs/env/rware.yaml. A new task needs a YAML file; a
new suite needs a YAML file, a module beside this one and a line in SUITES.
"""

import math
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from omegaconf import OmegaConf

from magpo import files
from magpo.envs import simulators
from magpo.errors import ConfigError, nearest
from magpo.types import Environment

# The class in each suite's module, imported on first use because simulators are slow to import.
SUITES = {
    "coordsum": "CoordSum",
    "lbf": "Lbf",
    "connector": "Connector",
    "mpe": "Mpe",
    "rware": "Rware",
    "smax": "Smax",
    "mabrax": "Mabrax",
}


# The user's own tasks: the function that builds each, and its options.
registered: dict[str, tuple[Callable[..., Environment], dict[str, Any]]] = {}


def register(task: str, build: Callable[..., Environment], **options: Any) -> None:
    """Register a task of your own, "suite/task", for `make` and `env=`.

    The task is built by `build(name=task, global_state=..., **options)`, after overrides of the
    options. Re-registering a name replaces the earlier task. Raises ValueError if the name is not
    "suite/task" or the suite is one of magpo's.
    """
    suite, _, name = task.partition("/")
    if suite in SUITES or not re.fullmatch(r"[\w.-]+", suite) or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{task!r}: must be <a suite of your own>/<task>, of letters and digits")
    registered[task] = build, options


def tasks() -> list[str]:
    """Return the names of all tasks, "suite/task"."""
    root = files.configs() / "env"
    published = [
        f"{suite}/{task}"
        for suite in SUITES
        for task in sorted((f.stem for f in root.glob(f"{suite}/*.yaml")), key=_in_order)
    ]
    return [*published, *registered]


def _in_order(task: str) -> list[str | int]:
    """Return a sort key that orders numbers by value: 5x5 before 10x10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", task)]


def suites() -> list[str]:
    """Return the suites of all tasks, as "suite/..."."""
    return list(dict.fromkeys(task.partition("/")[0] + "/..." for task in tasks()))


def options(task: str) -> dict[str, Any]:
    """Return the suite's options, updated with the task's values.

    Raises ConfigError for a task that is not in `tasks()` or lacks a value.
    """
    known, suite = tasks(), task.partition("/")[0]
    if task not in known:
        siblings = [name for name in known if name.startswith(f"{suite}/")]
        raise unknown("task", task, known, siblings or suites())
    if task in registered:
        return dict(registered[task][1])
    root = files.configs() / "env"
    merged = OmegaConf.merge(*(OmegaConf.load(root / f"{name}.yaml") for name in (suite, task)))
    if missing := OmegaConf.missing_keys(merged):
        raise ConfigError(f"{task}.yaml must have a value for {', '.join(sorted(missing))}")
    values: Any = OmegaConf.to_container(merged)
    return dict(values)


def make(task: str, /, *, global_state: bool = False, **overrides: Any) -> Environment:
    """Build one environment, agent ids included.

    `global_state` adds `Observation.global_state`; the other keywords replace the task's options.
    Raises ConfigError for an unknown task or option, for a value of the wrong type or out of range,
    and if the simulator is not installed.
    """
    values = options(task)
    for option, value in overrides.items():
        if option not in values:
            raise unknown(f"option of {task}", option, list(values))
        kind = type(values[option])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"{task}: {option} must be of type {kind.__name__}, not {value!r}")
        counts = option != "time_limit" and task not in registered
        most = 10_000 if counts else 2**31 - 1
        if kind is int and value > most:
            raise ConfigError(f"{task}: {option} must be at most {most}, not {value}")
        if kind is float and not math.isfinite(value):
            raise ConfigError(f"{task}: {option} must be finite, not {value}")
        values[option] = value
    suite = task.partition("/")[0]
    try:
        if task in registered:
            build = registered[task][0]
        else:
            with simulators.notebook_hidden():
                build = getattr(import_module(f"magpo.envs.{suite}"), SUITES[suite])
        return build(name=task, global_state=global_state, **values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def unknown(
    what: str, name: str, known: Sequence[str], allowed: Sequence[str] | None = None
) -> ConfigError:
    """Return the error for a name not in `known`; it lists `allowed`, if given, instead."""
    listed = ", ".join(allowed or known)
    return ConfigError(f"unknown {what} {name!r}: {nearest(name, known)}allowed: {listed}")


def at_least(env: Any, **lowest: float) -> None:
    """Raise a one-line ValueError if an option of `env` is below the value given for it."""
    for option, low in lowest.items():
        value = getattr(env, option)
        if not value >= low:  # nan is refused too
            raise ValueError(f"{env.name}: {option} must be at least {low}, not {value}")


def at_most(env: Any, why: str = "", /, **highest: float) -> None:
    """Raise a one-line ValueError if an option of `env` is above the value given for it."""
    because = f" {why}" if why else ""
    for option, high in highest.items():
        value = getattr(env, option)
        if not value <= high:
            raise ValueError(f"{env.name}: {option} must be at most {high}{because}, not {value}")


def one_of(env: Any, **choices: Sequence[str]) -> None:
    """Raise a one-line ValueError if an option of `env` is not one of the words given for it."""
    for option, allowed in choices.items():
        if getattr(env, option) not in allowed:
            raise unknown(f"{option} of {env.name}", getattr(env, option), allowed)
