"""JAX on the CPU, with one compilation cache for all tests and the processes they start."""

import gc
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if metadata.version("jaxlib") < "0.11":  # later versions have no other emitters
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Set the variables that JAX reads on import, unless the user has set them."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if getattr(config, "cache", None):  # absent under `-p no:cacheprovider`
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    # Tests run little of what they compile: without optimisation they take a third of the time.
    os.environ.setdefault("XLA_FLAGS", QUICK)
    # Tracing makes many long-lived objects: garbage collection would take a fifth of its time.
    gc.set_threshold(50_000, 20, 100)


# The slowest files, slowest first: started last, one would run while the other workers idle.
LONG = (
    *("systems/test_probes", "systems/test_runs", "test_sweep", "experiment/test_processes"),
    *("systems/test_contract", "envs/test_contract", "systems/test_imitation_gap"),
    *("envs/test_jaxmarl", "envs/test_render", "experiment/test_resume", "test_invocation"),
    *("experiment/test_devices", "experiment/test_damage", "test_crash", "test_reproduce"),
    *("test_launcher", "systems/test_magpo", "experiment/test_disk_full", "test_policy"),
    *("test_benchmark", "systems/test_gpae", "test_docs", "test_plugins", "test_loggers"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first, for `--dist loadfile --no-loadscope-reorder`."""
    tests = Path(__file__).parent
    place = {tests / f"{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture
def output_of(monkeypatch, capfd):
    """Return a function that gives a script arguments and returns what it and its runs print."""

    def call(script, *arguments):
        from magpo import commands  # only after the variables above are set

        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        capfd.readouterr()
        commands.run(script.__doc__, script.main)
        return capfd.readouterr().out

    return call


@pytest.fixture
def error_of(monkeypatch, capsys):
    """Return a function that gives a script bad arguments and returns its one-line error."""

    def call(script, *arguments):
        from magpo import commands  # only after the variables above are set

        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            commands.run(script.__doc__, script.main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        return err

    return call
