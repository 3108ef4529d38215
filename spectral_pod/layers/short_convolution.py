"""Depthwise causal convolutions over a few positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.parameter import parameter
from spectral_pod.ops.short_conv import short_conv
from spectral_pod.parallel.sharding import Axes


class ShortConvolution(nn.Module):
    """`sum_i k_i x_{t - i}` for i < taps, per channel. Inputs must be zero at invalid positions.

    The decode state is the last `taps - 1` inputs, [B, taps - 1, ...].

    Attributes:
      features: sizes of the axes of x after [B, N].
      taps: the number of taps of each filter, at least 2.
      axes: logical axes of the features.
    """

    features: tuple[int, ...]
    taps: int
    axes: Axes
    dtype: Any

    def setup(self) -> None:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=())
        boxed = parameter(init, "tap", *self.axes, group="undecayed")
        kernel = self.param("short_filter", boxed, (self.taps, *self.features))
        self.kernel = kernel.astype(self.dtype)

    def __call__(self, x: jax.Array, index: int | None = None) -> jax.Array:
        """[B, N, ...] to the same in `dtype`.

        With an index, of the filters with that index of the first axis of the features alone.
        """
        if index is None:
            return short_conv(x, self.kernel, self.axes)
        return short_conv(x, self.kernel[:, index], self.axes[1:])

    def extend(self, x: jax.Array, recent: jax.Array | None, index: int | None = None) -> jax.Array:
        """As a call, where x follows other positions: `recent` is the state after these."""
        if recent is None:
            return self(x, index)
        if index is not None:
            recent = recent[:, :, index]
        longer = jnp.concatenate([recent, x.astype(self.dtype)], axis=1)
        return self(longer, index)[:, recent.shape[1] :]

    def init_state(self, batch: int) -> jax.Array:
        return jnp.zeros((batch, self.taps - 1, *self.features), self.dtype)

    def recent(self, x: jax.Array, before: jax.Array | None = None) -> jax.Array:
        """The state after x, which follows the positions with the state `before`, if any."""
        before = self.init_state(len(x)) if before is None else before
        return jnp.concatenate([before, x.astype(self.dtype)], 1)[:, x.shape[1] :]

    def advance(self, x: jax.Array, recent: jax.Array) -> tuple[jax.Array, jax.Array]:
        recent = jnp.concatenate([recent, x], axis=1)
        y = jnp.einsum("bt...,t...->b...", recent, self.kernel[::-1])
        return y[:, None], recent[:, 1:]
