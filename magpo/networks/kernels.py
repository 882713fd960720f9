"""Functions written for speed, each below its plain reference; `test_kernels.py` compares both.

Axis letters beyond `magpo.types`: B sequences, H hidden or head features, F embedding features.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from magpo.types import Array

PartitionSpec: Any = jax.sharding.PartitionSpec


def look_up_reference(table: Array, action: Array) -> Array:
    """Return the rows (..., N, H) of table (N, A, H) that action (..., N) int selects."""
    return table[jnp.arange(table.shape[0]), action]


@jax.custom_vjp
def look_up(table: Array, action: Array) -> Array:
    """Compute `look_up_reference` with one matmul as its reverse pass.

    On a GPU, autodiff's scatter adds in any order, so its result would differ from run to run.
    """
    return look_up_reference(table, action)


def _look_up_forward(table: Array, action: Array) -> tuple[Array, tuple[Array, Array]]:
    return look_up_reference(table, action), (table, action)


def _look_up_backward(inputs: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, action = inputs
    selected = jax.nn.one_hot(action, table.shape[1])
    return jnp.einsum("...na,...nh->nah", selected, d_rows), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def sum_of_others_reference(x: Array) -> Array:
    """Return for each agent the sum (..., N, H) of the other agents' rows of x (..., N, H).

    An agent's own row is multiplied by 0, not subtracted, so it has no influence at all.
    """
    others = 1.0 - jnp.eye(x.shape[-2])
    return (others[..., None] * x[..., None, :, :]).sum(axis=-2)


@jax.custom_vjp
def sum_of_others(x: Array) -> Array:
    """Compute `sum_of_others_reference` with a reverse pass linear in the number of agents.

    It subtracts each row from the sum of all rows, which is exact enough for a gradient.
    """
    return sum_of_others_reference(x)


def _sum_of_others_forward(x: Array) -> tuple[Array, None]:
    return sum_of_others_reference(x), None


def _sum_of_others_backward(_: None, d_sums: Array) -> tuple[Array]:
    return (d_sums.sum(axis=-2, keepdims=True) - d_sums,)


sum_of_others.defvjp(_sum_of_others_forward, _sum_of_others_backward)


def write_reference(cache: Any, entry: Any, agent: Array) -> Any:
    """Write an agent's entry, leaves (B, H, D), into the cache, leaves (B, H, N, D)."""
    return jax.tree.map(lambda cache, entry: cache.at[:, :, agent].set(entry), cache, entry)


def write_in_place(cache: Any, entry: Any, agent: Array, result: Array) -> Any:
    """Compute `write_reference` without a copy of the cache.

    `result` (B, H, D) was computed from the cache. Adding `0 * result` to the entry tells XLA that
    the cache has already been read; otherwise XLA writes to a copy.
    """

    def write(cache: Array, entry: Array) -> Array:
        entry += 0.0 * result
        return jax.lax.dynamic_update_slice_in_dim(cache, entry[:, :, None], agent, 2)

    return jax.tree.map(write, cache, entry)


def add_bias_reference(x: Array, bias: Array) -> Array:
    """Add a bias (F,) to all rows of x (..., F)."""
    return x + bias


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """Compute `add_bias_reference` with a matmul as its reverse pass.

    XLA's CPU backend takes several times longer to sum over rows; `normalise` avoids it, too.
    """
    return add_bias_reference(x, bias)


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias_reference(x, bias), None


def _add_bias_backward(_: None, d_y: Array) -> tuple[Array, Array]:
    return d_y, _sum_of_rows(d_y, d_y.shape[-1:])


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _sum_of_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum x (..., *shape) over its leading axes."""
    rows = x.reshape(-1, math.prod(shape))
    return (jnp.ones(len(rows)) @ rows).reshape(shape)


def normalise_reference(x: Array, scale: Array, bias: Array | None = None) -> Array:
    """Divide the rows (..., D) of x by their root mean square and scale them.

    `scale` and `bias` are (D,), or (H, D) for x (..., H, D) with H heads. With a bias, the rows are
    centred first and the bias is added: layer normalisation instead of RMS normalisation.
    """
    if bias is not None:
        x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * scale
    return x if bias is None else x + bias


@jax.custom_vjp
def normalise(x: Array, scale: Array, bias: Array | None = None) -> Array:
    """Compute `normalise_reference` with matmuls for its sums and a short reverse pass."""
    return _normalise_forward(x, scale, bias)[0]


def _mean_of_rows(x: Array, weights: Array) -> Array:
    """Return the means (..., 1) of the rows (..., D) of `x * weights`."""
    width = x.shape[-1]
    if weights.size > width:
        x, weights = x * weights, jnp.ones(width)
    means = x.reshape(-1, width) @ (weights.reshape(width) / width)
    return means.reshape(*x.shape[:-1], 1)


def _normalise_forward(x: Array, scale: Array, bias: Array | None) -> tuple[Array, tuple[Any, ...]]:
    ones = jnp.ones(x.shape[-1])
    if bias is not None:
        x = x - _mean_of_rows(x, ones)
    inverse = jax.lax.rsqrt(_mean_of_rows(x * x, ones) + 1e-6)
    x = x * inverse
    return x * scale if bias is None else x * scale + bias, (x, inverse, scale, bias)


def _normalise_backward(residuals: tuple[Any, ...], d_y: Array) -> tuple[Any, ...]:
    x, inverse, scale, bias = residuals
    d_scaled = d_y * x
    d_x = d_y * scale - x * _mean_of_rows(d_scaled, scale)
    d_scale, d_bias = _sum_of_rows(d_scaled, scale.shape), None
    if bias is not None:
        d_x -= _mean_of_rows(d_y, scale)
        d_bias = _sum_of_rows(d_y, bias.shape)
    return d_x * inverse, d_scale, d_bias


normalise.defvjp(_normalise_forward, _normalise_backward)


Block = Callable[[Any, Array, Any], Array]  # from a block's parameters, input and state


def apply_blocks_reference(
    block: Block, x: Array, params: Sequence[Any], states: Sequence[Any]
) -> Array:
    """Return `x` after all blocks, one after the other."""
    for block_params, state in zip(params, states, strict=True):
        x = block(block_params, x, state)
    return x


def apply_blocks(block: Block, x: Array, params: Sequence[Any], states: Sequence[Any]) -> Array:
    """Compute `apply_blocks_reference`, storing only matrix products for the reverse pass.

    The reverse pass recomputes everything else, which is cheap and saves memory. The blocks are
    scanned because XLA's CPU backend merges a recomputation outside a loop with the original.
    """

    @partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
    def step(x: Array, inputs: tuple[Any, Any]) -> tuple[Array, None]:
        block_params, state = inputs
        return block(block_params, x, state), None

    inputs = zip(params, states, strict=True)
    return jax.lax.scan(step, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs))[0]


def spread(apply: Callable[..., Any], params: Any, *batch: Any) -> Any:
    """Return `apply(params, *batch)`, whose inputs and outputs are arrays (B, ...).

    Devices that share a member divide the rows among themselves and sum the parameters' gradients.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = dict(mesh.shape).get("env", 1)
    if devices == 1 or len(jax.tree.leaves(batch)[0]) % devices:
        return apply(params, *batch)
    whole, rows = PartitionSpec(), PartitionSpec("env")
    specs: Any = {"in_specs": (whole, *[rows] * len(batch)), "out_specs": rows}
    return jax.shard_map(apply, axis_names={"env"}, check_vma=False, **specs)(params, *batch)
