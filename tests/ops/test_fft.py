"""The spectral filter against independent float64 forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops import reference
from spectral_pod.ops.fft import spectral_filter


def _inputs(length, fft_length, width=3, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x_BND = rng.normal(size=(batch, length, width))
    shape = (fft_length // 2 + 1, width)
    w_FD = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    return x_BND, w_FD


@pytest.mark.parametrize(("length", "fft_length"), [(1, 2), (7, 14), (64, 128), (63, 128), (9, 9)])
def test_equals_direct_convolution_in_float64(length, fft_length):
    x_BND, w_FD = _inputs(length, fft_length)
    got = spectral_filter(jnp.float32(x_BND), jnp.complex64(w_FD), fft_length)
    want = reference.spectral_filter(x_BND, w_FD, fft_length)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("length", [8, 9])
def test_equals_the_original_complex_fft_with_hermitian_filter(length):
    """Re(IFFT(W . FFT x)) is the real filter with (W[k] + conj W[-k]) / 2, at even and odd N."""
    rng = np.random.default_rng(1)
    x_BND = rng.normal(size=(2, length, 3))
    w_ND = rng.normal(size=(length, 3)) + 1j * rng.normal(size=(length, 3))
    original = np.fft.ifft(w_ND * np.fft.fft(x_BND, axis=1), axis=1).real
    hermitian_ND = (w_ND + np.conj(np.roll(w_ND[::-1], 1, axis=0))) / 2
    w_FD = hermitian_ND[: length // 2 + 1]
    np.testing.assert_allclose(reference.spectral_filter(x_BND, w_FD, length), original, atol=1e-12)
    got = spectral_filter(jnp.float32(x_BND), jnp.complex64(w_FD), length)
    np.testing.assert_allclose(got, original, atol=1e-5)


def test_gradients_agree_with_float64_differences():
    x_BND, w_FD = _inputs(5, 10)
    rng = np.random.default_rng(2)
    g_BND, dx, dw = rng.normal(size=x_BND.shape), rng.normal(size=x_BND.shape), w_FD[::-1]

    def loss(x, w_re, w_im):
        y = spectral_filter(x, jax.lax.complex(w_re, w_im), 10)
        return jnp.sum(y * jnp.float32(g_BND))

    args = [jnp.float32(a) for a in (x_BND, w_FD.real, w_FD.imag)]
    tangents = [jnp.float32(a) for a in (dx, dw.real, dw.imag)]
    grads = jax.grad(loss, argnums=(0, 1, 2))(*args)
    got = sum(float(jnp.vdot(g, t)) for g, t in zip(grads, tangents))
    eps = 1e-6

    def exact(sign):
        y = reference.spectral_filter(x_BND + sign * eps * dx, w_FD + sign * eps * dw, 10)
        return np.sum(y * g_BND)

    assert got == pytest.approx((exact(1) - exact(-1)) / (2 * eps), rel=1e-4)


def test_linear_padding_does_not_wrap_and_circular_does():
    x_BND = np.zeros((1, 8, 1))
    x_BND[0, 0] = 1.0
    shift_back = np.exp(2j * np.pi * np.arange(9) / 16)[:, None]  # y[n] = x[n + 1] at 16 points
    linear = spectral_filter(jnp.float32(x_BND), jnp.complex64(shift_back), 16)
    np.testing.assert_allclose(linear, np.zeros((1, 8, 1)), atol=1e-6)
    shift_back = np.exp(2j * np.pi * np.arange(5) / 8)[:, None]
    circular = spectral_filter(jnp.float32(x_BND), jnp.complex64(shift_back), 8)
    assert circular[0, 7, 0] == pytest.approx(1.0, abs=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    x_BND, w_FD = _inputs(9, 8)
    with pytest.raises(ValueError, match="cannot serve 9 positions"):
        spectral_filter(jnp.float32(x_BND), jnp.complex64(w_FD), 8)
