"""The kernels of the spectral filter, interpreted, against numpy's FFTs in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops.fft import KERNELS, spectral_filter
from spectral_pod.ops.kernels import NotServed, butterfly
from spectral_pod.ops.kernels.cost import kernels

# Length, points of the FFT, channels, sequences: one block and several, blocks that are half
# empty, more points than twice the length, circular filters, several groups of channels, several
# sequences and groups of them.
QUICK = [(200, 512, 3, 1)]
SLOW = [
    (1, 32, 20, 1), (16, 32, 2, 3), (32, 32, 2, 8), (37, 128, 1, 2), (100, 256, 130, 1),
    (256, 256, 2, 6), (257, 1024, 1, 1), (512, 1024, 1, 1),
]  # fmt: skip
# Root mean square, and largest error of the largest value. In bfloat16 the inputs, the matrices,
# the filtered bins and the result are rounded. The two terms of a float32 have 17 bits together.
TOLERANCE = {"float32": (1e-5, 2e-5), "bfloat16": (5e-3, 8e-3)}


def drawn(length, num_points, width, batch, dtype):
    """Inputs that are exact in the dtype, as float64; parts of the filter first."""
    rng = np.random.default_rng(length)
    x, dy = (
        np.asarray(jnp.asarray(x, dtype), np.float64)
        for x in rng.normal(size=(2, batch, length, width))
    )
    return x, *np.float32(rng.normal(size=(2, num_points // 2 + 1, width))), dy


def exact(x_BND, re_FD, im_FD, dy_BND, num_points):
    """The filter and its gradients by the three arguments, float64."""
    length = x_BND.shape[1]
    w_FD = re_FD + 1j * im_FD.astype(np.float64)
    x_BFD, dy_BFD = (np.fft.rfft(v_BND, num_points, axis=1) for v_BND in (x_BND, dy_BND))
    filtered = x_BFD * w_FD, dy_BFD * w_FD.conj()
    y_BND, dx_BND = (np.fft.irfft(v, num_points, axis=1)[:, :length] for v in filtered)
    dw_FD = 2 / num_points * (x_BFD.conj() * dy_BFD).sum(0)
    dw_FD[[0, -1]] = dw_FD[[0, -1]].real / 2  # which occur once, and whose imaginary part is unused
    return y_BND, dx_BND, dw_FD.real, dw_FD.imag


@functools.partial(jax.jit, static_argnums=(4, 5))
def run_all(x_BND, re_FD, im_FD, dy_BND, num_points, kernel):
    def run(x_BND, re_FD, im_FD):
        w_FD = jax.lax.complex(re_FD, im_FD)
        return spectral_filter(x_BND, w_FD, num_points, f"{kernel}_interpreted")

    y_BND, pullback = jax.vjp(run, x_BND, re_FD, im_FD)
    return y_BND, *pullback(dy_BND)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "sizes", [*QUICK, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in SLOW)]
)
def test_equals_the_filter_by_ffts_and_its_gradients(sizes, dtype, kernel):
    x, re, im, dy = drawn(*sizes, dtype)
    got = run_all(jnp.asarray(x, dtype), re, im, jnp.asarray(dy, dtype), sizes[1], kernel)
    want = exact(x, re, im, dy, sizes[1])
    assert [v.dtype.name for v in got] == [dtype, dtype, "float32", "float32"]
    mean_square, largest = TOLERANCE[dtype]
    for name, value, truth in zip(("y", "dx", "dre", "dim"), got, want, strict=True):
        error = np.abs(np.asarray(value, np.float64) - truth)
        assert error.max() <= largest * np.abs(truth).max(), name
        assert np.linalg.norm(error) <= mean_square * np.linalg.norm(truth), name


def test_the_cost_is_that_of_its_products_and_of_reading_and_writing_once():
    """Counted from the kernel's program: two products of 2T by 2T for each of 4 residues, T = 64,
    and 128 lanes; and the matrices, which are read once, as is the filter."""
    x_BND, w_FD = jnp.zeros((16, 200, 256), jnp.bfloat16), jnp.zeros((257, 256), jnp.complex64)
    run = functools.partial(spectral_filter, fft_length=512, method="butterfly_interpreted")
    (kernel,) = kernels(jax.make_jaxpr(run)(x_BND, w_FD).jaxpr)
    cost = kernel.params["cost_estimate"]
    matrices = 2 * 4 * 128 * 128
    assert cost.flops == 2 * matrices * 16 * 256
    assert cost.bytes_accessed == 2 * 16 * 256 * 256 * 2 + 2 * 256 * 256 * 4 + 2 * matrices


def test_what_it_does_not_serve_is_said():
    x_BND, w_FD = jnp.zeros((1, 8, 1)), jnp.zeros((17, 1), jnp.complex64)
    with pytest.warns(NotServed, match="'right_angle' is used in place of 'butterfly': it is a"):
        spectral_filter(x_BND, w_FD, 32, "butterfly")
    with pytest.raises(ValueError, match="powers of two from 32, and 24 is none"):
        spectral_filter(x_BND, w_FD[:13], 24, "butterfly_interpreted")
    assert butterfly.unserved(8, 32, jnp.float32)
