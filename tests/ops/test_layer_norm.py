"""LayerNorm and its hand-written gradient against Flax's and JAX's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops.layer_norm import layer_norm


def _flax(x, scale, bias):
    params = {"params": {"scale": scale, "bias": bias}}
    return nn.LayerNorm(dtype=jnp.float32).apply(params, x.astype(jnp.float32))


def _close(got, want, tolerance):
    got, want = (np.asarray(a.astype(jnp.float32)) for a in (got, want))
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 33), (3, 16, 256)])
def test_equals_flax_with_its_gradients(shape, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.normal(size=shape) + 1, dtype)
    scale, bias = (jnp.asarray(rng.normal(size=shape[-1]), jnp.float32) for _ in range(2))
    dy = jnp.asarray(rng.normal(size=shape), jnp.float32)
    y, pullback = jax.vjp(layer_norm, x, scale, bias)
    y_flax, pullback_flax = jax.vjp(_flax, x, scale, bias)
    assert y.dtype == jnp.float32
    _close(y, y_flax, 1e-6)
    (dx, *dparams), (dx_flax, *dparams_flax) = pullback(dy), pullback_flax(dy)
    assert dx.dtype == dtype
    # With two features the output is +-1 whatever x is, and dx a difference of equal numbers.
    if shape[-1] > 2:
        _close(dx, dx_flax, 1e-6 if dtype == jnp.float32 else 2**-7)
    for got, want in zip(dparams, dparams_flax):
        _close(got, want, 1e-6)


def test_a_constant_row_has_finite_gradients():
    x = jnp.full((1, 2, 8), 5.0)
    pullback = jax.vjp(layer_norm, x, jnp.ones(8), jnp.zeros(8))[1]
    for gradient in pullback(jnp.ones_like(x)):
        assert np.isfinite(gradient).all()
