"""Composition of a run's configuration from YAML files and overrides.

`load("magpo", ["env=rware/tiny-4ag", "system.clip_eps=0.1"])` merges the following; later values
replace earlier ones:

1. configs/experiment.yaml and configs/<system>.yaml
2. the task
3. the published game
4. the logger
5. the budget
6. the tuned values of the task, or else of its suite
7. the overrides, key=value in Hydra's grammar

All values are in these files; the code refers to them by dotted names.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from magpo import files, plugins, published
from magpo.config.schema import OF_THIS_PROCESS, RunConfig, check, dump, flat, plain_values
from magpo.envs import registry
from magpo.errors import ConfigError, nearest
from magpo.values import unknown_key

Values = dict[str, Any]
GROUPS = ("budget", "logger")  # folders with files to choose from, as by budget=quick
SWITCHES = ("tuned", "published")  # whether these files are used


def load(
    system: str | ModuleType, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> RunConfig:
    """Compose and check a run's configuration.

    `system` is a name in `magpo.plugins.systems()` or the module of a system of your own. Such a
    module's YAML has the same name and lies beside the module or in `config_dir`, a folder that may
    also have budget/, logger/ and tuned_values/. Raises ConfigError.
    """
    load_imports(overrides)
    module = plugins.system(system) if isinstance(system, str) else system
    name, folders = locate(module, config_dir)
    changes = dict(parse(text) for text in overrides if not text.startswith("import="))
    if changes.get("resume") in (None, "auto"):
        about, values = _new(name, folders, changes)
    else:
        about, values = _resumed(module, folders, changes)
    own = flat({key: changes[key] for key in changes if key not in ("env", *SWITCHES, *GROUPS)})
    for key in own:
        if key not in values and not key.startswith("vary."):
            raise _unknown(key, name, values, folders)
    tree = OmegaConf.create()
    try:
        for key, value in (values | own).items():
            OmegaConf.update(tree, key, value, merge=False)
        resolved: Any = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).partition("\n")[0]) from error
    about["imports"] = plugins.needed_by(module, about["env"])
    return check(module, resolved | {"run": about})


def load_imports(arguments: Sequence[str]) -> None:
    """Import installed plugins and those that arguments name by `import=`, given once or more.

    Raises ConfigError.
    """
    values = [parse(text)[1] for text in arguments if text.startswith("import=")]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    plugins.load(map(str, names))


def defaults(name: str, folders: Sequence[Path]) -> Values:
    """Return the values of experiment.yaml, updated with those of the system's own file."""
    return read_option(folders, "experiment") | read_option(folders, name)


def _new(name: str, folders: Sequence[Path], chosen: Values) -> tuple[Values, Values]:
    """Return the facts about a new run (its `run` group), and its values before other overrides."""
    values = defaults(name, folders)
    if "env" not in chosen:
        suites = ", ".join(registry.suites())
        raise ConfigError(f"no task chosen: write env=<suite>/<task>, of {suites}")
    task = str(chosen["env"])
    values |= flat(registry.options(task), "env.")
    budget, logger = (chosen.get(key, values.pop(key)) for key in GROUPS)
    tuned, as_published = (chosen.get(key, values.pop(key)) for key in SWITCHES)
    for key, switch in zip(SWITCHES, (tuned, as_published), strict=True):
        if type(switch) is not bool:
            raise ConfigError(f"{key} must be true or false, not {switch!r}")
    if as_published:
        values |= _published(task)
    values |= _logger(folders, logger) | read_option(folders, "budget", budget)
    of_task_or_suite = f"{name}/{task}", f"{name}/{task.partition('/')[0]}"
    found = [file for file in of_task_or_suite if find(folders, f"tuned_values/{file}")]
    if tuned and found:
        values |= read_option(folders, "tuned_values", found[0])
    about = {"budget": budget, "tuned": tuned and bool(found), "published": as_published}
    return {"system": name, "env": task, **about}, values


def _published(task: str) -> Values:
    """Return the options of the game in which the papers' results on a task were made."""
    if not published.has(task):
        known = list(dict.fromkeys(row.task for row in published.rows()))
        near = nearest(task, known)
        raise ConfigError(
            f"published=true: no paper has results on {task}: {near}python -m magpo.reproduce "
            "lists the tasks with results"
        )
    options = OmegaConf.load(files.configs() / "published.yaml")
    return flat(cast(Values, OmegaConf.to_container(options))[task.partition("/")[0]], "env.")


def _resumed(module: ModuleType, folders: Sequence[Path], chosen: Values) -> tuple[Values, Values]:
    """Return the facts about the run in the folder `resume`, and its values."""
    resume = chosen["resume"]
    if not isinstance(resume, str):
        raise ConfigError(f"resume must be a run's folder or auto, not {resume!r}")
    file = Path(resume).expanduser() / "config.yaml"
    if not os.path.isfile(file):  # False for any text, unlike Path.is_file
        raise ConfigError(f"resume={resume}: no run there (no config.yaml); or use resume=auto")
    values = dump(from_values(module, plain_values(file), file))
    said = {key: chosen[key] for key in ("budget", *SWITCHES) if key in chosen}
    about = values.pop("run") | said
    if (task := chosen.get("env", about["env"])) != about["env"]:
        raise ConfigError(f"resume={resume}: is a run on {about['env']}, not on {task}")
    logger = _logger(folders, chosen["logger"]) if "logger" in chosen else {}
    return about, flat({"vary_in_step": False} | values | OF_THIS_PROCESS) | logger


def _logger(folders: Sequence[Path], option: Any) -> Values:
    """Return the default logger's values, updated with those of the chosen logger."""
    values = read_option(folders, "logger", "default") | read_option(folders, "logger", option)
    return flat(values, "logger.")


def _unknown(key: str, name: str, known: Values, folders: Sequence[Path]) -> ConfigError:
    """Return the error for an unknown key; it names other systems of the package with this key."""
    systems = [other for other in plugins.of_package() if find(folders, other)]
    if owners := [other for other in systems if key in read_option(folders, other)]:
        return ConfigError(f"{key!r} is a key of {', '.join(owners)}, not of {name}")
    return ConfigError(unknown_key(key, [*known, "env", "import", *SWITCHES, *GROUPS]))


def parsed(text: str) -> Override:
    """Parse one argument, possibly a sweep, in Hydra's grammar. Raises ConfigError."""
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        raise ConfigError(
            f"cannot read {text!r}: write key=value, a list as key=[0,1], special characters as "
            "\"key='...'\""
        ) from error


def parse(text: str) -> tuple[str, Any]:
    """Return the key and the value of an argument, key=value. Raises ConfigError."""
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
    """Return the system's name and the folders of YAML files, first the one with its own file."""
    name, beside = plugins.system_name(module), Path(str(module.__file__)).parent
    folders = [folder.resolve() for folder in (config_dir or beside, files.configs())]
    folders.sort(key=lambda folder: not find([folder], name))
    if not find(folders, name):
        raise ConfigError(f"no {name}.yaml in {' or '.join(map(str, folders))}")
    return name, folders


def option_names(folders: Sequence[Path], group: str) -> list[str]:
    """Return the names of a group's YAML files, which `group=` can take."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def from_values(module: ModuleType, values: Any, source: Path) -> RunConfig:
    """Make a run's configuration from the plain values of `dump`. Raises ConfigError."""
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


def find(folders: Sequence[Path], name: str) -> Path | None:
    """Return `name`.yaml of the first folder that has it, or None."""
    paths = (folder / f"{name}.yaml" for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)


def read_option(folders: Sequence[Path], *path: Any) -> Values:
    """Read a YAML file by name, "experiment", or by group and option, ("budget", "quick").

    Raises ConfigError.
    """
    file = find(folders, "/".join(map(str, path)))
    if file is None:
        group, option = map(str, path)
        raise registry.unknown(group, option, option_names(folders, group))
    try:
        values = OmegaConf.load(file)
    except files.UNREADABLE as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig) or "defaults" in values:
        raise ConfigError(f"{file}: must be keys and values, without a defaults list")
    return flat(cast(Values, OmegaConf.to_container(values)))
