"""A run's configuration as frozen dataclasses, and how plain values are checked."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

import jax
import numpy as np
import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetPydanticSchema,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails

from magpo import contract
from magpo.config import members
from magpo.config.members import Member, Setting
from magpo.contract import AlgorithmConfig
from magpo.errors import ConfigError, nearest
from magpo.files import UNREADABLE

T = TypeVar("T")
# In C: faster, but deep nesting, which takes a long text, overflows its stack.
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# The keys that are no part of a run, and so not in its config.yaml.
OF_THIS_PROCESS: dict[str, Any] = {
    "resume": None,
    "allow_changes": [],
    "distributed": {"coordinator": None, "num_processes": None, "process_id": None},
}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 2e7 steps


PositiveInt = Annotated[int, BeforeValidator(_whole), Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ is the home folder
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**32)]


def must_divide(key: str, value: int, of: str, number: int) -> None:
    """Raise ValueError where `value`, set by `key`, does not divide `number`, named `of`."""
    if number % value:
        raise ValueError(f"{key} must divide {of} = {number}, not {value}")


@dataclass(frozen=True)
class EnvConfig:
    name: str  # "rware/tiny-4ag"
    options: dict[str, Any]  # of the task's YAML, overrides applied; checked by magpo.envs.make


@dataclass(frozen=True)
class LoggerConfig:
    console: bool
    plot: bool
    tensorboard: bool
    neptune: bool
    neptune_project: str | None
    tags: tuple[str, ...]


@dataclass(frozen=True)
class DistributedConfig:
    """This process among several; all None where SLURM says it, or there is but one."""

    coordinator: str | None  # host:port of process 0
    num_processes: PositiveInt | None
    process_id: NonNegativeInt | None

    def __post_init__(self) -> None:
        if self.coordinator is None and self.num_processes is None and self.process_id is None:
            return
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            raise ValueError("needs coordinator, num_processes and process_id, or none of them")
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"coordinator must be host:port, not {self.coordinator!r}")
        if self.process_id >= self.num_processes:
            raise ValueError(
                f"process_id must be below num_processes={self.num_processes}, "
                f"not {self.process_id}"
            )


@dataclass(frozen=True)
class RunConfig:
    """All of one run. Steps count the environment steps of one member."""

    system: str
    env: EnvConfig
    # The system's own `Config`, of which this file knows no more; `vary` is not applied to it.
    algorithm: Annotated[AlgorithmConfig, GetPydanticSchema(lambda _, handler: handler(Any))]
    seeds: tuple[Seed, ...]
    vary: dict[str, tuple[float | None, ...]]  # by dotted key: {"system.delta": (1.1, 1.2)}
    seeds_per_batch: PositiveInt | None  # members trained at once on a device, or on the CPU
    total_steps: Annotated[int, BeforeValidator(_whole), Field(gt=0, lt=10**15)]  # as asked for
    num_envs: PositiveInt
    rollout_length: PositiveInt
    num_evaluations: PositiveInt
    eval_episodes: PositiveInt
    absolute_metric: bool
    budget: str
    tuned: bool  # whether tuned values were used
    imports: dict[str, str]  # the user's files that system and task come from, with their hashes
    precision: Literal["float32", "bfloat16"]
    platform: Literal["auto", "cpu", "gpu", "tpu"]
    logger: LoggerConfig
    results_dir: UserPath
    keep: NonNegativeInt  # checkpoints; 0: none are written
    checkpoint_share: Annotated[PositiveFloat, Field(le=1)]  # of the run's time
    resume: UserPath | None  # a run's folder, or "auto"
    allow_changes: tuple[str, ...]  # keys that may differ from those of the run that is resumed
    distributed: DistributedConfig

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different numbers, not {list(self.seeds)}")
        for key, values in self.vary.items():
            if not values or len({v if v is None else np.float32(v) for v in values}) < len(values):
                raise ValueError(
                    f"vary.{key} must be one or more different values, not {list(values)}"
                )
        if self.steps_per_update >= 2**31:
            raise ValueError(
                "num_envs * rollout_length, the steps of an update, must be below "
                f"{2**31}, not {self.num_envs} * {self.rollout_length}"
            )
        if self.updates_per_chunk == 0:
            needed = self.num_evaluations * self.steps_per_update
            fewer = self.total_steps // self.steps_per_update
            lower = f" or num_evaluations at most {fewer}" if fewer else ""
            raise ValueError(
                f"total_steps must be at least {needed}{lower}, not {self.total_steps}: an update "
                f"takes num_envs * rollout_length = {self.steps_per_update} steps, and each of the "
                f"{self.num_evaluations} evaluations follows one"
            )
        if self.num_updates >= 2**31:
            raise ValueError(
                f"total_steps must be below {2**31 * self.steps_per_update}, not "
                f"{self.total_steps}: an update takes num_envs * rollout_length = "
                f"{self.steps_per_update} steps, and there can be {2**31 - 1} updates"
            )

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All combinations of the varied values; one empty setting if nothing varies."""
        return members.settings(self.vary)

    @property
    def members(self) -> tuple[Member, ...]:
        """The members to train: every setting with every seed, seeds changing fastest."""
        return members.members(self.seeds, self.settings)

    def algorithm_of(self, setting: Setting) -> AlgorithmConfig:
        """Return the system's configuration with the values of a setting."""
        values = {members.short_key(key): value for key, value in setting.items()}
        hyper = replace(self.algorithm.hyper, **values)
        return cast(AlgorithmConfig, replace(cast(Any, self.algorithm), hyper=hyper))

    def member_hyper(self) -> Any:
        """Return the hyperparameters of all members, (M,) float32 each."""
        data = [contract.as_data(self.algorithm_of(m.setting).hyper) for m in self.members]
        return jax.tree.map(lambda *values: np.stack(values), *data)

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.rollout_length

    @property
    def updates_per_chunk(self) -> int:
        """Updates between two evaluations."""
        return self.total_steps // self.steps_per_update // self.num_evaluations

    @property
    def num_updates(self) -> int:
        return self.updates_per_chunk * self.num_evaluations

    @property
    def steps_per_chunk(self) -> int:
        return self.updates_per_chunk * self.steps_per_update

    @property
    def trained_steps(self) -> int:
        """`total_steps`, rounded down to whole chunks."""
        return self.num_updates * self.steps_per_update


def dump(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain values under the names of the command line."""
    values = asdict(config)
    algorithm = values.pop("algorithm")
    values["run"] = {key: values.pop(key) for key in ("system", "budget", "tuned", "imports")}
    values["run"]["env"], values["env"] = values["env"].values()
    values["system"] = algorithm["hyper"]
    values |= {part: algorithm[part] for part in ("network",) if part in algorithm}
    values["vary"] = nested(values["vary"])
    for key in OF_THIS_PROCESS:
        del values[key]
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return {"run": plain.pop("run"), **plain}


def dump_setting(config: RunConfig, setting: Setting) -> dict[str, Any]:
    """Return the configuration as `dump` does, as if nothing but this setting had been trained."""
    return dump(replace(config, vary={}, algorithm=config.algorithm_of(setting)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return the differences between two dumps, by key, as "old value, now new value".

    Where results go and how they are shown makes no difference.
    """
    flat_old, flat_new = flat(old), flat(new)
    return {
        key: f"{flat_old.get(key, 'none')}, now {flat_new.get(key, 'none')}"
        for key in {**flat_old, **flat_new}
        if flat_old.get(key) != flat_new.get(key)
        and key.partition(".")[0] not in ("logger", "results_dir", "keep", "checkpoint_share")
    }


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries whose leaves have these dotted names."""
    root: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        group = root
        for parent in parents:
            group = group.setdefault(parent, {})
        group[last] = value
    return root


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        leaves |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


def check(module: ModuleType, values: dict[str, Any]) -> RunConfig:
    """Make dataclasses of values under the names of `dump`. Raises ConfigError."""
    values = {"vary": {}, **OF_THIS_PROCESS, **values}
    schema = contract.algorithm(module).Config
    if isinstance(values["vary"], Mapping):
        values["vary"] = flat(values["vary"])
        _check_varied_keys(values["vary"], schema)
    parts = {"hyper": values.pop("system", {})}
    if network := values.pop("network", {}):
        parts["network"] = network
    run = {"imports": {}, **values.pop("run")}
    task, options = run["env"], values["env"]
    values |= {**run, "env": {"name": task, "options": options}, "algorithm": None}
    config = validate(RunConfig, values)
    asked_for = [f.name for f in fields(schema) if f.name not in ("hyper", "network")]
    parts |= {number: getattr(config, number) for number in asked_for}
    config = replace(config, algorithm=validate(schema, parts))
    may_change = [*flat(dump(config)), "with.magpo", "with.jax", "with.devices"]
    for key in config.allow_changes:
        if key not in may_change:
            raise ConfigError(f"allow_changes: {unknown_key(key, may_change)}")
    for setting in config.settings if config.vary else ():
        _check_setting(setting, schema, parts)
    return config


def _check_varied_keys(varied: Iterable[str], schema: type) -> None:
    """Raise ConfigError if a key of `vary` is not a float of `system.*`."""
    hyper = get_type_hints(schema)["hyper"]
    floats = [f"vary.system.{name}" for name in contract.float_names(hyper)]
    for key in varied:
        if f"vary.{key}" not in floats:
            group, _, name = key.partition(".")
            misspelt = group == "system" and name and name not in get_type_hints(hyper)
            hint = nearest(f"vary.{key}", floats) if misspelt else ""
            raise ConfigError(f"vary.{key}: {hint}only floats can vary: {', '.join(floats)}")


def _check_setting(setting: Setting, schema: type, parts: Mapping[str, Any]) -> None:
    """Raise ConfigError if the system does not allow the varied values."""
    varied = {members.short_key(key): value for key, value in setting.items()}
    try:
        validate(schema, {**parts, "hyper": parts["hyper"] | varied})
    except ConfigError as error:
        prefix = "vary." if str(error).startswith("system.") else "vary: "
        raise ConfigError(f"{prefix}{error}") from error


def plain_values(file: Path) -> dict[str, Any]:
    """Read the values in a run's config.yaml without checking them. Raises ConfigError."""
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.load(text, FAST_LOADER if len(text) < 2**12 else yaml.SafeLoader)
    except UNREADABLE as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: not the configuration of a run")
    return values


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Return the error line for an unknown key."""
    return f"unknown key {key!r}: {nearest(key, known)}--help lists all"


def validate(schema: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass as strictly as from JSON: no strings for numbers, no unknown keys."""
    try:
        text = json.dumps(values)
        return TypeAdapter(schema).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        # What is there without a field says more than what is missing.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
        first, *others = errors
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(_line(first, schema) + more) from None


def _line(error: ErrorDetails, schema: type) -> str:
    """Return a pydantic error as a sentence."""
    *parents, last = [str(part) for part in error["loc"]] or [""]
    # The command line's name for an algorithm's `hyper` is `system`.
    shown = ["system" if parent == "hyper" else parent for parent in parents]
    key = ".".join([*shown, "system" if last == "hyper" and not parents else last])
    if error["type"] == "unexpected_keyword_argument":
        for parent in parents:
            schema = get_type_hints(schema)[parent]
        return unknown_key(key, [".".join((*shown, field.name)) for field in fields(schema)])
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    rule = error["msg"].replace("Input should", "must").replace("a valid array", "a list")
    return f"{key} {rule.replace('an object', 'a group of keys')}, not {error['input']!r}"
