"""Small feed-forward pieces of sequence models."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from magpo.types import Array


def _flat_dot_general(x: Array, kernel: Array, *_args, **_kwargs) -> Array:
    """(..., D) x (D, F) with all leading axes as one: XLA's CPU backend forms the weight gradient
    of a matmul over several leading axes from transposed copies, several times slower."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


Dense = partial(nn.Dense, dot_general=_flat_dot_general)


def parts(init: Any, number: int) -> Any:
    """Initialise a (D, number * F) kernel as that many of (D, F), side by side."""

    def initializer(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        width = shape[1] // number
        keys = jax.random.split(key, number)
        return jnp.concatenate([init(k, (shape[0], width), dtype) for k in keys], axis=1)

    return initializer


class SwiGLU(nn.Module):
    """Gated feed-forward layer of the embedding's own width (Shazeer, 2020).

    Its matrices start non-zero: from all zeros, as released with Sable, their gradients are zero
    for ever.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        gate, linear = jnp.split(Dense(2 * width, use_bias=False)(x), 2, axis=-1)
        return Dense(width, use_bias=False)(nn.swish(gate) * linear)


def sinusoidal_encoding(position: Array, width: int) -> Array:
    """(...) positions to (..., width): sines, then cosines, of geometric wavelengths."""
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2) / width)
    angle = position[..., None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
