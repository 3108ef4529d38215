"""Causal convolution over a few positions, depthwise: y_n = sum_{t < T} h_t x_{n-t} per channel."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spectral_pod.ops.choice import Choice
from spectral_pod.ops.halo import previous
from spectral_pod.ops.kernels import short_conv as kernel
from spectral_pod.parallel.sharding import Axes, num_shards, shard_op, vary_like


def choose(length: int, channels: int, num_taps: int, dtype: DTypeLike) -> Choice:
    """The kernel on TPUs, for sizes that it serves; N and D are those of all devices."""
    channels //= num_shards("channel")
    length //= num_shards("position")
    if reason := kernel.unserved(length, channels, num_taps, dtype):
        return Choice("shifts", f"not 'kernel': {reason}")
    return Choice("kernel", "it reads and writes memory once")


def short_conv(x: jax.Array, h: jax.Array, axes: Axes, method: str = "auto") -> jax.Array:
    """The convolution along positions, which may be split over devices.

    Args:
      x: [B, N, ...], zero at invalid positions.
      h: [T, ...] taps with the trailing axes of x and its dtype; T >= 2.
      axes: logical axes of the trailing axes.
      method: "shifts" is a sum of shifted sequences; "kernel" is for TPUs and one trailing axis,
        sums in float32, and "kernel_interpreted" runs it on any platform; "auto" is `choose`.

    Returns:
      An array like x.
    """
    num_taps = len(h)
    if method == "auto":
        sizes = x.shape[1], x.shape[-1], num_taps, x.dtype
        method = choose(*sizes).method if x.ndim == 3 else "shifts"

    def op(x: jax.Array, h: jax.Array) -> jax.Array:
        before = previous(x, num_taps - 1)
        if method != "shifts":
            h, interpret = vary_like(h, x), method == "kernel_interpreted"
            return kernel.short_conv(vary_like(before, x), x, h, interpret=interpret)
        # A sum of shifts, since XLA would gather the channels for a grouped convolution.
        length, x = x.shape[1], jnp.concatenate([before, x], axis=1)
        shifted = [x[:, num_taps - 1 - t : num_taps - 1 - t + length] for t in range(num_taps)]
        return sum(y * h_t[None, None] for y, h_t in zip(shifted, h))  # type: ignore[return-value]

    activation = ("batch", "position", *axes)
    return shard_op(op, (activation, (None, *axes)), activation)(x, h)
