"""Compose a run's configuration: YAML files and overrides in, a RunConfig out.

`load("magpo", ["env=rware/tiny-4ag", "system.clip_eps=0.1"])` merges, later over earlier,
configs/experiment.yaml, configs/<system>.yaml, the task, the budget, the logger, the task's tuned
values and the overrides, key=value in Hydra's grammar. Values live there and nowhere else.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from magpo import files, plugins
from magpo.config.schema import OF_THIS_PROCESS, RunConfig, check, dump, plain_values, unknown_key
from magpo.envs import registry
from magpo.errors import ConfigError

GROUPS = ("budget", "logger")  # folders of files to choose from, by budget=quick


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
    changes = dict(map(parse, others))
    resume = changes.get("resume")
    if resume in (None, "auto"):
        about, values = _new(name, folders, changes)
    elif isinstance(resume, str):
        about, values = _resumed(module, folders, Path(resume).expanduser(), changes)
    else:
        raise ConfigError(f"resume must be a run's folder or auto, not {resume!r}")
    own = {k: v for k, v in changes.items() if k not in ("env", "tuned", *GROUPS)}
    known = list(_keys(OmegaConf.to_container(values)))
    for key in own:
        if key not in known and not key.startswith("vary."):
            raise _unknown(key, name, known, folders)
    try:
        for key, value in own.items():
            OmegaConf.update(values, key, value, merge=False)
        resolved: Any = OmegaConf.to_container(values, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).partition("\n")[0]) from error
    about["imports"] = plugins.needed_by(module, about["env"])
    return check(module, resolved | {"run": about})


def split_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the values of `import=`, which may be given several times, from other arguments.

    Raises ConfigError.
    """
    imports: list[str] = []
    for text in (text for text in arguments if text.startswith("import=")):
        _, value = parse(text)
        imports += value if isinstance(value, list) else [value]
    if wrong := [value for value in imports if not isinstance(value, str)]:
        raise ConfigError(f"import must be a file or a module, not {wrong[0]!r}")
    return imports, [text for text in arguments if not text.startswith("import=")]


def defaults(name: str, folders: Sequence[Path]) -> DictConfig:
    """Return the values of experiment.yaml and of the system's own file over them."""
    return merged(read_option(folders, "experiment"), read_option(folders, name))


def _new(
    name: str, folders: Sequence[Path], chosen: Mapping[str, Any]
) -> tuple[dict[str, Any], DictConfig]:
    """Return what is said of a new run, and its values before its other overrides."""
    values = defaults(name, folders)
    if "env" not in chosen:
        suites = ", ".join(registry.suites())
        raise ConfigError(f"no task chosen: write env=<suite>/<task>, of {suites}")
    task = str(chosen["env"])
    values["env"] = registry.options(task)
    budget, logger, tuned = (chosen.get(key, values.pop(key)) for key in (*GROUPS, "tuned"))
    if type(tuned) is not bool:
        raise ConfigError(f"tuned must be true or false, not {tuned!r}")
    values["logger"] = _logger(folders, logger)
    values = merged(values, read_option(folders, "budget", budget))
    tuned = tuned and find(folders, f"tuned_values/{name}/{task}") is not None
    if tuned:
        values = merged(values, read_option(folders, "tuned_values", f"{name}/{task}"))
    return {"system": name, "env": task, "budget": budget, "tuned": tuned}, values


def _resumed(
    module: ModuleType, folders: Sequence[Path], folder: Path, chosen: Mapping[str, Any]
) -> tuple[dict[str, Any], DictConfig]:
    """Return what is said of the run in `folder`, and its values."""
    if not os.path.isfile(folder / "config.yaml"):  # False for any text, unlike Path.is_file
        raise ConfigError(f"resume={folder}: no run there (it has no config.yaml); or resume=auto")
    values = dump(read(module, folder / "config.yaml"))
    about = values.pop("run") | {k: chosen[k] for k in ("budget", "tuned") if k in chosen}
    if (task := chosen.get("env", about["env"])) != about["env"]:
        raise ConfigError(f"resume={folder}: is a run on {about['env']}, not on {task}")
    if "logger" in chosen:
        values["logger"] = _logger(folders, chosen["logger"])
    return about, OmegaConf.create(values | OF_THIS_PROCESS)


def _unknown(key: str, name: str, known: Sequence[str], folders: Sequence[Path]) -> ConfigError:
    """The error for a key that is not the system's: which other systems of the package have it."""
    files = {other: find(folders, other) for other in plugins.of_package()}
    if owners := [other for other, file in files.items() if file and key in _keys(_yaml(file))]:
        return ConfigError(
            f"{key!r} is a key of {', '.join(owners)}, not of {name}; --help lists all"
        )
    return ConfigError(unknown_key(key, [*known, "env", "tuned", "import", *GROUPS]))


def parsed(text: str) -> Override:
    """Parse one argument in Hydra's grammar, which may be a sweep. Raises ConfigError."""
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        raise ConfigError(
            f"cannot read {text!r}: write key=value, a list as key=[0,1], special characters as "
            "\"key='...'\""
        ) from error


def parse(text: str) -> tuple[str, Any]:
    """Return the key and the value of one argument, key=value. Raises ConfigError."""
    override = parsed(text)
    key, value = override.key_or_group, override.value()
    if override.is_sweep_override():
        raise ConfigError(f"{text!r}: a list is written [0,1], a sweep needs --multirun")
    if override.package is not None:
        raise ConfigError(f"{text!r}: write {key}=<value>, without @{override.package}")
    if override.is_delete():
        raise ConfigError(f"{text!r}: a key cannot be removed, only set: {key}=<value>")
    return key, value


def locate(module: ModuleType, config_dir: Path | None) -> tuple[str, list[Path]]:
    """Return the system's name and the folders with YAML files, first the one with its own."""
    name, beside = plugins.system_name(module), Path(str(module.__file__)).parent
    folders = [folder.resolve() for folder in (config_dir or beside, files.configs())]
    folders.sort(key=lambda folder: not find([folder], name))
    if not find(folders, name):
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


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values and groups of values."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")


def find(folders: Sequence[Path], name: str) -> Path | None:
    """Return the file `name`.yaml of the first folder that has it."""
    paths = (folder / f"{name}.yaml" for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)


def read_option(folders: Sequence[Path], *path: Any) -> DictConfig:
    """Read the YAML file of this name, "experiment", or group and option, ("budget", "quick")."""
    if file := find(folders, "/".join(map(str, path))):
        return _yaml(file)
    group, option = map(str, path)
    raise registry.unknown(group, option, option_names(folders, group))


def _yaml(file: Path) -> DictConfig:
    try:
        values = OmegaConf.load(file)
    except files.UNREADABLE as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig) or "defaults" in values:
        raise ConfigError(f"{file}: must be keys and values, without a list of defaults")
    return values


def _logger(folders: Sequence[Path], option: Any) -> DictConfig:
    """Return the default logger's values and those that the chosen one changes."""
    return merged(read_option(folders, "logger", "default"), read_option(folders, "logger", option))


def merged(*values: DictConfig) -> DictConfig:
    """Return values group by group, later over earlier."""
    merged = OmegaConf.merge(*values)
    assert isinstance(merged, DictConfig)
    return merged
