"""Every method of causal convolution against numpy's direct convolution in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops import reference
from spectral_pod.ops.long_conv import METHODS, block_length, causal_conv

SIZES = [(1, 1), (7, 7), (333, 1000), (509, 509), (1000, 30), (1000, 300)]


def inputs(length, num_taps, seed=0, width=3, batch=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, width, length)), rng.normal(size=(width, num_taps))


def direct(u_BDN, h_DT):
    """The causal convolution in float64, term by term."""
    u_BND, length = np.swapaxes(u_BDN, 1, 2), u_BDN.shape[2]
    h_ND = np.zeros((length, len(h_DT)))
    h_ND[: h_DT.shape[1]] = h_DT.T[:length]
    return np.swapaxes(reference.causal_convolution(u_BND, h_ND), 1, 2)


def relative_error(got, want):
    return np.abs(np.asarray(got).astype(np.float64) - want).max() / np.abs(want).max()


@pytest.mark.parametrize(("length", "num_taps"), SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_direct_convolution_and_its_gradients(length, num_taps, method):
    """The convolution is bilinear: its gradients are correlations, here of mirrored sequences."""
    u, h = inputs(length, num_taps)
    dy = np.random.default_rng(1).normal(size=u.shape)

    @jax.jit
    def run(u, h, dy):
        y, pullback = jax.vjp(functools.partial(causal_conv, method=method), u, h)
        return y, *pullback(dy)

    want_y, want_u = direct(u, h), direct(dy[..., ::-1], h)[..., ::-1]
    want_h = np.zeros_like(h)
    for b in range(len(u)):
        lags = min(length, num_taps)
        want_h[:, :lags] += [
            [dy[b, d, t:] @ u[b, d, : length - t] for t in range(lags)] for d in range(len(h))
        ]
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        y, du, dh = run(u.astype(dtype), np.float32(h), dy.astype(dtype))
        assert (y.dtype, du.dtype, dh.dtype) == (dtype, dtype, jnp.float32)
        assert relative_error(y, want_y) <= tolerance
        assert relative_error(du, want_u) <= tolerance
        assert relative_error(dh, want_h) <= tolerance


@pytest.mark.parametrize(("length", "num_taps"), [(131_072, 131_072), (131_071, 50_000)])
@pytest.mark.parametrize("method", METHODS)
def test_long_sequences(length, num_taps, method):
    u, h = inputs(length, num_taps, batch=1, width=1)
    padded = 2 ** (length + num_taps).bit_length()
    want = np.fft.irfft(np.fft.rfft(u, padded) * np.fft.rfft(h, padded), padded)[..., :length]
    got = jax.jit(causal_conv, static_argnums=2)(np.float32(u), np.float32(h), method)
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_nothing_comes_from_the_future(method):
    """Future inputs leak only by rounding in the transform, far below the effect of the past."""
    u, h = (np.float32(x) for x in inputs(331, 100))

    def output(x_N, h_1T):
        return causal_conv(x_N[None, None], h_1T, method)[0, 0]

    jacobian = jax.jit(jax.jacrev(output))(u[0, 0], h[:1])
    future = np.triu(np.abs(jacobian), 1)
    assert future.max() <= 1e-6 * np.abs(jacobian).max()


def test_short_filters_cost_short_transforms():
    assert block_length(100_000, 3) == 256
    assert block_length(100_000, 1000) == 1000
    assert block_length(1500, 1000) == 1500
    assert block_length(1013, 1013) == 1024  # a prime


def test_the_backward_pass_keeps_only_its_inputs():
    u, h = inputs(1000, 1000)
    for method in ("right_angle", "matmul"):
        run = functools.partial(causal_conv, method=method)
        _, pullback = jax.jit(functools.partial(jax.vjp, run))(np.float32(u), np.float32(h))
        kept = sum(x.nbytes for x in jax.tree.leaves(pullback) if isinstance(x, jax.Array))
        assert kept <= u.size * 4 + 3 * h.size * 8 + 2**12, method
