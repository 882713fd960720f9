"""Search spaces: the keys that a study varies, and their values.

A space consists of configs/sweep/<system>.yaml and changes from the command line:

    space.system.delta=[1.1,1.5,null]       one of these values
    space.system.gae_lambda=0.9..1          a range; of whole numbers if the key is a count
    space.system.actor_lr=log:1e-5..1e-3    a range, sampled uniformly in its logarithm
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from magpo import config as configuration
from magpo.config.schema import RunConfig
from magpo.errors import ConfigError, nearest

GROUPS, OTHERS = ("system", "network"), ("num_envs", "rollout_length")
FORMS = "write a list [a,b], a range low..high, or log:low..high"
Space = dict[str, Any]  # a list or a range's text, by dotted key: {"system.delta": [1.1, 1.5]}


class Range(NamedTuple):
    """The numbers from `low` to `high`."""

    low: float
    high: float
    log: bool


def read_range(key: str, text: Any) -> Range:
    """Parse the text of a range. Raises ConfigError."""
    number = r"([-+]?\d+\.?\d*(?:[eE][-+]?\d+)?)"
    found = re.fullmatch(rf"(log:)?{number}\.\.{number}", text) if isinstance(text, str) else None
    if not found:
        raise ConfigError(f"space.{key}: {FORMS}, not {json.dumps(text)}")
    read = Range(float(found[2]), float(found[3]), bool(found[1]))
    if not read.low < read.high < math.inf:
        raise ConfigError(f"space.{key}: {text}: the first number must be the smaller one")
    if read.log and read.low <= 0:
        raise ConfigError(f"space.{key}: {text}: a logarithmic range must be above 0")
    return read


def distributions(space: Space, config: RunConfig) -> dict[str, BaseDistribution]:
    """Return each key's distribution, checked against the configuration. Raises ConfigError."""
    values = configuration.flat(configuration.dump(config))
    known = [key for key in values if key.partition(".")[0] in GROUPS or key in OTHERS]
    found = dict[str, BaseDistribution]()
    for key, choice in space.items():
        if key not in known:
            near = nearest(f"space.{key}", [f"space.{name}" for name in known])
            allowed = ", ".join([*(f"{group}.*" for group in GROUPS), *OTHERS])
            raise ConfigError(f"unknown key 'space.{key}': {near}a space has keys of {allowed}")
        found[key] = _distribution(key, choice, values[key])
    return found


def _distribution(key: str, choice: Any, present: Any) -> BaseDistribution:
    """Return a key's distribution; `present` is the key's value in the configuration."""
    if isinstance(choice, list):
        if not choice or len({*map(json.dumps, choice)}) < len(choice):
            raise ConfigError(f"space.{key} must be one or more different values, not {choice}")
        if any(isinstance(value, list | dict) for value in choice):
            raise ConfigError(f"space.{key}: {FORMS}, not {choice}")
        return CategoricalDistribution(choice)
    low, high, log = read_range(key, choice)
    if isinstance(present, bool | str):
        raise ConfigError(f"space.{key}: {present!r} is not a number: write a list, not a range")
    if isinstance(present, int):
        if low % 1 or high % 1:
            raise ConfigError(f"space.{key}: {choice}: must be whole numbers")
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def corners(distribution: BaseDistribution) -> Sequence[Any]:
    """Return all choices, or the ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low, distribution.high


def override(key: str, value: Any) -> str:
    """Return a value or a list of values as an argument of the command line."""
    return f"{key}={json.dumps(value, separators=(',', ':'))}"


def check_values(
    system: str, overrides: Sequence[str], found: Mapping[str, BaseDistribution]
) -> None:
    """Raise ConfigError if the system does not accept one of a key's values."""
    for key, distribution in found.items():
        for value in corners(distribution):
            try:
                configuration.load(system, [*overrides, override(key, value)])
            except ConfigError as error:
                raise ConfigError(f"space.{key}: {error}") from error
