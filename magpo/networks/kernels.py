"""Temporary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from magpo.types import Array


class _Gates(NamedTuple):
    """What the reverse pass needs of one step, each (B, H)."""

    reset: Array  # r
    update: Array  # z
    candidate: Array  # n
    recurrent: Array  # the hidden state's part of the candidate, before r scales it


def _keep(reset_before: Array, hidden: Array) -> Array:
    return jnp.where(reset_before[..., None], 0.0, hidden)


def _gru_step(hidden: Array, inputs: Array, kernel: Array, bias: Array) -> tuple[Array, _Gates]:
    input_r, input_z, input_n = jnp.split(inputs, 3, axis=-1)
    hidden_r, hidden_z, hidden_n = jnp.split(hidden @ kernel, 3, axis=-1)
    reset = jax.nn.sigmoid(input_r + hidden_r)
    update = jax.nn.sigmoid(input_z + hidden_z)
    recurrent = hidden_n + bias
    candidate = jnp.tanh(input_n + reset * recurrent)
    hidden = candidate + update * (hidden - candidate)
    return hidden, _Gates(reset, update, candidate, recurrent)


@jax.custom_vjp
def gru_scan(
    hidden: Array, inputs: Array, reset_before: Array, kernel: Array, bias: Array
) -> Array:
    """Hidden states (T, B, H) of a GRU over `inputs`.

    Args:
        hidden: (B, H), before the first step.
        inputs: (T, B, 3H), the projected inputs of the reset, update and candidate gates.
        reset_before: (T, B) bool, where the hidden state is zeroed before the step.
        kernel: (H, 3H) recurrent weights.
        bias: (H,) of the candidate's recurrent part.
    """
    return _gru_forward(hidden, inputs, reset_before, kernel, bias)[0]


def _gru_forward(
    hidden: Array, inputs: Array, reset_before: Array, kernel: Array, bias: Array
) -> tuple[Array, tuple]:
    def step(hidden, step_inputs):
        inputs, reset_before = step_inputs
        hidden, gates = _gru_step(_keep(reset_before, hidden), inputs, kernel, bias)
        return hidden, (hidden, gates)

    _, (hiddens, gates) = jax.lax.scan(step, hidden, (inputs, reset_before))
    return hiddens, (hidden, hiddens, gates, reset_before, kernel)


def _gru_backward(residuals: tuple, d_hiddens: Array) -> tuple:
    hidden, hiddens, gates, reset_before, kernel = residuals
    before = _keep(reset_before, jnp.concatenate([hidden[None], hiddens[:-1]]))  # (T, B, H)

    def step(d_hidden, step_inputs):
        d_output, before, gates, reset_before = step_inputs
        d_hidden = d_hidden + d_output
        d_candidate = d_hidden * (1.0 - gates.update) * (1.0 - gates.candidate**2)
        d_update = d_hidden * (before - gates.candidate) * gates.update * (1.0 - gates.update)
        d_reset = d_candidate * gates.recurrent * gates.reset * (1.0 - gates.reset)
        d_gates = jnp.concatenate([d_reset, d_update, d_candidate * gates.reset], axis=-1)
        d_before = d_hidden * gates.update + d_gates @ kernel.T
        return _keep(reset_before, d_before), (d_gates, d_candidate)

    d_hidden, (d_gates, d_candidate) = jax.lax.scan(
        step, jnp.zeros_like(hidden), (d_hiddens, before, gates, reset_before), reverse=True
    )
    width = hidden.shape[-1]
    d_inputs = jnp.concatenate([d_gates[..., : 2 * width], d_candidate], axis=-1)
    d_kernel = before.reshape(-1, width).T @ d_gates.reshape(-1, 3 * width)
    d_bias = d_gates[..., 2 * width :].sum((0, 1))
    return d_hidden, d_inputs, None, d_kernel, d_bias


gru_scan.defvjp(_gru_forward, _gru_backward)


@jax.custom_vjp
def look_up(table: Array, action: Array) -> Array:
    """table (N, A, H), action (..., N) int to rows (..., N, H)."""
    return table[jnp.arange(table.shape[0]), action]


def look_up_backward(inputs: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, action = inputs  # one matmul: the scatter of autodiff adds up in any order on a GPU
    chosen = jax.nn.one_hot(action, table.shape[1])
    return jnp.einsum("...na,...nh->nah", chosen, d_rows), None


look_up.defvjp(lambda table, action: (look_up(table, action), (table, action)), look_up_backward)


@jax.custom_vjp
def sum_of_others(x: Array) -> Array:
    """(..., N, H) to the sums over all agents but one, whose own row counts exactly nothing."""
    others = 1.0 - jnp.eye(x.shape[-2])
    return (others[..., None] * x[..., None, :, :]).sum(axis=-2)


sum_of_others.defvjp(
    lambda x: (sum_of_others(x), None),
    lambda _, d_sums: (d_sums.sum(axis=-2, keepdims=True) - d_sums,),  # near enough for a gradient
)
