"""The parallel scan against the sequential recurrence that defines it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops.diagonal_scan import diagonal_scan


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 63, 100])
def test_equals_the_recurrence(length, reverse):
    rng = np.random.default_rng(length)
    log_a = -rng.uniform(0.001, 2, 5) + 1j * rng.uniform(-3, 3, 5)
    b = rng.normal(size=(2, length, 5)) + 1j * rng.normal(size=(2, length, 5))
    want, state = np.zeros_like(b), 0
    for n in range(length)[:: -1 if reverse else 1]:
        state = np.exp(log_a) * state + b[:, n]
        want[:, n] = state
    scan = jax.jit(diagonal_scan, static_argnames="reverse")
    got = scan(jnp.complex64(log_a), jnp.complex64(b), reverse=reverse)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
