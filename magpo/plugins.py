"""Plugins: users' own systems and tasks, which a command names or which are installed.

`import=matrix.py`, or `import=<module>`, executes a file that is a system (`magpo.contract`) or
registers tasks (`magpo.envs.register`). Installed packages name their plugins by entry points of
the group `magpo.plugins`. A run records the plugins that it needs, by name and hash, and a command
that lacks one says which. Nothing is imported because a results folder names it.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from traceback import extract_tb
from types import ModuleType
from typing import Any, NamedTuple

from magpo import contract
from magpo.envs import registry
from magpo.errors import ConfigError

SYSTEMS = Path(__file__).resolve().parent / "systems"
FILE = "_file_"  # the prefix of modules made from files, whose names may be a package's


class Plugin(NamedTuple):
    """A module that a command imported."""

    module: ModuleType
    is_system: bool
    tasks: tuple[str, ...]  # the tasks that it registered


_plugins: list[Plugin] = []
_modules: dict[Path, ModuleType] = {}  # made from files


def load(imports: Iterable[str] = ()) -> None:
    """Import the installed plugins and the named ones, once each. Raises ConfigError."""
    _load_installed()
    for name in imports:
        _load(name, f"import={name}")


@cache
def _load_installed() -> None:
    points = {(point.name, point.value) for point in entry_points(group="magpo.plugins")}
    for name, value in sorted(points):
        if len(same := [other for key, other in sorted(points) if key == name]) > 1:
            raise ConfigError(f"two plugins are named {name}: {' and '.join(same)}")
        _load(value.partition(":")[0], f"the installed plugin {name}")


def _load(name: str, shown: str) -> None:
    """Import a module or a file.

    Raises ConfigError, and undoes its registrations, if the import fails, registers nothing, or
    registers a name that another plugin has.
    """
    before = dict(registry.registered)
    try:
        _import(name, shown, before)
    except ConfigError:
        registry.registered.clear()
        registry.registered.update(before)
        raise


def _import(name: str, shown: str, before: Mapping[str, Any]) -> None:
    is_file = name.endswith(".py") or "/" in name
    if is_file and not Path(name).expanduser().is_file():
        raise ConfigError(f"{shown}: no such file")
    try:
        module = module_of(name) if is_file else import_module(name)
    except Exception as error:
        raise ConfigError(f"{shown}: {type(error).__name__}: {error}{_place(error)}") from error
    if any(_file(plugin.module) == _file(module) for plugin in _plugins):
        return
    tasks = tuple(
        task
        for task, made in registry.registered.items()
        if made is not before.get(task) or getattr(made[0], "__module__", "") == module.__name__
    )
    reason = _not_a_system(module)
    if reason and not tasks:
        raise ConfigError(f"{shown}: registers no task (magpo.envs.register); {reason}")
    for other in _plugins:
        if taken := set(tasks) & set(other.tasks):
            raise ConfigError(f"{shown}: {_file(other.module)} has registered {min(taken)} already")
        if not reason and other.is_system and system_name(other.module) == system_name(module):
            raise ConfigError(f"{shown}: {_file(other.module)} is a system of that name already")
    _plugins.append(Plugin(module, not reason, tasks))


def _not_a_system(module: ModuleType) -> str:
    try:
        contract.algorithm(module)
    except ConfigError as error:
        return str(error)
    return ""


def _place(error: Exception) -> str:
    """Return the file and line at which the import of a user's file failed."""
    ours = str(SYSTEMS.parent)
    frames = [f for f in extract_tb(error.__traceback__) if not f.filename.startswith((ours, "<"))]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def module_of(file: str) -> ModuleType:
    """Import a file once, even if it also runs as `__main__` or under a profiler."""
    path = Path(file).expanduser().resolve()
    if path.parent == SYSTEMS:
        return import_module(f"magpo.systems.{path.stem}")
    if path not in _modules:
        spec = spec_from_file_location(FILE + path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError("not a Python file")
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        _modules[path] = module
    return _modules[path]


def keep(module: ModuleType) -> None:
    """Make `module_of` return this module for its file."""
    _modules[_file(module)] = module


def of_package() -> list[str]:
    """Return the names of the systems in the package."""
    return sorted(m.name for m in iter_modules([str(SYSTEMS)]) if not m.name.startswith("_"))


def systems() -> list[str]:
    """Return the names of all systems, the package's and the plugins'."""
    return [*of_package(), *(system_name(p.module) for p in _plugins if p.is_system)]


def system(name: str, imports: Mapping[str, str] | None = None) -> ModuleType:
    """Return the system of this name. Raises ConfigError if there is none.

    A plugin that a run's `imports` record takes precedence over a system of the package.
    """
    found = {system_name(p.module): p.module for p in _plugins if p.is_system}
    own = found.get(name)
    if name in of_package() and not (own and _name(own) in (imports or {})):
        return import_module(f"magpo.systems.{name}")
    if own is None:
        raise registry.unknown("system", name, systems())
    return own


def system_name(module: ModuleType) -> str:
    """Return a system's name: its file's name without the suffix."""
    return _file(module).stem


def needed_by(module: ModuleType, task: str) -> dict[str, str]:
    """Return the names and hashes of the users' files that a system and a task come from."""
    own = [] if _file(module).parent == SYSTEMS else [module]
    if task in registry.registered:  # by a plugin or by the running program
        builder = sys.modules.get(getattr(registry.registered[task][0], "__module__", ""))
        own += [p.module for p in _plugins if task in p.tasks] or ([builder] if builder else [])
    return {_name(found): digest for found in own if (digest := _hash(found))}


def require(imports: Mapping[str, str], own: ModuleType | None = None) -> list[str]:
    """Return the names of a run's imports that have changed. Raises ConfigError if one is missing.

    `own` is the system's module, if the caller has one.
    """
    modules = [*(plugin.module for plugin in _plugins), *([own] if own else [])]
    hashes = {_name(module): _hash(module) for module in modules}
    for name in imports:
        if name not in hashes:
            where = "<its folder>/" if name.endswith(".py") else ""
            raise ConfigError(f"the run needs {name}, which is not imported: import={where}{name}")
    return [name for name, digest in imports.items() if digest != hashes[name]]


def _name(module: ModuleType) -> str:
    """Return a module's name, or the name of the file that it was made from."""
    from_file = module.__name__.startswith(FILE) or module.__name__ == "__main__"
    return _file(module).name if from_file else module.__name__


def _file(module: ModuleType) -> Path:
    return Path(module.__file__ or module.__name__).resolve()


@cache
def _hash(module: ModuleType) -> str:
    file = _file(module)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
