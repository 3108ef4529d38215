"""The affine map of a dense layer against float64, with its gradients, in both dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops.affine import affine


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize(("rows", "num_in", "num_out"), [(1, 1, 1), (7, 33, 5), (64, 256, 96)])
def test_equals_float64(rows, num_in, num_out, dtype, tolerance):
    rng = np.random.default_rng(0)
    x, w, b, dy = (
        rng.normal(size=s).astype(dtype)
        for s in ((rows, num_in), (num_in, num_out), (num_out,), (rows, num_out))
    )

    @jax.jit
    def run(x, w, b, dy):
        y, pullback = jax.vjp(affine, x, w, b)
        return y, *pullback(dy)

    got = run(x, w, b, dy)
    x64, w64, b64, dy64 = (a.astype(np.float64) for a in (x, w, b, dy))
    want = (x64 @ w64 + b64, dy64 @ w64.T, x64.T @ dy64, dy64.sum(0))
    for g, truth in zip(got, want):
        assert g.dtype == dtype
        error = np.abs(np.asarray(g).astype(np.float32) - truth).max()
        assert error <= tolerance * np.abs(truth).max()


def test_bfloat16_operands_stay_bfloat16_in_the_backward_pass():
    """A fused transpose would be computed as a float32 product, not on the matrix unit."""
    x, w, b = (jnp.ones(shape, jnp.bfloat16) for shape in ((64, 32), (32, 48), 48))

    def step(x, w, b):
        return jax.vjp(affine, x, w, b)[1](jnp.ones((64, 48), jnp.bfloat16))

    text = jax.jit(step).lower(x, w, b).compile().as_text()
    products = [line for line in text.splitlines() if " dot(" in line]
    assert products
    for line in products:
        assert "f32[" not in line.split(" dot(")[1], line
