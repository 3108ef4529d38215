"""LayerNorm and its hand-written gradient against Flax's and JAX's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops.layer_norm import layer_norm


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(fn, x, scale, bias, dy):
    y, pullback = jax.vjp(fn, x, scale, bias)
    return y, pullback(dy)


def _flax(x, scale, bias):
    params = {"params": {"scale": scale, "bias": bias}}
    return nn.LayerNorm(dtype=jnp.float32).apply(params, x.astype(jnp.float32))


def _close(got, want, tolerance):
    got, want = (np.asarray(a).astype(np.float32) for a in (got, want))
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 33), (3, 16, 256)])
def test_equals_flax_with_its_gradients(shape, dtype):
    rng = np.random.default_rng(0)
    x = (3 * rng.normal(size=shape) + 1).astype(dtype)
    scale, bias = (rng.normal(size=shape[-1]).astype(np.float32) for _ in range(2))
    dy = rng.normal(size=shape).astype(np.float32)
    y, (dx, *dparams) = _with_gradients(layer_norm, x, scale, bias, dy)
    y_flax, (dx_flax, *dparams_flax) = _with_gradients(_flax, x, scale, bias, dy)
    assert y.dtype == jnp.float32
    _close(y, y_flax, 1e-6)
    assert dx.dtype == dtype
    # With two features the output is +-1 whatever x is, and dx a difference of equal numbers.
    if shape[-1] > 2:
        _close(dx, dx_flax, 1e-6 if dtype == jnp.float32 else 2**-7)
    for got, want in zip(dparams, dparams_flax):
        _close(got, want, 1e-6)


def test_a_constant_row_has_finite_gradients():
    ones = np.ones((1, 2, 8), np.float32)
    _, gradients = _with_gradients(layer_norm, 5 * ones, ones[0, 0], 0 * ones[0, 0], ones)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
