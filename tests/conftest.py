"""JAX on the CPU, with one compilation cache for all tests and the processes they start."""

import gc
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if metadata.version("jaxlib") < "0.11":  # later ones have no other emitters
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Set what JAX reads when it is first imported; what the user has set stays."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if getattr(config, "cache", None):  # absent under `-p no:cacheprovider`
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    # Tests run little of what they compile: unoptimised, that takes a third of the time.
    os.environ.setdefault("XLA_FLAGS", QUICK)
    # Tracing makes many objects that live: looking for garbage so often takes a fifth of its time.
    gc.set_threshold(50_000, 20, 100)


# What takes longest, the longest first: begun last, one would run while the other workers idle.
LONG = (
    *("systems/test_probes", "experiment/test_processes", "systems/test_runs"),
    *("systems/test_contract", "envs/test_contract", "systems/test_imitation_gap"),
    *("envs/test_jaxmarl", "envs/test_seeing", "experiment/test_resume", "test_ways"),
    *("experiment/test_devices", "experiment/test_damage", "test_crash", "test_reproduce"),
    *("test_launcher", "systems/test_magpo", "experiment/test_disk_full", "test_policy"),
    "test_benchmark",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long first, for `--dist loadfile --no-loadscope-reorder`."""
    tests = Path(__file__).parent
    place = {tests / f"{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call a script with a command line that it refuses; its one line that says why."""

    def call(script, *arguments):
        from magpo import commands  # not before the variables above are set

        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            commands.run(script.__doc__, script.main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        return err

    return call
