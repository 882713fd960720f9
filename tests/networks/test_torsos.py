"""The orthogonal initialiser: it equals QR, and runs batched on two cores, where QR hangs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.networks.torsos import orthogonal, parts

MANY_INITS = """
import jax
from magpo.networks.torsos import orthogonal

def init(key):
    return [orthogonal()(jax.random.fold_in(key, i), (128, 128)) for i in range(12)]

jax.block_until_ready(jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(0), 8)))
"""


@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (12, 40), (7, 1), (1, 7), (1, 1)])
def test_kernels_equal_those_of_qr(shape):
    for seed in range(4):
        key = jax.random.key(seed)
        kernel, qr = (f(2**0.5)(key, shape) for f in (orthogonal, jax.nn.initializers.orthogonal))
        np.testing.assert_allclose(kernel, qr, atol=3e-5)
        assert kernel.dtype == jnp.float32
        product = kernel @ kernel.T if shape[0] < shape[1] else kernel.T @ kernel
        np.testing.assert_allclose(product, 2 * np.eye(min(shape)), atol=3e-6)


def test_each_part_is_initialised_from_its_own_key():
    key = jax.random.key(0)
    kernel = parts(orthogonal(), 3)(key, (8, 24))
    for part, own_key in zip(jnp.split(kernel, 3, axis=1), jax.random.split(key, 3), strict=True):
        np.testing.assert_allclose(part, orthogonal()(own_key, (8, 8)), atol=1e-6)


def test_many_seeds_initialise_in_one_program():
    subprocess.run([sys.executable, "-c", MANY_INITS], check=True, timeout=60)
