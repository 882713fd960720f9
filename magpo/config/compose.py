"""Compose a run's configuration: YAML files and overrides in, a RunConfig out.

`load("magpo", ["env=rware/tiny-4ag", "system.clip_eps=0.1"])` merges, later over earlier,
configs/experiment.yaml, configs/<system>.yaml, the task, the budget, the logger, the task's tuned
values and the overrides, key=value in Hydra's grammar. Values live there and nowhere else.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from magpo import files, plugins
from magpo.config.schema import (
    OF_THIS_PROCESS,
    RunConfig,
    check,
    dump,
    plain_values,
    unknown_key,
)
from magpo.envs import registry
from magpo.errors import ConfigError

GROUPS = ("budget", "logger")  # folders of files to choose from, by budget=quick


class Change(NamedTuple):
    """One override."""

    key: str
    value: Any
    text: str


def load(
    system: str | ModuleType, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> RunConfig:
    """Compose and check a run's configuration.

    `system` is a name of `magpo.plugins.systems()`, or the module of a system of your own, whose
    YAML has the module's name and lies beside it, or in `config_dir`. That folder may hold budget/,
    logger/ and tuned_values/ files too. Raises ConfigError.
    """
    imports, others = split_imports(overrides)
    plugins.load(imports)
    module = plugins.system(system) if isinstance(system, str) else system
    name, folders = locate(module, config_dir)
    changes = [parse(text) for text in others]
    chosen = {change.key: change.value for change in changes}
    resume = chosen.get("resume")
    if resume in (None, "auto"):
        values = _new(name, folders, chosen)
    elif isinstance(resume, str):
        values = _resumed(module, name, folders, Path(resume).expanduser(), chosen)
    else:
        raise ConfigError(f"resume must be a run's folder or auto, not {resume!r}")
    own = [change for change in changes if change.key not in ("env", "tuned", *GROUPS)]
    assign(values, own, lambda key: _systems_with(key, folders), name)
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).partition("\n")[0]) from error
    resolved["run"]["imports"] = plugins.needed_by(module, resolved["run"]["env"])
    return check(module, resolved)


def split_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the values of `import=`, which may be given several times, from other arguments.

    Raises ConfigError.
    """
    imports: list[str] = []
    for text in (text for text in arguments if text.startswith("import=")):
        value = parse(text).value
        imports += value if isinstance(value, list) else [value]
    if wrong := [value for value in imports if not isinstance(value, str)]:
        raise ConfigError(f"import must be a file or a module, not {wrong[0]!r}")
    return imports, [text for text in arguments if not text.startswith("import=")]


def defaults(name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the values of experiment.yaml and of the system's own file over them."""
    values: dict[str, Any] = read_option(folders, "experiment")
    merge(values, read_option(folders, name))
    return values


def _new(name: str, folders: Sequence[Path], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a new run, with the files it chooses and before its other overrides."""
    values = defaults(name, folders)
    if "env" not in chosen:
        suites = ", ".join(registry.suites())
        raise ConfigError(f"no task chosen: write env=<suite>/<task>, of {suites}")
    task = str(chosen["env"])
    try:
        values["env"] = registry.options(task)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    budget, logger, tuned = (chosen.get(key, values.pop(key)) for key in (*GROUPS, "tuned"))
    if type(tuned) is not bool:
        raise ConfigError(f"tuned must be true or false, not {tuned!r}")
    merge(values, read_option(folders, "budget", budget))
    values["logger"] = _logger(folders, logger)
    file = next(
        (f for d in folders if (f := d / f"tuned_values/{name}/{task}.yaml").is_file()), None
    )
    if tuned and file:
        merge(values, _yaml(file))
    about = {"system": name, "env": task, "budget": budget, "tuned": tuned and file is not None}
    return values | {"run": about}


def _resumed(
    module: ModuleType,
    name: str,
    folders: Sequence[Path],
    folder: Path,
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the values of the run in `folder`."""
    try:
        found = (folder / "config.yaml").is_file()
    except OSError as error:
        raise ConfigError(f"resume: the folder cannot be read: {error.strerror}") from error
    if not found:
        raise ConfigError(f"resume={folder}: no run there (it has no config.yaml); or resume=auto")
    values = {**dump(read(module, folder / "config.yaml")), **deepcopy(OF_THIS_PROCESS)}
    about = values["run"]
    if (task := chosen.get("env", about["env"])) != about["env"]:
        raise ConfigError(f"resume={folder}: is a run on {about['env']}, not on {task}")
    if "logger" in chosen:
        values["logger"] = _logger(folders, chosen["logger"])
    return values | {
        "run": about | {key: chosen[key] for key in ("budget", "tuned") if key in chosen}
    }


def assign(
    values: dict[str, Any],
    changes: Sequence[Change],
    owners: Callable[[str], Sequence[str]] = lambda key: (),
    name: str = "",
) -> None:
    """Set the values of existing keys, and of any key below `vary`. Raises ConfigError."""
    for key, value, _ in changes:
        *parents, last = key.split(".")
        group: Any = values
        for parent in parents:
            if key.startswith("vary.") and isinstance(group, dict):
                group[parent] = dict(group.get(parent) or {}) if parent in group else {}
            group = group.get(parent) if isinstance(group, dict) else None
        known = isinstance(group, dict) and (last in group or key.startswith("vary."))
        if not known or key.partition(".")[0] == "run":  # what `dump` says of a run
            others = ", ".join(owners(key))
            raise ConfigError(
                f"{key!r} is a key of {others}, not of {name}; --help lists all"
                if others
                else unknown_key(key, [*keys(values), "env", "tuned", "import", *GROUPS])
            )
        group[last] = value


def parsed(text: str) -> Override:
    """Parse one argument in Hydra's grammar, which may be a sweep. Raises ConfigError."""
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        raise ConfigError(
            f"cannot read {text!r}: write key=value, a list as key=[0,1], special characters as "
            "\"key='...'\""
        ) from error


def parse(text: str) -> Change:
    """Parse one argument, key=value. Raises ConfigError."""
    override = parsed(text)
    key, value = override.key_or_group, override.value()
    if override.is_sweep_override():
        raise ConfigError(f"{text!r}: a list is written [0,1], a sweep needs --multirun")
    if override.package is not None:
        raise ConfigError(f"{text!r}: write {key}=<value>, without @{override.package}")
    if override.is_delete():
        raise ConfigError(f"{text!r}: a key cannot be removed, only set: {key}=<value>")
    return Change(key, value, text)


def locate(module: ModuleType, config_dir: Path | None) -> tuple[str, list[Path]]:
    """Return the system's name and the folders with YAML files, first the one with its own."""
    name, beside = plugins.system_name(module), Path(str(module.__file__)).parent
    folders = [folder.resolve() for folder in (config_dir or beside, files.configs())]
    folders.sort(key=lambda folder: not (folder / f"{name}.yaml").is_file())
    if not (folders[0] / f"{name}.yaml").is_file():
        raise ConfigError(f"no {name}.yaml in {' or '.join(map(str, folders))}")
    return name, folders


def option_names(folders: Sequence[Path], group: str) -> list[str]:
    """Return the names that `group=` can take: its YAML files."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def read(system: str | ModuleType, file: Path) -> RunConfig:
    """Read a run's config.yaml and check it like a new one. Raises ConfigError."""
    module = plugins.system(system) if isinstance(system, str) else system
    return from_values(module, plain_values(file), file)


def from_values(module: ModuleType, values: Any, source: Path) -> RunConfig:
    """Make a run's configuration of the plain values of `dump`. Raises ConfigError."""
    name = plugins.system_name(module)
    try:
        if values["run"]["system"] != name:
            raise ConfigError(f"a run of {values['run']['system']}, not of {name}")
        plugins.require(values["run"].get("imports", {}), module)
        return check(module, values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{source}: not the configuration of a run") from error
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values and groups of values."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from keys(value, f"{prefix}{key}.")


def read_option(folders: Sequence[Path], *path: Any) -> dict[str, Any]:
    """Read a YAML file from the first folder that has it."""
    *group, option = map(str, path)
    for folder in folders:
        if os.path.isfile(file := Path(folder, *group, f"{option}.yaml")):
            return _yaml(file)
    raise ConfigError(registry.unknown(group[0], option, option_names(folders, group[0])))


def _yaml(file: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(file))
    except files.UNREADABLE as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or "defaults" in values:
        raise ConfigError(f"{file}: must be keys and values, without a list of defaults")
    return {str(key): value for key, value in values.items()}


def _logger(folders: Sequence[Path], option: Any) -> dict[str, Any]:
    """Return the default logger's values and those that the chosen one changes."""
    return read_option(folders, "logger", "default") | read_option(folders, "logger", option)


def merge(values: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Put new values over old ones, group by group."""
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def _systems_with(key: str, folders: Sequence[Path]) -> list[str]:
    """Return the package's systems whose YAML has this key."""
    files = ((name, folder / f"{name}.yaml") for name in plugins.of_package() for folder in folders)
    return [name for name, file in files if file.is_file() and key in keys(_yaml(file))]
