"""`gru.scan` and `gru.reverse_scan`, each as a single kernel on an NVIDIA GPU.

XLA launches seven or eight kernels per step of a pass, each of which waits for the one before. Here
a thread block computes one sequence and holds the recurrent weights in registers, 192 per thread.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from magpo.networks import gru
from magpo.types import Array

Ref = Any  # a reference to an array in the GPU's memory


def scan(
    hidden: Array,
    inputs: Array,
    reset_before: Array,
    kernel: Array,
    bias: Array,
    interpret: bool = False,
) -> tuple[Array, gru.Gates]:
    """Compute `gru.scan` in one kernel."""
    like_hiddens = jax.ShapeDtypeStruct((*reset_before.shape, *bias.shape), hidden.dtype)
    hiddens, *gates = _each_sequence(
        _scan,
        (hidden, inputs, reset_before.astype(jnp.float32), kernel, bias),
        (0, 1, 1, None, None),
        [like_hiddens] * 5,
        (1,) * 5,
        interpret,
    )
    return hiddens, gru.Gates(*gates)


def _scan(
    hidden: Ref, inputs: Ref, reset_before: Ref, kernel: Ref, bias: Ref, hiddens: Ref, *gates: Ref
) -> None:
    thirds = _thirds(hidden)
    weights, candidate_bias = [kernel[:, third] for third in thirds], bias[...]

    def step(t: Array, hidden: Array) -> Array:
        hidden = jnp.where(reset_before[t] > 0, 0.0, hidden)
        products = [(hidden[:, None] * third).sum(axis=0) for third in weights]
        step_inputs = [inputs[t, third] for third in thirds]
        hidden, values = gru.step(hidden, step_inputs, products, candidate_bias)
        hiddens[t] = hidden
        for gate, value in zip(gates, values, strict=True):
            gate[t] = value
        return hidden

    jax.lax.fori_loop(0, len(inputs), step, hidden[...])


def reverse_scan(
    d_hiddens: Array,
    before: Array,
    gates: gru.Gates,
    reset_before: Array,
    kernel: Array,
    interpret: bool = False,
) -> tuple[Array, gru.Gradients]:
    """Compute `gru.reverse_scan` in one kernel."""
    like_hiddens = jax.ShapeDtypeStruct(before.shape, before.dtype)
    d_hidden, *d_gates = _each_sequence(
        _reverse_scan,
        (d_hiddens, before, *gates, reset_before.astype(jnp.float32), kernel.T),
        (1, 1, 1, 1, 1, 1, 1, None),
        [jax.ShapeDtypeStruct(before.shape[1:], before.dtype), *[like_hiddens] * 3],
        (0, 1, 1, 1),
        interpret,
    )
    return d_hidden, gru.Gradients(*d_gates)


def _reverse_scan(d_hiddens: Ref, before: Ref, *references: Ref) -> None:
    *gates, reset_before, transposed_kernel, first, d_reset, d_update, d_candidate = references
    weights = [transposed_kernel[third] for third in _thirds(first)]

    def step(i: Array, d_hidden: Array) -> Array:
        t = len(before) - 1 - i
        d_hidden = d_hidden + d_hiddens[t]
        values = gru.Gates(*(gate[t] for gate in gates))
        d_gates = gru.reverse_step(d_hidden, before[t], values)
        for reference, value in zip((d_reset, d_update, d_candidate), d_gates, strict=True):
            reference[t] = value
        d_products = zip(d_gates.of_products(values), weights, strict=True)
        d_before = d_hidden * values.update
        d_before += sum(d_product[:, None] * third for d_product, third in d_products).sum(axis=0)
        return jnp.where(reset_before[t] > 0, 0.0, d_before)

    first[...] = jax.lax.fori_loop(0, len(before), step, jnp.zeros(first.shape))


def _thirds(hidden: Ref) -> list[Any]:
    """Return the slices of the reset, update and candidate gates along an axis of 3H."""
    (width,) = hidden.shape
    return [pl.ds(gate * width, width) for gate in range(3)]


def _each_sequence(
    kernel: Callable[..., None],
    arguments: Sequence[Array],
    axes: Sequence[int | None],
    results: Sequence[jax.ShapeDtypeStruct],
    result_axes: Sequence[int],
    interpret: bool,
) -> list[Array]:
    """Run a kernel on each sequence; `axes` are the axes of B, None where all share an array."""

    def spec(x: Any, axis: int | None) -> pl.BlockSpec:
        block = tuple(None if i == axis else size for i, size in enumerate(x.shape))
        return pl.BlockSpec(block, lambda b: tuple(b if i == axis else 0 for i in range(x.ndim)))

    batch, width = results[0].shape[result_axes[0]], results[0].shape[-1]
    warps = max(1, width * width // 2048)  # of 32 threads, for 3 * width * width weights
    run = pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(batch,),
        in_specs=[*map(spec, arguments, axes)],
        out_specs=[*map(spec, results, result_axes)],
        compiler_params=None if interpret else triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )
    return run(*arguments)
