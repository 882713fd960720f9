"""How a run's seeds and environments lie on the devices.

The mesh has two axes. *seed*: each device trains seeds of its own and none talks to another, so as
many devices as divide the seeds go there. *env*: the rest share the environments of a seed; XLA
places the communication. The traced programs are the same on one device and on many.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from magpo.config import ConfigError, RunConfig

PartitionSpec: Any = jax.sharding.PartitionSpec
SEED, EACH_SEED, ALL = "seed", PartitionSpec("seed"), PartitionSpec()


@dataclass(frozen=True)
class Layout:
    """A run's mesh of devices."""

    mesh: Mesh
    num_envs: int
    seeds_at_once: int | None  # of those on one device; None: all

    def each_seed(self, function: Callable[..., Any], num_shared: int = 0) -> Callable[..., Any]:
        """`function` of one seed over the arguments' leading axis; the last `num_shared` arguments
        are the same for all seeds."""

        def over_seeds(own: tuple[Any, ...], shared: tuple[Any, ...]) -> Any:
            def one(own: tuple[Any, ...]) -> Any:
                return function(*own, *shared)

            if self.seeds_at_once is None:
                return jax.vmap(one)(own)
            if self.seeds_at_once == 1:  # vmapped, a `lax.cond` would run both of its branches
                return jax.lax.map(one, own)
            return jax.lax.map(one, own, batch_size=self.seeds_at_once)

        spread = self.per_device(over_seeds, (EACH_SEED, ALL))

        def mapped(*arguments: Any) -> Any:
            split = len(arguments) - num_shared
            return spread(arguments[:split], arguments[split:])

        return mapped

    def per_device(self, function: Callable[..., Any], in_specs: Any) -> Callable[..., Any]:
        """`function` of a device's own seeds, on every device."""
        if self.mesh.size == 1:
            return function
        mapped: Callable[..., Any] = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=EACH_SEED,
            axis_names={SEED},
            check_vma=False,
        )
        return mapped

    def of_state(self, state: Any) -> Any:
        """The sharding of each leaf of a TrainState, (S, ...): the second axis of what has one
        environment a row, parameters and optimiser states apart, lies along `env`."""

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            ours = jax.tree_util.keystr(path[:1], simple=True) in ("params", "opt_state")
            by_env = not ours and leaf.ndim > 1 and leaf.shape[1] == self.num_envs
            spec = PartitionSpec(SEED, "env") if by_env else EACH_SEED
            return NamedSharding(self.mesh, spec)

        return jax.tree.map_with_path(sharding, state)

    def of_seeds(self) -> NamedSharding:
        """The sharding of anything with a leading axis of seeds."""
        return NamedSharding(self.mesh, EACH_SEED)

    def of_figures(self) -> NamedSharding:
        """The sharding of what the host reads: of several processes, each has all of it."""
        return NamedSharding(self.mesh, EACH_SEED if jax.process_count() == 1 else ALL)


def laid(tree: Any, sharding: Any) -> Any:
    """The shapes and dtypes of `tree`, with shardings: one for all, or a tree of them."""
    shaped: Any = jax.ShapeDtypeStruct
    shardings = jax.tree.broadcast(sharding, tree)
    return jax.tree.map(lambda x, s: shaped(x.shape, x.dtype, sharding=s), tree, shardings)


def layout(config: RunConfig) -> Layout:
    """The layout of a run on all devices there are; ConfigError where its sizes do not divide."""
    devices, num_seeds = jax.device_count(), len(config.seeds)
    along_seeds = math.gcd(devices, num_seeds)
    along_envs = devices // along_seeds
    if config.num_envs % along_envs:
        raise ConfigError(
            f"{devices} devices: {along_seeds} share the {num_seeds} seeds, so num_envs must be a "
            f"multiple of {along_envs}, not {config.num_envs}; or the seeds one of {devices}"
        )
    at_once, own = config.seeds_per_batch, num_seeds // along_seeds
    if at_once is not None and own % at_once:
        raise ConfigError(f"seeds_per_batch must divide the {own} seeds of a device, not {at_once}")
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((along_seeds, along_envs), (SEED, "env"), axis_types=axes)
    if own == 1:
        at_once = 1
    elif at_once == own:
        at_once = None
    return Layout(mesh, config.num_envs, at_once)
