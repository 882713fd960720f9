"""The recurrence of a GRU over time (Cho et al., 2014, in cuDNN's form) and its reverse pass.

Axis letters beyond `magpo.types`: B sequences, H features of a hidden state.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from magpo.types import Array


class Gates(NamedTuple):
    """One step's intermediate results for the reverse pass, each (B, H)."""

    reset: Array  # r
    update: Array  # z
    candidate: Array  # n
    recurrent: Array  # the hidden state's part of the candidate, before r scales it


class Gradients(NamedTuple):
    """The gradients with respect to the three gates' pre-activations, each (B, H)."""

    reset: Array
    update: Array
    candidate: Array

    def of_products(self, gates: Gates) -> tuple[Array, Array, Array]:
        """Return the gradients of the hidden state's products with the recurrent weights."""
        return self.reset, self.update, self.candidate * gates.reset


def keep(reset_before: Array, hidden: Array) -> Array:
    """Zero the hidden states (..., H) where an episode starts, (...)."""
    return jnp.where(reset_before[..., None], 0.0, hidden)


def step(
    hidden: Array, inputs: Sequence[Array], products: Sequence[Array], bias: Array
) -> tuple[Array, Gates]:
    """Return the next hidden state, given the three gates' inputs and products with `hidden`."""
    reset = jax.nn.sigmoid(inputs[0] + products[0])
    update = jax.nn.sigmoid(inputs[1] + products[1])
    recurrent = products[2] + bias
    candidate = jnp.tanh(inputs[2] + reset * recurrent)
    hidden = candidate + update * (hidden - candidate)
    return hidden, Gates(reset, update, candidate, recurrent)


def reverse_step(d_hidden: Array, before: Array, gates: Gates) -> Gradients:
    """Return the gates' gradients; `before` is the hidden state that the step began with."""
    d_candidate = d_hidden * (1.0 - gates.update) * (1.0 - gates.candidate**2)
    d_update = d_hidden * (before - gates.candidate) * gates.update * (1.0 - gates.update)
    d_reset = d_candidate * gates.recurrent * gates.reset * (1.0 - gates.reset)
    return Gradients(d_reset, d_update, d_candidate)


def gru_reference(
    hidden: Array, inputs: Array, reset_before: Array, kernel: Array, bias: Array
) -> Array:
    """Return the hidden states (T, B, H).

    Args:
        hidden: (B, H), before the first step.
        inputs: (T, B, 3H), the projected inputs of the reset, update and candidate gates.
        reset_before: (T, B) bool, where the hidden state is zeroed before the step.
        kernel: (H, 3H) recurrent weights.
        bias: (H,), of the candidate's recurrent part.
    """
    return scan(hidden, inputs, reset_before, kernel, bias)[0]


@jax.custom_vjp
def gru(hidden: Array, inputs: Array, reset_before: Array, kernel: Array, bias: Array) -> Array:
    """Compute `gru_reference` with a faster reverse pass.

    It keeps the gates' gradients of all steps, so the weight gradient is one matmul at the end
    instead of a sum over steps.
    """
    return _forward(hidden, inputs, reset_before, kernel, bias)[0]


def scan(
    hidden: Array, inputs: Array, reset_before: Array, kernel: Array, bias: Array
) -> tuple[Array, Gates]:
    """Return the hidden states and gates (T, B, H)."""

    def body(hidden: Array, step_inputs: tuple[Any, Array]) -> tuple[Array, tuple[Array, Gates]]:
        inputs, reset_before = step_inputs
        hidden = keep(reset_before, hidden)
        products = jnp.split(hidden @ kernel, 3, axis=-1)
        hidden, gates = step(hidden, inputs, products, bias)
        return hidden, (hidden, gates)

    # Split here: with a split in the loop, XLA's CPU backend does not vectorise the gates.
    gate_inputs = jnp.split(inputs, 3, axis=-1)
    return jax.lax.scan(body, hidden, (gate_inputs, reset_before))[1]


def reverse_scan(
    d_hiddens: Array, before: Array, gates: Gates, reset_before: Array, kernel: Array
) -> tuple[Array, Gradients]:
    """Return the gradients of the first hidden state (B, H) and of all gates (T, B, H)."""

    def body(d_hidden: Array, step_inputs: tuple[Any, ...]) -> tuple[Array, Gradients]:
        d_output, before, gates, reset_before = step_inputs
        d_hidden = d_hidden + d_output
        d_gates = reverse_step(d_hidden, before, gates)
        d_products = jnp.concatenate(d_gates.of_products(gates), axis=-1)
        d_before = d_hidden * gates.update + d_products @ kernel.T
        return keep(reset_before, d_before), d_gates

    inputs = d_hiddens, before, gates, reset_before
    return jax.lax.scan(body, jnp.zeros_like(before[0]), inputs, reverse=True)


def _fastest(function: Callable[..., Any], steps: int, width: int) -> Callable[..., Any]:
    """Return `function`, or on a GPU its namesake in `gru_gpu` if that supports the sizes."""
    device, *_ = jax.devices()
    capability = str(getattr(device, "compute_capability", "")).partition(".")[0]
    triton = capability.isdigit() and int(capability) >= 8
    if not triton or steps == 1 or width not in (32, 64, 128):
        return function
    try:
        from magpo.networks import gru_gpu
    except ImportError:  # a later JAX: 0.11 announces the end of Triton in Pallas
        return function
    kernel = getattr(gru_gpu, function.__name__)
    return partial(jax.lax.platform_dependent, cuda=kernel, default=function)


def _forward(
    hidden: Array, inputs: Array, reset_before: Array, kernel: Array, bias: Array
) -> tuple[Array, tuple[Any, ...]]:
    (steps, batch), width = reset_before.shape, hidden.shape[-1]
    expected = (batch, width), (steps, batch, 3 * width), (width, 3 * width), (width,)
    chex.assert_shape((hidden, inputs, kernel, bias), expected)
    run = _fastest(scan, steps, width)
    hiddens, gates = run(hidden, inputs, reset_before, kernel, bias)
    return hiddens, (hidden, hiddens, gates, reset_before, kernel)


def _backward(residuals: tuple[Any, ...], d_hiddens: Array) -> tuple[Any, ...]:
    hidden, hiddens, gates, reset_before, kernel = residuals
    steps, _, width = hiddens.shape
    before = keep(reset_before, jnp.concatenate([hidden[None], hiddens[:-1]]))  # (T, B, H)
    run = _fastest(reverse_scan, steps, width)
    d_hidden, d_gates = run(d_hiddens, before, gates, reset_before, kernel)
    d_inputs = jnp.concatenate(d_gates, axis=-1)
    d_products = jnp.concatenate(d_gates.of_products(gates), axis=-1)
    d_kernel = before.reshape(-1, width).T @ d_products.reshape(-1, 3 * width)
    return d_hidden, d_inputs, None, d_kernel, d_products[..., 2 * width :].sum((0, 1))


gru.defvjp(_forward, _backward)
