"""The command lines: a system's own, and what `python -m magpo.evaluate` and others share."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from magpo import config
from magpo.config import RunConfig
from magpo.envs import registry
from magpo.errors import ConfigError

HYDRA_SETTINGS = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=${results_dir}/sweeps/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.sweep.subdir=.",
    "hydra/job_logging=none",
)


def hydra_main(
    system: str | ModuleType,
    run: Callable[[ModuleType, RunConfig], object],
    config_dir: Path | None = None,
) -> None:
    """Run the command line of a system: its arguments are overrides and a few of Hydra's flags.

    Without flags this is `run(module, config.load(system, arguments))`: no Hydra application, no
    outputs/ folder, no change of folder or of logging. --help is ours; --cfg, --info, --multirun
    and shell completion are Hydra's. All jobs of a --multirun are checked before the first starts;
    its record and a launcher's files go to <results_dir>/sweeps/. A ConfigError, also one that
    `run` raises, ends the process with its line on stderr and exit code 2.
    """
    arguments = sys.argv[1:]
    with exit_on_config_error():
        if {"-h", "--help"} & set(arguments):
            print(_help(*config.locate(system, config_dir)))
        elif any(argument.startswith("-") for argument in arguments):
            _hydra_app(system, run, config_dir)
        else:
            module = system if isinstance(system, ModuleType) else _import(system, None)
            run(module, config.load(system, arguments, config_dir))


def key_values(
    arguments: Sequence[str], keys: Mapping[str, type], open_groups: Sequence[str] = ()
) -> dict[str, Any]:
    """Read the arguments of a command with these keys and types; `open_groups` may have any key
    below them.

    Raises ConfigError.
    """
    values: dict[str, Any] = {}
    for text in arguments:
        override = config.parse(text)
        key, value = override.key_or_group, override.value()
        if key not in keys and not key.startswith(tuple(f"{name}." for name in open_groups)):
            raise ConfigError(config.unknown_key(key, list(keys)))
        kind = keys.get(key, type(value))
        if kind is str and isinstance(value, int | float):
            value = str(value)
        if type(value) is not kind:
            raise ConfigError(f"{key} must be of type {kind.__name__}, not {value!r}")
        values[key] = value
    return values


def group(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the values below a group, by their keys in it."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def within(values: Mapping[str, Any], **bounds: tuple[int, int]) -> None:
    """Raise ConfigError if a number among `values` is not within its key's bounds."""
    for key, (low, high) in bounds.items():
        if key in values and not low <= values[key] <= high:
            raise ConfigError(f"{key} must be at least {low} and at most {high}, not {values[key]}")


def command(usage: str, run: Callable[[Sequence[str]], None]) -> None:
    """Run a command of key=value arguments; print its usage without any, or with --help."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage)
        return
    with exit_on_config_error():
        run(arguments)


@contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turn a ConfigError into one line on stderr and exit code 2."""
    try:
        yield
    except ConfigError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def _hydra_app(
    system: str | ModuleType,
    run: Callable[[ModuleType, RunConfig], object],
    config_dir: Path | None,
) -> None:
    """Hand arguments with flags to Hydra, all its jobs checked."""
    name, folders = config.locate(system, config_dir)
    # A launcher's jobs may be other processes, where `__main__` is another module.
    source = str(system.__file__) if isinstance(system, ModuleType) else None
    if isinstance(system, ModuleType):
        _loaded[str(source)] = system
    flags, unknown = get_args_parser().parse_known_args()
    if unknown or flags.config_name or flags.config_path or flags.config_dir:
        raise ConfigError(f"unknown flag {(unknown or ['--config-...'])[0]!r}: see --help")
    exclusive = ("run", "multirun", "cfg", "info", "shell_completion")
    if len(modes := [f"--{flag}" for flag in exclusive if getattr(flags, flag)]) > 1:
        raise ConfigError(f"{' and '.join(modes)} do not go together")
    overrides = config.hydra_spelling(flags.overrides)

    def run_job(composed: DictConfig) -> None:
        module, choices = _import(name, source), HydraConfig.get().runtime.choices
        with exit_on_config_error():
            run(module, config.build(module, name, folders, composed, choices))

    others = [argument for argument in sys.argv[1:] if argument not in flags.overrides]
    sys.argv[1:] = [*others, *HYDRA_SETTINGS, config.search_path(folders), *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    try:
        parsed = [config.parse(text) for text in overrides]
        if not (flags.hydra_help or flags.shell_completion) and all(
            override.key_or_group != "hydra/sweeper" for override in parsed
        ):
            for job in BasicSweeper.split_arguments(parsed, None)[0]:
                if config.load(system, job, config_dir).resume not in (None, "auto"):
                    raise ConfigError("resume=<folder> goes without flags; a sweep has resume=auto")
        hydra.main(config_path=str(folders[0]), config_name=name, version_base="1.3")(run_job)()
    except HydraException as error:
        raise ConfigError(str(error).partition("\n")[0]) from error


_loaded: dict[str, ModuleType] = {}  # by file, in this process


def _import(name: str, source: str | None) -> ModuleType:
    """Import a system's module: the package's, or the one in the file `source`."""
    if source in _loaded:
        return _loaded[source]
    packaged = import_module(f"magpo.systems.{name}") if name in config.systems() else None
    if packaged and source in (None, packaged.__file__):
        return packaged
    # Under a name of its own: a file may have the name of a package.
    spec = spec_from_file_location(f"_system_{name}", str(source))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _help(name: str, folders: Sequence[Path]) -> str:
    """Return the help text: the YAML files with their comments."""
    package = "magpo.systems." if name in config.systems() else ""
    text = [f"usage: python -m {package}{name} env=<suite>/<task> [key=value ...] [flags]"]
    text += ["", "tasks:"]
    for suite, tasks in groupby(registry.tasks(), lambda task: task.partition("/")[0]):
        text.append(f"  {suite}/ " + " ".join(task.partition("/")[2] for task in tasks))
    for group in ("budget", "logger"):
        text.append(f"{group}: " + " | ".join(config.option_names(folders, group)))
    text += ["flags: --cfg job (print the configuration), --multirun (a=1,2 sweeps), --help"]
    budgets = [f"budget/{option}" for option in config.option_names(folders, "budget")]
    for file in ("experiment", *budgets, "logger/default", name):
        path = next(path for folder in folders if (path := folder / f"{file}.yaml").is_file())
        body = re.sub(r"(?m)^(# @package.*|defaults:\n(  - .*\n)*)\n?", "", path.read_text())
        text += ["", f"{file}.yaml", *(f"  {line}".rstrip() for line in body.strip().splitlines())]
    return "\n".join(text)
