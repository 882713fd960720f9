"""The layout of a run's members and environments on devices.

The mesh has two axes:

- `member`: devices train different members, without communication. Its size is the greatest common
  divisor of the numbers of devices and members.
- `env`: devices share the environments of their members; XLA inserts the communication.

The traced programs are the same on one device and on many. On a CPU, XLA runs most of a program's
operations in a single thread. So each member in training gets a CPU device, and with it a thread,
of its own, and members are not batched.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from magpo.config.schema import RunConfig
from magpo.errors import ConfigError
from magpo.hardware import processes

PartitionSpec: Any = jax.sharding.PartitionSpec
MEMBER, EACH_MEMBER, ALL = "member", PartitionSpec("member"), PartitionSpec()


@dataclass(frozen=True)
class Layout:
    """A run's mesh of devices."""

    mesh: Mesh
    members_at_once: int | None  # members that train at once on one device; None: all

    def each_member(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Map a `function` of one member over the arguments' leading axis."""

        def over_members(*arguments: Any) -> Any:
            if self.members_at_once is None:
                return jax.vmap(function)(*arguments)
            # A vmapped `lax.cond` runs both branches, even for a batch of one.
            batch_size = self.members_at_once if self.members_at_once > 1 else None
            return jax.lax.map(lambda one: function(*one), arguments, batch_size=batch_size)

        if self.mesh.size == 1:
            return over_members
        specs: Any = {"in_specs": EACH_MEMBER, "out_specs": EACH_MEMBER, "axis_names": {MEMBER}}
        return jax.shard_map(over_members, mesh=self.mesh, check_vma=False, **specs)

    def of_state(self, state: Any, per_environment: Sequence[str]) -> Any:
        """Return the sharding of each leaf (M, ...) of a TrainState.

        In the fields `per_environment`, the second axis, of environments, lies along `env`.
        """

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            field = jax.tree_util.keystr(path[:1], simple=True)
            by_env = field in per_environment and leaf.ndim > 1
            spec = PartitionSpec(MEMBER, "env") if by_env else EACH_MEMBER
            return NamedSharding(self.mesh, spec)

        return jax.tree.map_with_path(sharding, state)

    def of_members(self) -> NamedSharding:
        """Return the sharding of arrays with a leading axis of members."""
        return NamedSharding(self.mesh, EACH_MEMBER)

    def of_metrics(self) -> NamedSharding:
        """Return the sharding of arrays that the host reads, of which each process has all."""
        return NamedSharding(self.mesh, EACH_MEMBER if jax.process_count() == 1 else ALL)


def laid(tree: Any, sharding: Any) -> Any:
    """Return the shapes and dtypes of `tree` with its sharding, one for all leaves or a tree."""
    shaped: Any = jax.ShapeDtypeStruct
    shardings = jax.tree.broadcast(sharding, tree)
    return jax.tree.map(lambda x, s: shaped(x.shape, x.dtype, sharding=s), tree, shardings)


def gathered(tree: Any) -> Any:
    """Move arrays to one device if they are spread over a CPU's threads.

    There, they can be combined with any other arrays. Other arrays stay where they are.
    """
    first, *_ = jax.devices()
    return jax.device_put(tree, first) if first.platform == "cpu" and not _cpu_is_split() else tree


def layout(config: RunConfig) -> Layout:
    """Lay a run out on all devices or, on a CPU, on as many as members train at once.

    Raises ConfigError if the run's sizes do not divide.
    """
    devices, num_members = jax.devices(), len(config.members)
    in_threads = devices[0].platform == "cpu" and not _cpu_is_split()
    if in_threads:
        fits = [n for n in range(1, len(devices) + 1) if _together(config) % n == 0]
        devices = devices[: fits[-1]]
    number = len(devices)
    along_members = math.gcd(number, num_members)
    per_device = num_members // along_members
    at_once = config.seeds_per_batch or per_device
    divided = num_members if in_threads else per_device
    if divided % at_once:
        where = "" if in_threads else " of a device"
        raise ConfigError(
            f"seeds_per_batch must divide the {divided} members{where}, not {at_once}"
        )
    at_once = 1 if in_threads else at_once
    along_envs = number // along_members
    if config.num_envs % along_envs:
        raise ConfigError(
            f"{number} devices: {along_members} share the {num_members} members, so num_envs must "
            f"be a multiple of {along_envs}, not {config.num_envs}"
        )
    axes = (AxisType.Auto, AxisType.Auto)
    shape = (along_members, along_envs)
    mesh = jax.make_mesh(shape, (MEMBER, "env"), axis_types=axes, devices=devices)
    return Layout(mesh, None if 1 < at_once == per_device else at_once)


def _cpu_is_split() -> bool:
    """Return whether the user or a launcher has chosen the CPU devices of each process."""
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return forced or jax.distributed.is_initialized()


def _together(config: RunConfig) -> int:
    """Return how many members train at once on a CPU, by default enough to keep its cores busy."""
    number, cores = len(config.members), os.cpu_count() or 1
    fits = (n for n in range(min(number, cores), number + 1) if number % n == 0)
    return config.seeds_per_batch or next(fits)


def memory_needed(train_chunk: Any) -> int:
    """Return the bytes that the compiled chunk, its state and a saved copy take on each device.

    Returns 0 if XLA does not say.
    """
    sizes = train_chunk.memory_analysis()
    if sizes is None:
        return 0
    return int(2 * sizes.argument_size_in_bytes + sizes.temp_size_in_bytes)


def check_memory(config: RunConfig, state: Any) -> None:
    """Raise ConfigError if each device has less memory than a state of these shapes takes.

    A checkpoint needs a copy of the state.
    """

    def size(x: Any) -> int:
        return int(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize)

    needed = sum(map(size, jax.tree.leaves(state))) * (2 if config.keep else 1)
    available = memory_available(config)
    if needed > available:
        raise ConfigError(
            f"the training state needs {needed / 1e9:.1f} GB of memory on each device, which has "
            f"{available / 1e9:.1f} GB: train fewer members or environments, or lower the size of "
            "a replay buffer"
        )


def memory_available(config: RunConfig) -> int:
    """Return the bytes of memory of each of the run's devices."""
    stats = jax.local_devices()[0].memory_stats() or {}
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", of_machine // len(layout(config).mesh.local_devices)))


def set_up_jax(config: RunConfig) -> None:
    """Set platform, precision and compilation cache, and join other processes, before JAX computes.

    JAX chooses a TPU or GPU by itself, so only the CPU has to be requested. Raises ConfigError for
    a platform that this machine, or this process, does not have.
    """
    # XLA's CPU backend calls LAPACK from its own threads (for the Cholesky solves of brax's
    # `generalized` backend). On a busy machine, OpenBLAS's threads would slow them down.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    settings: Any = jax.config
    settings.update("jax_enable_x64", False)  # simulators and networks use 32 bits
    if config.platform == "cpu":
        settings.update("jax_platforms", "cpu")
    settings.update("jax_default_matmul_precision", config.precision)
    if settings.jax_compilation_cache_dir is None:  # otherwise JAX_COMPILATION_CACHE_DIR is set
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magpo" / "xla"
        settings.update("jax_compilation_cache_dir", str(cache))
        settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    processes.join(config.distributed)
    if not _cpu_is_split():
        with contextlib.suppress(RuntimeError):  # an earlier run set it, or the caller used JAX
            settings.update("jax_num_cpu_devices", max(os.cpu_count() or 1, _together(config)))
    try:
        present = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names one that is missing
        reason = str(error).partition("\n")[0] or "no such device here"
        raise ConfigError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: {reason}") from error
    if config.platform not in ("auto", present):
        raise ConfigError(
            f"platform={config.platform}: JAX finds no such device here; allowed: auto, {present}"
        )
