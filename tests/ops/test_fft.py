"""Every method of the spectral filter against independent float64 references."""

import functools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops import matmul_dft, reference
from spectral_pod.ops.fft import choose, spectral_filter
from spectral_pod.ops.kernels import toeplitz_gpu
from tests import processes

METHODS = ("right_angle", "real", "matmul", "plain")
jitted = jax.jit(spectral_filter, static_argnums=2)
SIZES = [(1, 2), (63, 128), (9, 9), (37, 74), (100, 200)]


def _serves(method, length, fft_length):
    """Whether a method supports these sizes; otherwise it raises."""
    if method == "right_angle":
        return 2 * length <= fft_length
    return method != "matmul" or matmul_dft.factors(fft_length) is not None


def _relative_error(got, want):
    return np.abs(np.asarray(got).astype(np.float64) - want).max() / np.abs(want).max()


def _inputs(length, fft_length, width=3, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x_BND = rng.normal(size=(batch, length, width))
    shape = (fft_length // 2 + 1, width)
    w_FD = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    return x_BND, w_FD


@pytest.mark.parametrize(("length", "fft_length"), SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_direct_convolution_and_its_gradients(length, fft_length, method):
    """The filter is bilinear: dx is the mirrored filter of dy, and dW is tested along a line."""
    x, w = _inputs(length, fft_length)
    dy, line = _inputs(length, fft_length, seed=1)

    @jax.jit
    def run(x, w_re, w_im, dy):
        def apply(x, w_re, w_im):
            return spectral_filter(x, jax.lax.complex(w_re, w_im), fft_length, method)

        y, pullback = jax.vjp(apply, x, w_re, w_im)
        return y, *pullback(dy)

    want_y = reference.spectral_filter(x, w, fft_length)
    want_x = reference.spectral_filter(dy, np.conj(w), fft_length)
    want_line = np.sum(reference.spectral_filter(x, line, fft_length) * dy)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        args = x.astype(dtype), *(np.float32(p) for p in (w.real, w.imag))
        if not _serves(method, length, fft_length):
            with pytest.raises(ValueError, match=f"method '{method}'"):
                run(*args, dy.astype(dtype))
            continue
        y, dx, dre, dim = run(*args, dy.astype(dtype))
        assert (y.dtype, dx.dtype, dre.dtype) == (dtype, dtype, jnp.float32)
        assert _relative_error(y, want_y) <= tolerance
        assert _relative_error(dx, want_x) <= tolerance
        dre, dim = np.float64(dre), np.float64(dim)
        got_line = np.sum(dre * line.real + dim * line.imag)
        size = np.linalg.norm([dre, dim]) * np.linalg.norm(line)
        assert abs(got_line - want_line) <= tolerance * size


@pytest.mark.parametrize("factors", [(4, 5, 10), (25, 8), (2, 100)])
def test_any_factors_give_the_same(factors):
    x_BND, w_FD = _inputs(77, 200)
    x_BDN, w_FD = np.float32(np.swapaxes(x_BND, 1, 2)), np.complex64(w_FD)

    @jax.jit
    def run(x_BDN, w_FD):
        return matmul_dft.filter_real(x_BDN, matmul_dft.ordered_spectrum(w_FD, factors), factors)

    got, want = run(x_BDN, w_FD), reference.spectral_filter(x_BND, w_FD, 200)
    np.testing.assert_allclose(np.swapaxes(got, 1, 2), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_dispatch_chooses_a_method_that_supports_the_sizes(platform):
    for length, fft_length in SIZES:
        chosen = choose(platform, length, fft_length, jnp.float32, 128).method
        assert _serves(chosen, length, fft_length)
    # Of TPUs here, where none is: the kernel is chosen in test_kernels_on_tpus.py.
    chosen = {"cpu": "right_angle", "tpu": "matmul", "gpu": "real"}[platform]
    assert choose(platform, 512, 1024, jnp.bfloat16, 128).method == chosen


def test_gpus_have_a_kernel_for_short_sequences():
    with mock.patch.object(toeplitz_gpu, "platform", return_value="gpu"):
        assert choose("gpu", 1024, 2048, jnp.bfloat16, 128).method == "toeplitz"
        assert choose("gpu", 1025, 2050, jnp.bfloat16, 128).method == "real"


def test_the_backward_pass_keeps_only_its_inputs():
    x_BND, w_FD = _inputs(256, 512)
    for method in ("right_angle", "matmul"):
        run = functools.partial(spectral_filter, fft_length=512, method=method)
        _, pullback = jax.jit(functools.partial(jax.vjp, run))(
            np.float32(x_BND), np.complex64(w_FD)
        )
        kept = sum(x.nbytes for x in jax.tree.leaves(pullback) if isinstance(x, jax.Array))
        assert kept <= x_BND.size * 4 + 2 * w_FD.size * 8 + 2**12, method


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
    got = jitted(np.float32(x_BND), np.complex64(w_FD), length)
    np.testing.assert_allclose(got, original, atol=1e-5)


def test_linear_padding_does_not_wrap_and_circular_does():
    x_BND = np.zeros((1, 8, 1))
    x_BND[0, 0] = 1.0
    shift_back = np.exp(2j * np.pi * np.arange(9) / 16)[:, None]  # y[n] = x[n + 1] at 16 points
    linear = jitted(np.float32(x_BND), np.complex64(shift_back), 16)
    np.testing.assert_allclose(linear, np.zeros((1, 8, 1)), atol=1e-6)
    shift_back = np.exp(2j * np.pi * np.arange(5) / 8)[:, None]
    circular = jitted(np.float32(x_BND), np.complex64(shift_back), 8)
    assert np.asarray(circular)[0, 7, 0] == pytest.approx(1.0, abs=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    x_BND, w_FD = _inputs(9, 8)
    with pytest.raises(ValueError, match="cannot serve 9 positions"):
        spectral_filter(jnp.float32(x_BND), jnp.complex64(w_FD), 8)


INDEPENDENT_FILTERS = """
import jax
from spectral_pod.ops.fft import spectral_filter

def gradients(x_BND, w_FD):
    return jax.grad(lambda x, w: spectral_filter(x, w, 2048).sum(), (0, 1))(x_BND, w_FD)

xs = jax.random.normal(jax.random.key(0), (8, 2, 1024, 64))
ws = jax.random.normal(jax.random.key(1), (8, 1025, 64)) + 0j
jitted = jax.jit(lambda xs, ws: [gradients(x, w) for x, w in zip(xs, ws)])
for _ in range(3):
    jax.block_until_ready(jitted(xs, ws))
"""


def test_filters_that_can_run_at_once_do_not_block_each_other():
    """JAX 0.11.1 and 0.11.2 deadlock here (pyproject.toml), which only ends with the process."""
    command = [sys.executable, "-c", INDEPENDENT_FILTERS]
    env = processes.environment() | {"PJRT_NPROC": "2"}  # threads: few are soon all blocked
    done = processes.run(command, timeout=120, env=env)
    assert done.returncode == 0
