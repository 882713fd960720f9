"""A system's command line: overrides and a few of Hydra's flags."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from magpo import files, plugins
from magpo.config import compose
from magpo.config.schema import RunConfig, dump, nested
from magpo.contract import float_names
from magpo.envs import registry
from magpo.errors import ConfigError
from magpo.values import as_argument

Run = Callable[[ModuleType, RunConfig], object]


def main(system: str | ModuleType, run: Run, config_dir: Path | None = None) -> None:
    """Run a system's command line, whose arguments are overrides and a few of Hydra's flags.

    Without flags, this is `run(module, config.load(system, arguments))`: no Hydra application, no
    outputs/ folder, no change of folder or logging. magpo implements --help and --cfg job, Hydra
    implements --multirun and shell completion. All jobs of a --multirun are checked before the
    first one starts; the sweep's record and a launcher's files go to <results_dir>/sweeps/. A
    sweeper may optimise the return value of `run`. A ConfigError, including one that `run` raises,
    ends the process with one line on stderr and exit code 2.
    """
    arguments = sys.argv[1:]
    with files.exit_on_config_error():
        compose.load_imports(arguments)
        module = plugins.system(system) if isinstance(system, str) else system
        if {"-h", "--help"} & set(arguments):
            tasks = [text.partition("=")[2] for text in arguments if text.startswith("env=")]
            print(_help(*compose.locate(module, config_dir), *tasks[-1:]))
        elif any(argument.startswith("-") for argument in arguments):
            _with_flags(arguments, module, run, config_dir)
        else:
            run(module, compose.load(module, arguments, config_dir))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see --help")


def _with_flags(
    arguments: Sequence[str], module: ModuleType, run: Run, config_dir: Path | None
) -> None:
    """Print the configuration, or check all jobs and hand the arguments to Hydra."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    modes.add_argument("--multirun", "-m", action="store_true")
    modes.add_argument("--shell-completion", "-sc", action="store_true")
    flags = parser.parse_intermixed_args(arguments)
    jobs = []
    if not flags.shell_completion:
        jobs = [compose.load(module, job, config_dir) for job in _jobs(flags.overrides)]
    if any(job.resume not in (None, "auto") for job in jobs):
        raise ConfigError("resume=<folder> takes no flags; in a sweep, use resume=auto")
    if flags.cfg == "job":
        print(yaml.safe_dump(dump(jobs[0]), sort_keys=False), end="")
    else:
        _hydra_app(module, run, config_dir)


def _jobs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Yield the overrides of each job; none if a sweeper other than Hydra's own chooses them."""
    choices = []
    for text in overrides:
        override = compose.parsed(text)
        if override.key_or_group == "hydra/sweeper":
            return
        if override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_hydra_override():
            choices.append([text])
    yield from map(list, product(*choices))


def _hydra_app(module: ModuleType, run: Run, config_dir: Path | None) -> None:
    """Let Hydra sweep, launch or complete; `compose.load` makes each job's configuration.

    Hydra's primary configuration has every key with its default, the keys below `vary` and the
    options of all tasks, because Hydra checks a sweep over tasks before it chooses one.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
    name, folders = compose.locate(module, config_dir)
    file = str(module.__file__)
    plugins.keep(module)

    def job(_: Any) -> object:
        hydra_config = HydraConfig.get()
        with files.exit_on_config_error():
            module = plugins.module_of(file)  # a launcher's jobs may be other processes
            config = compose.load(module, list(hydra_config.overrides.task), config_dir)
            if hydra_config.job.chdir:  # results_dir is relative to the command's folder
                where = Path(hydra_config.runtime.cwd, config.results_dir)
                config = replace(config, results_dir=str(where))
            return run(module, config)

    store = ConfigStore.instance()
    for task, (_, options) in registry.registered.items():
        suite, _, last = task.partition("/")
        store.store(last, options, f"env/{suite}", "env")
    store.store(f"magpo_{name}", _primary(module, name, folders))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    try:
        hydra.main(config_path=None, config_name=f"magpo_{name}", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException, FileNotFoundError, PermissionError) as error:
        raise ConfigError(str(error).partition("\n")[0]) from error


def _primary(module: ModuleType, name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the configuration that tells Hydra the keys, the groups and Hydra's own settings."""
    defaults = compose.defaults(name, folders)
    values = nested(defaults | compose.read_option(folders, "budget", defaults["budget"]))
    chosen = [{group: values.pop(group)} for group in compose.GROUPS]
    known = {option for task in registry.tasks() for option in registry.options(task)}
    values["import"] = []
    values["env"] = dict.fromkeys(sorted(known), "???")  # a task's file has only some of them
    values["vary"] = {"system": dict.fromkeys(float_names(get_type_hints(module.Config)["hyper"]))}
    sweeps = "${expanduser:${results_dir}}/sweeps/${now:%Y-%m-%d_%H-%M-%S}"
    return values | {
        "defaults": ["_self_", {"env": "???"}, *chosen, {"override hydra/job_logging": "none"}],
        "hydra": {
            "output_subdir": None,
            "run": {"dir": "."},
            "sweep": {"dir": sweeps, "subdir": "."},
            "searchpath": [folder.as_uri() for folder in folders],
        },
    }


def _help(name: str, folders: Sequence[Path], task: str | None = None) -> str:
    """Return the help text: the YAML files with their comments, and the options of `task`."""
    package = "magpo.systems." if name in plugins.of_package() else ""
    text = [f"usage: python -m {package}{name} env=<suite>/<task> [key=value ...] [flags]"]
    text += ["", "tasks:"]
    for suite, tasks in groupby(registry.tasks(), lambda task: task.partition("/")[0]):
        text.append(f"  {suite}/ " + " ".join(task.partition("/")[2] for task in tasks))
    for group in compose.GROUPS:
        text.append(f"{group}: " + " | ".join(compose.option_names(folders, group)))
    text += ["flags: --cfg job (print the configuration), --multirun (a=1,2 sweeps)"]
    text += ["       --help (with env=<suite>/<task>, also lists the options of that task)"]
    budgets = [f"budget/{option}" for option in compose.option_names(folders, "budget")]
    for file in ("experiment", *budgets, "logger/default", name):
        path = compose.find(folders, file)
        lines = path.read_text().strip().splitlines() if path else []
        text += ["", f"{file}.yaml", *(f"  {line}".rstrip() for line in lines)]
    if task is not None:
        text += ["", f"options of {task}", *_options(task)]
    return "\n".join(text)


def _options(task: str) -> Iterator[str]:
    """Yield a line per option of a task, with its value and its comment in the suite's YAML.

    Raises ConfigError.
    """
    options = registry.options(task)
    path = compose.find([files.configs()], f"env/{task.partition('/')[0]}")
    lines = path.read_text().splitlines() if path and task not in registry.registered else []
    comments = {line.partition(":")[0]: line.partition("#")[2] for line in lines}
    shown = {key: f"  env.{key}={as_argument(value)}" for key, value in options.items()}
    width = max(map(len, shown.values()), default=0)
    for key, setting in shown.items():
        comment = comments.get(key, "")
        yield f"{setting:{width}}  #{comment}" if comment else setting
