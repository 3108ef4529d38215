"""The hand-written gradient of the energy gate against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.layers.spectral import rms_gate, rms_gated


def test_the_gated_output_equals_gate_times_input_with_its_gradients():
    rng = np.random.default_rng(0)
    u, dy = (jnp.asarray(rng.normal(size=(3, 16, 33)), jnp.float32) for _ in range(2))
    u = u.at[0, 0].set(0.0)
    slope, bias = (jnp.asarray(1 + rng.normal(size=33), jnp.float32) for _ in range(2))
    y, pullback = jax.vjp(rms_gated, u, slope, bias)
    want, pullback_want = jax.vjp(lambda u, a, b: rms_gate(u, a, b) * u, u, slope, bias)
    for got, truth in zip((y, *pullback(dy)), (want, *pullback_want(dy))):
        np.testing.assert_allclose(got, truth, rtol=1e-4, atol=1e-5 * np.abs(truth).max())
