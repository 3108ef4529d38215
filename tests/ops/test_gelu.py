"""GELU against its formula in float64, with its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops.gelu import gelu


def _truth(x):
    """The function and its derivative in float64."""
    scale = np.sqrt(2 / np.pi)
    tanh = np.tanh(scale * (x + 0.044715 * x**3))
    slope = scale * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_equals_float64_with_its_gradient(dtype, tolerance):
    x = jnp.linspace(-6, 6, 1001, dtype=dtype)
    y, pullback = jax.vjp(gelu, x)
    (dx,) = pullback(jnp.ones_like(x))
    for got, want in zip((y, dx), _truth(np.asarray(x.astype(jnp.float32), np.float64))):
        assert got.dtype == dtype
        # The result is rounded once. XLA's tanh near 1 is accurate to 4e-7, and terms are up to 6.
        error = np.abs(np.asarray(got.astype(jnp.float32)) - want)
        assert (error <= tolerance * np.abs(want) + 1e-5).all()


def test_large_values_are_zero_or_themselves():
    x = jnp.asarray([-1e4, 1e4])
    y, pullback = jax.vjp(gelu, x)
    np.testing.assert_array_equal(y, [0, 1e4])
    np.testing.assert_array_equal(pullback(jnp.ones_like(x))[0], [0, 1])
