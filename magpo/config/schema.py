"""A run's configuration as frozen dataclasses, and the checks of plain values."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, cast, get_type_hints

import jax
import numpy as np
import yaml
from pydantic import Field, GetPydanticSchema

from magpo import contract
from magpo.config import members
from magpo.config.members import Member, Setting
from magpo.contract import AlgorithmConfig
from magpo.errors import ConfigError
from magpo.files import UNREADABLE
from magpo.values import (
    Integer,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    UserPath,
    unknown_key,
    validate,
)

# Written in C: faster, but deep nesting, possible only in a long text, overflows its stack.
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# The keys that concern this process, not the run, and so are not in config.yaml.
OF_THIS_PROCESS: dict[str, Any] = {
    "resume": None,
    "allow_changes": [],
    "distributed": {"coordinator": None, "num_processes": None, "process_id": None},
}
# The keys that do not change what a run trains and measures.
WITHOUT_EFFECT = ("logger", "results_dir", "keep", "checkpoint_share")


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
    wandb: bool
    mlflow: bool
    tags: tuple[str, ...]


@dataclass(frozen=True)
class DistributedConfig:
    """This process among several; all None under SLURM or for a single process."""

    coordinator: str | None  # host:port of process 0
    num_processes: PositiveInt | None
    process_id: NonNegativeInt | None

    def __post_init__(self) -> None:
        given = [value is not None for value in vars(self).values()]
        if any(given) != all(given):
            raise ValueError("needs coordinator, num_processes and process_id, or none of them")
        if not re.search(r".:\d+$", self.coordinator or "none:0"):
            raise ValueError(f"coordinator must be host:port, not {self.coordinator!r}")
        if all(given) and self.process_id not in range(self.num_processes or 0):
            raise ValueError(f"process_id must be below num_processes, not {self.process_id}")


@dataclass(frozen=True)
class RunConfig:
    """The configuration of one run. All steps are environment steps of one member."""

    system: str
    env: EnvConfig
    # The system's own `Config`, opaque to this file; `vary` is not applied to it.
    algorithm: Annotated[AlgorithmConfig, GetPydanticSchema(lambda _, handler: handler(Any))]
    seeds: tuple[Seed, ...]
    vary: dict[str, tuple[float | None, ...]]  # by dotted key: {"system.delta": (1.1, 1.2)}
    vary_in_step: bool  # the first value of every key, then the second; False: all combinations
    seeds_per_batch: PositiveInt | None  # members trained at once on a device, or on the CPU
    total_steps: Annotated[Integer, Field(gt=0, lt=10**15)]  # as requested
    num_envs: PositiveInt
    rollout_length: PositiveInt
    num_evaluations: PositiveInt
    eval_episodes: PositiveInt
    absolute_metric: bool
    budget: str
    tuned: bool  # whether tuned values were used
    published: bool  # whether the game is the one of the papers' results
    imports: dict[str, str]  # hashes of the user's files that system and task come from
    precision: Literal["float32", "bfloat16"]
    platform: Literal["auto", "cpu", "gpu", "tpu"]
    logger: LoggerConfig
    results_dir: UserPath
    keep: NonNegativeInt  # checkpoints; 0: none are written
    checkpoint_share: Annotated[PositiveFloat, Field(le=1)]  # of the run's time
    resume: UserPath | None  # a run's folder, or "auto"
    allow_changes: tuple[str, ...]  # keys whose values may differ from the resumed run's
    distributed: DistributedConfig

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different numbers, not {list(self.seeds)}")
        self._check_vary()
        steps = self.steps_per_update
        if steps >= 2**31:
            raise ValueError(f"num_envs * rollout_length must be below {2**31}, not {steps}")
        if self.updates_per_chunk == 0:
            most = self.total_steps // steps
            hint = f" or num_evaluations at most {most}" if most else ""
            raise ValueError(
                f"total_steps must be at least {self.num_evaluations * steps}{hint}, not "
                f"{self.total_steps}: one update of num_envs * rollout_length = {steps} steps "
                f"before each of num_evaluations = {self.num_evaluations}"
            )
        if self.num_updates >= 2**31:
            raise ValueError(
                f"total_steps must be below {2**31 * steps}, not {self.total_steps}: "
                f"2**31 updates of num_envs * rollout_length = {steps} steps"
            )

    def _check_vary(self) -> None:
        if self.vary_in_step:
            sizes = {key: len(values) for key, values in self.vary.items()}
            if len({*sizes.values()}) > 1 or 0 in sizes.values():
                raise ValueError(f"vary_in_step: keys must have equally many values, not {sizes}")
            found = [tuple(map(as_float32, setting.values())) for setting in self.settings]
            if len({*found}) < len(found):
                raise ValueError("vary_in_step: two settings are the same")
            return
        for key, values in self.vary.items():
            if not values or len({*map(as_float32, values)}) < len(values):
                raise ValueError(
                    f"vary.{key} must be one or more different values, not {list(values)}"
                )

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The combinations of the varied values; one empty setting if nothing varies."""
        return members.settings(self.vary, self.vary_in_step)

    @property
    def members(self) -> tuple[Member, ...]:
        """The members to train: every setting with every seed; the seeds change fastest."""
        return members.members(self.seeds, self.settings)

    def algorithm_of(self, setting: Setting) -> AlgorithmConfig:
        """Return the system's configuration with the values of a setting."""
        values = {members.short_key(key): value for key, value in setting.items()}
        hyper = replace(self.algorithm.hyper, **values)
        return cast(AlgorithmConfig, replace(cast(Any, self.algorithm), hyper=hyper))

    def member_hyper(self) -> Any:
        """Return the hyperparameters of all members; each float is (M,) float32."""
        data = [contract.as_data(self.algorithm_of(m.setting).hyper) for m in self.members]
        return jax.tree.map(lambda *values: np.stack(values), *data)

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.rollout_length

    @property
    def updates_per_chunk(self) -> int:
        """The number of updates between two evaluations."""
        return self.total_steps // self.steps_per_update // self.num_evaluations

    @property
    def num_updates(self) -> int:
        return self.updates_per_chunk * self.num_evaluations

    @property
    def steps_per_chunk(self) -> int:
        return self.updates_per_chunk * self.steps_per_update

    @property
    def trained_steps(self) -> int:
        """The environment steps trained: `total_steps`, rounded down to whole chunks."""
        return self.num_updates * self.steps_per_update


def as_float32(value: float | None) -> float | None:
    """Return a value rounded to float32, as the compiled programs use it."""
    return None if value is None else float(np.float32(value))


def dump(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain values under the command line's names."""
    values = asdict(config)
    algorithm = values.pop("algorithm")
    about = ("system", "budget", "tuned", "published", "imports")
    values["run"] = {key: values.pop(key) for key in about}
    values["run"]["env"], values["env"] = values["env"].values()
    values["system"] = algorithm["hyper"]
    values |= {part: algorithm[part] for part in ("network",) if part in algorithm}
    values["vary"] = nested(values["vary"])
    if not values["vary_in_step"]:  # as in the files of earlier versions
        del values["vary_in_step"]
    for key in OF_THIS_PROCESS:
        del values[key]
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return {"run": plain.pop("run"), **plain}


def dump_setting(config: RunConfig, setting: Setting) -> dict[str, Any]:
    """Return what `dump` would return if the run trained this setting alone."""
    algorithm = config.algorithm_of(setting)
    return dump(replace(config, vary={}, vary_in_step=False, algorithm=algorithm))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return the differences between two dumps, by key, as "old value, now new value".

    Keys that are WITHOUT_EFFECT are not compared.
    """
    flat_old, flat_new = flat(old), flat(new)
    return {
        key: f"{flat_old.get(key, 'none')}, now {flat_new.get(key, 'none')}"
        for key in {**flat_old, **flat_new}
        if flat_old.get(key) != flat_new.get(key) and key.partition(".")[0] not in WITHOUT_EFFECT
    }


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries from values with dotted names."""
    root: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        group = root
        for parent in parents:
            group = group.setdefault(parent, {})
        group[last] = value
    return root


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by dotted name; an empty dictionary is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_group = isinstance(value, Mapping) and value
        leaves |= flat(value, f"{name}.") if is_group else {name: value}
    return leaves


def check(module: ModuleType, values: Mapping[str, Any]) -> RunConfig:
    """Make a RunConfig from plain values under the names of `dump`. Raises ConfigError."""
    values = {"vary": {}, "vary_in_step": False, **OF_THIS_PROCESS, **values, "algorithm": None}
    if isinstance(values.get("logger"), Mapping):  # earlier versions' files lack these
        values["logger"] = {"wandb": False, "mlflow": False, **values["logger"]}
    schema = contract.algorithm(module).Config
    floats = contract.float_names(get_type_hints(schema)["hyper"])
    if isinstance(values["vary"], Mapping):
        values["vary"] = flat(values["vary"])
        for key in values["vary"]:
            if key not in [f"system.{name}" for name in floats]:
                raise ConfigError(f"vary.{key}: only floats can vary: {', '.join(floats)}")
    parts = {"hyper": values.pop("system", {})}
    if network := values.pop("network", {}):
        parts["network"] = network
    run = {"published": False, "imports": {}, **values.pop("run")}
    values |= run | {"env": {"name": run["env"], "options": values.get("env", {})}}
    config = validate(RunConfig, values)
    asked_for = [f.name for f in fields(schema) if f.name not in ("hyper", "network")]
    parts |= {number: getattr(config, number) for number in asked_for}
    config = replace(config, algorithm=validate(schema, parts))
    may_change = [*flat(dump(config)), "with.magpo", "with.jax", "with.devices"]
    for key in config.allow_changes:
        if key not in may_change:
            raise ConfigError(f"allow_changes: {unknown_key(key, may_change)}")
    for setting in config.settings if config.vary else ():
        varied = {members.short_key(key): value for key, value in setting.items()}
        try:
            validate(schema, parts | {"hyper": parts["hyper"] | varied})
        except ConfigError as error:
            raise ConfigError(f"vary: {error}") from error
    return config


def plain_values(file: Path) -> dict[str, Any]:
    """Read the values of a run's config.yaml without checking them. Raises ConfigError."""
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.load(text, FAST_LOADER if len(text) < 2**12 else yaml.SafeLoader)
    except UNREADABLE as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: not the configuration of a run")
    return values
