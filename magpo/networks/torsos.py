"""Feed-forward parts that several networks share, and their initialisers.

Axis letters beyond `magpo.types`: D input features, F output features.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import lecun_normal, ones_init, zeros_init

from magpo.networks.kernels import add_bias, normalise
from magpo.types import Array

Initializer = Callable[..., Array]  # from a key, a shape and a dtype


def orthogonal(gain: float = 1.0) -> Initializer:
    """Return an initialiser of (D, F) kernels with orthogonal rows or columns, whichever are fewer.

    It draws what `jax.nn.initializers.orthogonal` draws, but orthogonalises by Gram-Schmidt instead
    of LAPACK's QR: XLA's CPU backend runs batched QR calls in parallel, and the calls of a user's
    `jit(vmap(init))` deadlock on two cores.
    """

    def initializer(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        tall = (max(shape), min(shape))
        vectors = gram_schmidt(jax.random.normal(key, tall, dtype).T)  # (min, max)
        kernel: Array = gain * (vectors if shape[0] < shape[1] else vectors.T)
        return kernel

    return initializer


@jax.jit  # traced once, and one function in the program for all layers of a shape
def gram_schmidt(vectors: Array) -> Array:
    """Orthonormalise the rows of (K, D), K <= D, in order.

    Each row is projected twice, because rounding leaves it visibly non-orthogonal after one.
    """

    def add_row(i: Array, basis: Array) -> Array:
        row = vectors[i]
        row -= (basis @ row) @ basis  # rows i, i + 1, ... of `basis` are still 0
        row -= (basis @ row) @ basis
        row /= jnp.sqrt(row @ row)
        extended: Array = jax.lax.dynamic_update_index_in_dim(basis, row, i, axis=0)
        return extended

    basis: Array = jax.lax.fori_loop(0, len(vectors), add_row, jnp.zeros_like(vectors))
    return basis


def parts(init: Initializer, number: int) -> Initializer:
    """Return an initialiser of (D, number * F) kernels: `number` of (D, F), side by side."""

    def initializer(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        part = (shape[0], shape[1] // number)
        kernels = jax.vmap(lambda key: init(key, part, dtype))(jax.random.split(key, number))
        return kernels.swapaxes(0, 1).reshape(shape)  # (number, D, F) to (D, number * F)

    return initializer


def affine(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Return x (..., D) times kernel (D, F), plus a bias (F,), with the leading axes merged.

    Over several leading axes, XLA's CPU backend would form the weight gradient from transposed
    copies, which is several times slower.
    """
    y = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
    return y if bias is None else add_bias(y, bias)


class Dense(nn.Module):
    """`flax.linen.Dense`, computed by `affine`."""

    features: int
    use_bias: bool = True
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", zeros_init(), (self.features,)) if self.use_bias else None
        return affine(x, kernel, bias)


class RMSNorm(nn.Module):
    """`flax.linen.RMSNorm` of the last axis (Zhang and Sennrich, 2019)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return normalise(x, self.param("scale", ones_init(), x.shape[-1:]))


class LayerNorm(nn.Module):
    """`flax.linen.LayerNorm` of the last axis, or of `n_head` parts of it (Ba et al., 2016)."""

    n_head: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", ones_init(), x.shape[-1:])
        bias = self.param("bias", zeros_init(), x.shape[-1:])
        if self.n_head == 1:
            return normalise(x, scale, bias)
        heads = (self.n_head, -1)
        by_head = x.reshape(*x.shape[:-1], *heads)
        return normalise(by_head, scale.reshape(heads), bias.reshape(heads)).reshape(x.shape)


def mask_out(x: Array, keep: Array) -> Array:
    """Replace entries that are not to `keep` with the dtype's lowest value, before a softmax."""
    finfo: Any = jnp.finfo  # untyped
    return jnp.where(keep, x, finfo(x.dtype).min)


class SwiGLU(nn.Module):
    """A gated feed-forward layer as wide as the embedding (Shazeer, 2020).

    Its matrices start non-zero: if they all start at zero, as in Sable's released code, their
    gradients stay zero.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        gate, linear = jnp.split(Dense(2 * width, use_bias=False)(x), 2, axis=-1)
        output: Array = Dense(width, use_bias=False)(nn.swish(gate) * linear)
        return output


def sinusoidal_encoding(position: Array, width: int) -> Array:
    """Encode positions (...) as (..., width) sines, then cosines, of geometric wavelengths."""
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2) / width)
    angle = position[..., None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
