"""The kernels of causal convolution, interpreted, against numpy's direct convolution in float64."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops.kernels import NotServed, toeplitz, toeplitz_gpu
from spectral_pod.ops.kernels.cost import kernels
from spectral_pod.ops.long_conv import causal_conv, choose

# Length, taps, channels, sequences: one block and several, taps within one block, at its end and
# beyond the sequence, several groups of channels and of sequences. A multiple of 128 channels is
# read as [B, N, D].
QUICK = [(300, 300, 3, 2), (130, 20, 128, 1)]
SLOW = [
    (1, 1, 1, 1), (7, 3, 2, 1), (128, 128, 1, 2), (257, 128, 2, 2), (257, 129, 2, 2),
    (384, 130, 9, 9), (500, 1000, 2, 17), (1024, 1024, 1, 1), (257, 257, 256, 9),
]  # fmt: skip
# Of the largest value. The two terms of a float32 have 17 bits together. In bfloat16 inputs and
# results are rounded, and nothing else is.
TOLERANCE = {"float32": (2e-5, 2e-5, 2e-5), "bfloat16": (4e-3, 4e-3, 1e-6)}

run = functools.partial(causal_conv, method="toeplitz_interpreted")
RUNS = {"tpu": run, "gpu": functools.partial(toeplitz_gpu.causal_conv, interpret=True)}


def drawn(length, num_taps, width, batch, dtype):
    """Inputs that are exact in the dtype, as float64."""
    rng = np.random.default_rng(length)
    u, dy = (
        np.asarray(jnp.asarray(x, dtype), np.float64)
        for x in rng.normal(size=(2, batch, width, length))
    )
    return u, np.float64(np.float32(rng.normal(size=(width, num_taps)))), dy


def direct(u_BDN, h_DT):
    length = u_BDN.shape[2]
    h_DT = h_DT[:, :length]
    terms = (
        h_DT[:, t, None] * np.roll(u_BDN, t, 2) * (np.arange(length) >= t)
        for t in range(h_DT.shape[1])
    )
    return sum(terms)


@pytest.mark.parametrize("kernel", RUNS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "sizes", [*QUICK, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in SLOW)]
)
def test_equals_direct_convolution_and_its_gradients(sizes, dtype, kernel):
    u, h, dy = drawn(*sizes, dtype)
    length, num_taps, *_ = sizes
    want_h = np.zeros_like(h)
    for t in range(min(length, num_taps)):
        want_h[:, t] = (dy[..., t:] * u[..., : length - t]).sum((0, 2))
    want = direct(u, h), direct(dy[..., ::-1], h)[..., ::-1], want_h

    @jax.jit
    def run_all(u, h, dy):
        y, pullback = jax.vjp(RUNS[kernel], u, h)
        return y, *pullback(dy)

    got = run_all(jnp.asarray(u, dtype), jnp.float32(h), jnp.asarray(dy, dtype))
    assert [x.dtype.name for x in got] == [dtype, dtype, "float32"]
    for x, exact, tolerance in zip(got, want, TOLERANCE[dtype], strict=True):
        assert np.abs(np.asarray(x, np.float64) - exact).max() <= tolerance * np.abs(exact).max()


@pytest.mark.parametrize("kernel", RUNS)
def test_nothing_comes_from_the_future(kernel):
    """Not even by rounding: the past of a changed future is the same to the bit, and gradients of
    the past by the future are zero."""
    u, h, dy = drawn(300, 300, 1, 2, "float32")
    other = np.concatenate([u[..., :150], u[..., 150:] + 1], axis=2)
    only_past = np.where(np.arange(300) < 150, dy, 0.0)

    @jax.jit
    def run_all(u, dy):
        y, pullback = jax.vjp(lambda u: RUNS[kernel](u, jnp.float32(h)), u)
        return y, *pullback(dy)

    y, du = run_all(jnp.float32(u), jnp.float32(only_past))
    changed, _ = run_all(jnp.float32(other), jnp.float32(only_past))
    np.testing.assert_array_equal(y[..., :150], changed[..., :150])
    assert (y[..., 150:] != changed[..., 150:]).any()
    np.testing.assert_array_equal(du[..., 150:], 0.0)
    assert du[..., :150].all()


def test_the_cost_is_that_of_its_products_and_of_reading_and_writing_once():
    """Counted from the kernel's program: two terms of taps, and lag blocks j = 0, ..., 3."""
    u_BDN, h_DT = jnp.zeros((16, 24, 512), jnp.bfloat16), jnp.zeros((24, 512), jnp.float32)
    (kernel,) = kernels(jax.make_jaxpr(run)(u_BDN, h_DT).jaxpr)
    cost = kernel.params["cost_estimate"]
    rows = sum(8 * (4 - j) for j in range(4))
    assert cost.flops == 24 * (16 // 8) * 2 * 2 * rows * 128 * 128
    assert cost.bytes_accessed == 2 * u_BDN.nbytes + h_DT.nbytes


def test_gpus_use_it_up_to_a_length():
    with mock.patch.object(toeplitz_gpu, "platform", return_value="gpu"):
        assert choose("gpu", 4096, 4096, jnp.bfloat16).method == "toeplitz"
        assert choose("gpu", 4097, 100, jnp.bfloat16).method == "real"


def test_what_it_does_not_serve_is_said():
    u_BDN, h_DT = jnp.zeros((1, 1, 8)), jnp.zeros((1, 8))
    with pytest.raises(ValueError, match="it is a kernel for TPUs, and this is a cpu"):
        toeplitz.causal_conv(u_BDN, h_DT)
    with pytest.raises(ValueError, match="it is a kernel for GPUs, and this is a cpu"):
        toeplitz_gpu.causal_conv(u_BDN, h_DT)
    with pytest.warns(NotServed, match="'right_angle' is used in place of 'toeplitz': it is a ker"):
        causal_conv(u_BDN, h_DT, "toeplitz")
    assert toeplitz.unserved(8, 8, jnp.float32)
