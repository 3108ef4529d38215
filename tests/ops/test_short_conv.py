"""Convolution over a few positions by every method, against its definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops.kernels import short_conv as kernel
from spectral_pod.ops.kernels.cost import kernels
from spectral_pod.ops.short_conv import choose, short_conv

# Positions, channels, sequences, taps: chunks of 16 and of 128 positions, several of them, and the
# most taps.
QUICK = [(48, 128, 2, 3)]
SLOW = [(16, 256, 1, 2), (16, 128, 1, 9), (32, 640, 3, 4), (256, 128, 2, 3)]
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}  # of the largest value


def drawn(length, width, batch, num_taps, dtype):
    """What is before x, x, the taps and a cotangent, all exact in the dtype, as float64."""
    rng = np.random.default_rng(length)
    shapes = (batch, num_taps - 1, width), (batch, length, width), (num_taps, width)
    exact = [jnp.asarray(rng.normal(size=s), dtype) for s in (*shapes, shapes[1])]
    return [np.asarray(x, np.float64) for x in exact]


def direct(before, x, h):
    num_taps, padded = len(h), np.concatenate([before, x], 1)
    starts = [num_taps - 1 - t for t in range(num_taps)]
    return sum(padded[:, s : s + x.shape[1]] * h[t] for t, s in enumerate(starts))


def gradients(before, x, h, dy):
    num_taps, padded = len(h), np.concatenate([before, x], 1)
    dpadded, dh = np.zeros_like(padded), np.zeros_like(h)
    for t in range(num_taps):
        at = slice(num_taps - 1 - t, num_taps - 1 - t + x.shape[1])
        dpadded[:, at] += dy * h[t]
        dh[t] = (dy * padded[:, at]).sum((0, 1))
    return dpadded[:, : num_taps - 1], dpadded[:, num_taps - 1 :], dh


def assert_close(got, want, dtype):
    for x, exact in zip(got, want, strict=True):
        error = np.abs(np.asarray(x, np.float64) - exact).max()
        assert error <= TOLERANCE[dtype] * np.abs(exact).max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "sizes", [*QUICK, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in SLOW)]
)
def test_the_kernel_equals_the_definition_and_its_gradients(sizes, dtype):
    before, x, h, dy = drawn(*sizes, dtype)

    @jax.jit
    def run(before, x, h, dy):
        y, pullback = jax.vjp(functools.partial(kernel.short_conv, interpret=True), before, x, h)
        return y, *pullback(dy)

    got = run(*(jnp.asarray(each, dtype) for each in (before, x, h, dy)))
    assert all(each.dtype == dtype for each in got)
    assert_close(got, (direct(before, x, h), *gradients(before, x, h, dy)), dtype)


@pytest.mark.parametrize("method", ["shifts", "kernel_interpreted"])
def test_zeros_are_before_a_sequence_and_the_future_is_not_seen(method):
    before, x, h, _ = drawn(*QUICK[0], "float32")
    run = jax.jit(functools.partial(short_conv, axes=("channel",), method=method))
    y = run(jnp.float32(x), jnp.float32(h))
    assert_close([y], [direct(np.zeros_like(before), x, h)], "float32")
    x[:, 20:] += 1
    changed = run(jnp.float32(x), jnp.float32(h))
    np.testing.assert_array_equal(y[:, :20], changed[:, :20])
    assert (y[:, 20:] != changed[:, 20:]).all()


def test_shifts_serve_any_features_and_a_sequence_shorter_than_the_filter():
    x, h = np.ones((1, 2, 3, 5), np.float32), np.ones((4, 3, 5), np.float32)
    y = short_conv(jnp.asarray(x), jnp.asarray(h), (None, None))
    np.testing.assert_array_equal(y, np.broadcast_to([1, 2], (1, 3, 5, 2)).transpose(0, 3, 1, 2))


def test_the_cost_is_that_of_reading_and_writing_once():
    x = jnp.zeros((3, 32, 256), jnp.bfloat16)
    before, h = jnp.zeros((3, 2, 256), jnp.bfloat16), jnp.zeros((3, 256), jnp.bfloat16)
    run = functools.partial(kernel.short_conv, interpret=True)
    (found,) = kernels(jax.make_jaxpr(run)(before, x, h).jaxpr)
    cost = found.params["cost_estimate"]
    assert cost.bytes_accessed == 2 * x.nbytes + 4 * (3 * 8 * 256 + h.size)


def test_what_the_kernel_does_not_serve_is_said():
    assert "this is a cpu" in kernel.unserved(32, 128, 3, jnp.bfloat16)
    assert choose(32, 128, 3, jnp.bfloat16).method == "shifts"
