"""The spectral mixer: initial kernels, and the hand-written gradient of its energy gate."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.layers.spectral import (
    initial_kernels,
    rms_gate,
    rms_gated,
    transfer_functions,
)


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


@pytest.mark.parametrize("pattern", ["spectral", "selective"])
def test_a_gate_starts_with_the_bias_of_the_configuration(pattern):
    config = default()
    config.data.seq_len = 64
    config.model.pattern, config.model.num_layers, config.model.hidden_dim = (pattern,), 1, 16
    config.model.selective.energy_gate, config.model.spectral.energy_bias = "rms", 3.0
    params = models.build(config, num_classes=2).init(
        jax.random.key(0), jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64), bool)
    )
    flat = traverse_util.flatten_dict(nn.unbox(params)["params"], sep="/")
    first = {name.rpartition("/")[2]: x for name, x in flat.items() if "/energy_" in name}
    assert first.keys() == {"energy_slope", "energy_bias"}
    assert (np.asarray(first["energy_slope"]) == 1).all()
    assert (np.asarray(first["energy_bias"]) == 3).all()


@pytest.mark.parametrize(("kind", "energy"), [("noise", 1.0), ("smooth", 1.0), ("small", 512e-6)])
def test_initial_kernels_have_the_energy_that_is_documented(kind, energy):
    kernel_TD = np.asarray(initial_kernels(kind)(jax.random.key(0), (128, 4000)))
    np.testing.assert_allclose(np.mean(np.sum(kernel_TD**2, axis=0)), energy, rtol=0.1)


def test_smooth_kernels_are_exponentials_to_each_side():
    length, width = 64, 5
    init = initial_kernels("smooth", tau_min=0.5, tau_max=8.0)
    kernel_TD = np.asarray(init(jax.random.key(0), (length, width)))
    ratio_D = np.exp(-1 / np.geomspace(0.5, 8.0, width))
    past_TD, future_TD = kernel_TD[: length // 2 + 1], kernel_TD[: length // 2 : -1]
    for side_TD in (past_TD[:12], future_TD[:12]):
        np.testing.assert_allclose(side_TD[1:], side_TD[:-1] * ratio_D, rtol=1e-4)
    assert (np.abs(past_TD[1] - future_TD[0]) > 1e-3 * np.abs(past_TD[1])).all()


def test_transfer_functions_are_the_spectra_of_the_kernels():
    key, kernels = jax.random.key(0), initial_kernels("smooth", 1.0, 4.0)
    re, im = np.asarray(transfer_functions(kernels)(key, (2, 17, 3)))
    kernel_TD = np.fft.irfft(re + 1j * im, 32, axis=0)
    np.testing.assert_allclose(kernel_TD, kernels(key, (32, 3)), atol=1e-6)
