"""Depthwise causal convolutions over a few positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.ops.halo import previous
from spectral_pod.parallel.sharding import Axes, partitioned, shard_op


class ShortConvolution(nn.Module):
    """`sum_i k_i x_{t - i}` for i < taps, per channel.

    Attributes:
      taps: of every filter, at least 2.
      axes: logical axes of x after [B, N].
    """

    taps: int
    axes: Axes
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, position: jax.Array | None = None) -> jax.Array:
        """[B, N, ...] to the same in `dtype`; see `layers/mixers.py` for `position`.

        Invalid positions must be zero already.
        """
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=())
        shape = (self.taps, *x.shape[2:])
        kernel = self.param("short_filter", partitioned(init, "tap", *self.axes), shape)
        kernel = kernel.astype(self.dtype)
        before = self.taps - 1
        if position is not None:
            recent = jnp.concatenate([self.get_variable("cache", "recent"), x], axis=1)
            self.put_variable("cache", "recent", recent[:, 1:])
            return jnp.einsum("bt...,t...->b...", recent, kernel[::-1])[:, None]
        if self.is_mutable_collection("cache"):
            padding = ((0, 0), (before, 0), *((0, 0),) * (x.ndim - 2))
            self.put_variable("cache", "recent", jnp.pad(x[:, -before:], padding)[:, -before:])

        # By shifts: XLA would gather the channels of a grouped convolution.
        def op(x: jax.Array, kernel: jax.Array) -> jax.Array:
            length = x.shape[1]
            x = jnp.concatenate([previous(x, before), x], axis=1)
            shifted = [x[:, before - i : before - i + length] for i in range(self.taps)]
            return sum(y * k[None, None] for y, k in zip(shifted, kernel))  # type: ignore[return-value]

        axes = ("batch", "position", *self.axes)
        return shard_op(op, (axes, (None, *self.axes)), axes)(x, kernel)
