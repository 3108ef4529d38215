"""The hand-written gradient of the energy gate against JAX's."""

import functools

import jax
import numpy as np

from spectral_pod.layers.spectral import rms_gate, rms_gated


def test_the_gated_output_equals_gate_times_input_with_its_gradients():
    rng = np.random.default_rng(0)
    u, dy = rng.normal(size=(2, 3, 16, 33)).astype(np.float32)
    u[0, 0] = 0
    slope, bias = 1 + rng.normal(size=(2, 33)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(fn, dy, *inputs):
        y, pullback = jax.vjp(fn, *inputs)
        return y, *pullback(dy)

    found = with_gradients(rms_gated, dy, u, slope, bias)
    expected = with_gradients(lambda u, a, b: rms_gate(u, a, b) * u, dy, u, slope, bias)
    for got, truth in zip(found, map(np.asarray, expected), strict=True):
        np.testing.assert_allclose(got, truth, rtol=1e-4, atol=1e-5 * np.abs(truth).max())
