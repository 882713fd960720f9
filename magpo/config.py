"""Compose and check a run's configuration: YAML in, frozen dataclasses out.

`load("magpo", ["env=rware/tiny-4ag", "system.clip_eps=0.1"])` composes, later over earlier,
configs/experiment.yaml, configs/<system>.yaml, the task, the budget, the logger, the task's tuned
values and the overrides (Hydra's grammar). The values live there and nowhere else; the dataclasses
have none. A system module's own `Config` checks its part, so this file knows no algorithm.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

import hydra
import jax
import numpy as np
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from magpo import contract, members, paths
from magpo.contract import AlgorithmConfig
from magpo.envs import registry
from magpo.errors import ConfigError
from magpo.members import Member, Setting

T = TypeVar("T")
# The errors that reading a damaged file raises.
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(RecursionError, yaml.YAMLError),
)
GROUPS = ("env", "budget", "logger")  # folders of files to choose from, by env=rware/tiny-4ag
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
    seeds_per_batch: PositiveInt | None  # members trained at once on one device; None: all
    total_steps: Annotated[int, BeforeValidator(_whole), Field(gt=0, lt=10**15)]  # as asked for
    num_envs: PositiveInt
    rollout_length: PositiveInt
    num_evaluations: PositiveInt
    eval_episodes: PositiveInt
    absolute_metric: bool
    budget: str
    tuned: bool  # whether tuned values were used
    precision: Literal["float32", "bfloat16"]
    platform: Literal["auto", "cpu", "gpu", "tpu"]
    logger: LoggerConfig
    results_dir: str
    keep: NonNegativeInt  # checkpoints; 0: none are written
    resume: str | None  # a run's folder, or "auto"
    allow_changes: tuple[str, ...]  # keys that may differ from those of the run that is resumed
    distributed: DistributedConfig

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different numbers, not {list(self.seeds)}")
        for key, values in self.vary.items():
            if not values or len(set(values)) < len(values):
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


def systems() -> list[str]:
    """Return the names of the systems in the package."""
    package = import_module("magpo.systems")
    return sorted(m.name for m in iter_modules(package.__path__) if not m.name.startswith("_"))


def load(
    system: str | ModuleType, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> RunConfig:
    """Compose and check a run's configuration.

    `system` is one of `systems()`, or the module of a system of your own, whose YAML has the
    module's name and lies beside it, or in `config_dir`. That folder may hold budget/, logger/ and
    tuned/ files too. Raises ConfigError.
    """
    name, folders = locate(system, config_dir)
    resumes = [o for o in map(parse, overrides) if o.key_or_group == "resume" and not o.is_delete()]
    folder = resumes[-1].value() if resumes else None
    if folder not in (None, "auto"):
        if not isinstance(folder, str):
            raise ConfigError(f"{resumes[-1].input_line!r}: resume must be a run's folder or auto")
        return _resumed(system, name, folders, Path(folder), overrides)
    return build(system, name, folders, *_compose(name, overrides, folders))


def dump(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain values under the names of the command line."""
    values = asdict(config)
    algorithm = values.pop("algorithm")
    values["run"] = {key: values.pop(key) for key in ("system", "budget", "tuned")}
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


def read(system: str | ModuleType, file: Path) -> RunConfig:
    """Read a run's config.yaml and check it like a new one. Raises ConfigError."""
    return from_values(system, plain_values(file), file)


def plain_values(file: Path) -> dict[str, Any]:
    """Read the values in a run's config.yaml without checking them. Raises ConfigError."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UNREADABLE as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: not the configuration of a run")
    return values


def from_values(system: str | ModuleType, values: Any, source: Path) -> RunConfig:
    """Make a run's configuration of the plain values of `dump`. Raises ConfigError."""
    name, _ = locate(system, None)
    try:
        if values["run"]["system"] != name:
            raise ConfigError(f"a run of {values['run']['system']}, not of {name}")
        return _check(system, name, values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{source}: not the configuration of a run") from error
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return the differences between two dumps, by key, as "old value, now new value".

    Where results go and how they are shown makes no difference.
    """
    flat_old, flat_new = flat(old), flat(new)
    return {
        key: f"{flat_old.get(key, 'none')}, now {flat_new.get(key, 'none')}"
        for key in {**flat_old, **flat_new}
        if flat_old.get(key) != flat_new.get(key)
        and key.partition(".")[0] not in ("logger", "results_dir", "keep")
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


def _resumed(
    system: str | ModuleType,
    name: str,
    folders: Sequence[Path],
    folder: Path,
    overrides: Sequence[str],
) -> RunConfig:
    """Read the configuration of the run in `folder` and apply the overrides to it."""
    try:
        found = (folder / "config.yaml").is_file()
    except OSError as error:
        raise ConfigError(f"resume: the folder cannot be read: {error.strerror}") from error
    if not found:
        raise ConfigError(f"resume={folder}: no run there (it has no config.yaml); or resume=auto")
    values = dump(read(system, folder / "config.yaml"))
    values |= deepcopy(OF_THIS_PROCESS) | {"resume": str(folder)}
    task = values["run"]["env"]
    for text in _checked(overrides, folders):
        override = parse(text)
        key, value = override.key_or_group, override.value()
        if key == "env" and value != task:
            raise ConfigError(f"resume={folder}: is a run on {task}, not on {value}")
        if key in ("env", "budget", "tuned"):
            values["run"][key] = value == "true" if key == "tuned" else value
        elif key == "logger":
            chosen, choices = _compose(name, [f"env={task}", f"logger={value}"], folders)
            values["logger"] = dump(build(system, name, folders, chosen, choices))["logger"]
        elif key.startswith("vary.") and not override.is_delete():
            values["vary"] = nested(flat(values["vary"]) | {key.removeprefix("vary."): value})
        elif key != "resume":
            *parents, last = key.split(".")
            group: Any = values
            for parent in parents:
                group = group.get(parent, {}) if isinstance(group, dict) else {}
            new = not isinstance(group, dict) or last not in group
            if new or override.is_add() or override.is_delete():
                raise ConfigError(unknown_key(key, list(_keys(values))))
            group[last] = value
    return _check(system, name, values)


def locate(system: str | ModuleType, config_dir: Path | None) -> tuple[str, list[Path]]:
    """Return the system's name and the folders with YAML files, first the one with its own."""
    if isinstance(system, ModuleType):
        source = Path(str(system.__file__))
        name, config_dir = source.stem, config_dir or source.parent
    elif system in systems():
        name = system
    else:
        raise ConfigError(registry.unknown("system", system, systems()))
    folders = [folder.resolve() for folder in (config_dir, paths.configs()) if folder]
    folders.sort(key=lambda folder: not (folder / f"{name}.yaml").is_file())
    if not (folders[0] / f"{name}.yaml").is_file():
        raise ConfigError(f"no {name}.yaml in {' or '.join(map(str, folders))}")
    return name, folders


def option_names(folders: Sequence[Path], group: str) -> list[str]:
    """Return the names that `group=` can take: its YAML files."""
    roots = [folder / group for folder in folders]
    files = [file.relative_to(root) for root in roots for file in root.rglob("*.yaml")]
    return sorted({file.with_suffix("").as_posix() for file in files})


def build(
    system: str | ModuleType,
    name: str,
    folders: Sequence[Path],
    config: DictConfig,
    choices: Mapping[str, str],
) -> RunConfig:
    """Check what was composed; `choices` has each group's file. Raises ConfigError."""
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).partition("\n")[0]) from error
    values["run"] = {
        "system": name,
        "env": choices["env"],
        "budget": choices.get("budget", "none"),
        "tuned": choices.get("tuned") in option_names(folders, "tuned"),
    }
    return _check(system, name, values)


def _check(system: str | ModuleType, name: str, values: dict[str, Any]) -> RunConfig:
    """Make dataclasses of values under the names of `dump`. Raises ConfigError."""
    values = {"vary": {}, **OF_THIS_PROCESS, **values}
    module = system if isinstance(system, ModuleType) else import_module(f"magpo.systems.{name}")
    schema = contract.algorithm(module).Config
    if isinstance(values["vary"], Mapping):
        values["vary"] = flat(values["vary"])
        _check_varied_keys(values["vary"], schema, list(flat(values)))
    parts = {"hyper": values.pop("system", {})}
    if network := values.pop("network", {}):
        parts["network"] = network
    run = values.pop("run")
    task, options = run["env"], values["env"]
    known = registry.options(task)
    for option in options:
        if option not in known:
            raise ConfigError(registry.unknown(f"option of {task}", option, list(known)))
    values |= {**run, "env": {"name": task, "options": options}, "algorithm": None}
    config = _validate(RunConfig, values)
    numbers = ("num_envs", "rollout_length", "updates_per_chunk", "num_updates")
    asked_for = {field.name for field in fields(schema)}
    parts |= {number: getattr(config, number) for number in numbers if number in asked_for}
    config = replace(config, algorithm=_validate(schema, parts))
    for setting in config.settings if config.vary else ():
        _check_setting(setting, schema, parts)
    return config


def _check_varied_keys(keys: Iterable[str], schema: type, known: Sequence[str]) -> None:
    """Raise ConfigError if a key of `vary` is not a float of `system.*`."""
    hyper = get_type_hints(schema)["hyper"]
    kinds = get_type_hints(hyper)
    floats = [f"system.{name}" for name in contract.float_names(hyper)]
    for key in keys:
        if key in floats:
            continue
        if key not in known:
            raise ConfigError(unknown_key(f"vary.{key}", [f"vary.{name}" for name in floats]))
        kind = kinds.get(members.short_key(key)) if key.startswith("system.") else None
        what = {None: "outside system.*", int: "a count"}.get(kind, "a choice")
        raise ConfigError(f"vary.{key}: {key} is {what}: only floats can vary: {', '.join(floats)}")


def _check_setting(setting: Setting, schema: type, parts: Mapping[str, Any]) -> None:
    """Raise ConfigError if the system does not allow the varied values."""
    varied = {members.short_key(key): value for key, value in setting.items()}
    try:
        _validate(schema, {**parts, "hyper": parts["hyper"] | varied})
    except ConfigError as error:
        prefix = "vary." if str(error).startswith("system.") else "vary: "
        raise ConfigError(f"{prefix}{error}") from error


def _compose(
    name: str, overrides: Sequence[str], folders: Sequence[Path]
) -> tuple[DictConfig, dict[str, str]]:
    """Return the composed configuration and each group's choice."""
    overrides = _checked(overrides, folders)
    try:
        return _hydra_compose(name, overrides, folders)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, name, overrides, folders)) from error


def _hydra_compose(
    name: str, overrides: Sequence[str], folders: Sequence[Path]
) -> tuple[DictConfig, dict[str, str]]:
    for task, (_, options) in registry.registered.items():
        suite, _, last = task.partition("/")
        ConfigStore.instance().store(last, options, f"env/{suite}", "env")
    with hydra.initialize_config_dir(str(folders[0]), version_base="1.3"):
        config = hydra.compose(name, [search_path(folders), *overrides], return_hydra_config=True)
    ours = [str(key) for key in config if key != "hydra"]
    return OmegaConf.masked_copy(config, ours), dict(config.hydra.runtime.choices)


def search_path(folders: Sequence[Path]) -> str:
    """Return the override that lets Hydra look beyond the first folder."""
    return f"hydra.searchpath={json.dumps([folder.as_uri() for folder in folders[1:]])}"


def _checked(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the overrides as Hydra takes them. Raises ConfigError if one cannot be read or chooses
    a file that does not exist."""
    known = {group: option_names(folders, group) for group in GROUPS} | {"env": registry.tasks()}
    overrides = hydra_spelling(overrides)
    for text in overrides:
        override = parse(text)
        key, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            raise ConfigError(f"{text!r}: a list is written [0,1], a sweep needs --multirun")
        if override.package is not None:
            raise ConfigError(f"{text!r}: write {key}=<value>, without @{override.package}")
        if key.partition(".")[0] == "run":  # `dump` adds this group; nobody sets it
            raise ConfigError(unknown_key(key, []))
        if override.is_delete():
            continue
        if key in known and value not in known[key]:
            what, allowed = ("task", registry.suites()) if key == "env" else (key, None)
            raise ConfigError(registry.unknown(what, str(value), known[key], allowed))
    return overrides


def hydra_spelling(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with `tuned=` and `vary.*=` as Hydra takes them.

    To Hydra, tuned/ is a group of files: true is what its YAML chooses, false no file's name. Keys
    below `vary` are new to it, and have to be added. Raises ConfigError.
    """
    off = "tuned='false'"
    words = {"tuned=true": [], "tuned=false": [off], off: [off]}
    spelled = []
    for text in overrides:
        plain = text.lstrip("+")
        lower = plain.lower()
        if lower.startswith("tuned=") and lower not in words:
            raise ConfigError(f"tuned must be true or false, not {text.partition('=')[2]!r}")
        added = f"++{plain}" if plain.startswith(("vary.", "vary=")) else text
        spelled += words.get(lower, [added])
    return spelled


def parse(text: str) -> Override:
    """Parse one argument, key=value in Hydra's grammar. Raises ConfigError."""
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        raise ConfigError(
            f"cannot read {text!r}: write key=value, a list as key=[0,1], special characters as "
            "\"key='...'\""
        ) from error


def _explain(error: Exception, name: str, overrides: Sequence[str], folders: Sequence[Path]) -> str:
    """Return one line with the nearest match for an error of Hydra's, which has several without."""
    parsed = [(text, parse(text)) for text in overrides]
    if not any(o.key_or_group == "env" and not o.is_delete() for _, o in parsed):
        return f"no task chosen: write env=<suite>/<task>, of {', '.join(registry.suites())}"
    try:  # with the files chosen, and no value overridden
        choices = [text for text, o in parsed if o.key_or_group in GROUPS]
        known = [*_keys(_hydra_compose(name, choices, folders)[0]), *GROUPS, "tuned"]
    except (HydraException, ValueError):  # the fault is in a file
        return str(error).partition("\n")[0]
    for _, o in parsed:
        key = o.key_or_group
        if not o.is_add() and key not in known:
            owners = ", ".join(_systems_with(key, folders))
            here = f"{key!r} is a key of {owners}, not of {name}; --help lists all"
            return here if owners else unknown_key(key, known)
    return str(error).partition("\n")[0]


def _systems_with(key: str, folders: Sequence[Path]) -> list[str]:
    """Return the package's systems whose YAML has this key."""
    files = (folder / f"{system}.yaml" for folder in folders for system in systems())
    return [f.stem for f in files if f.is_file() and key in set(_keys(OmegaConf.load(f)))]


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values and groups of values."""
    for key in node:
        yield f"{prefix}{key}"
        if isinstance(node[key], Mapping):
            yield from _keys(node[key], f"{prefix}{key}.")


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Return the error line for an unknown key. Of the dotted names `known`, one with the same last
    part is nearest."""
    leaf = key.rpartition(".")[2]
    nearest = [name for name in known if name.rpartition(".")[2] == leaf]
    nearest = nearest or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown key {key!r}: {hint}--help lists all"


def _validate(schema: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass as strictly as from JSON: no strings for numbers, no unknown keys."""
    try:
        text = json.dumps(values)
        return TypeAdapter(schema).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first, *others = error.errors()
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
