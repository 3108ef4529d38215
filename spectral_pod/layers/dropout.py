"""Dropout whose random bits every device makes for its own part of an array.

`flax.linen.Dropout` leaves their layout to XLA, which on some meshes exchanges a part of them that
grows with the batch. The bits are the same, those of `jax.random.bernoulli`, on every mesh.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from spectral_pod.parallel.sharding import Axes, num_shards, shard_index, shard_op


class Dropout(nn.Module):
    """Sets elements to zero with the probability `rate`, and divides the others by `1 - rate`.

    Attributes:
      axes: the logical axes of the inputs.
    """

    rate: float
    deterministic: bool
    axes: Axes = ("batch", "position", "width")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rate == 0 or self.deterministic:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        kept = bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape, self.axes)
        return jnp.where(kept, x / (1.0 - self.rate), jnp.zeros_like(x))


def bernoulli(key: jax.Array, p: float, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """`jax.random.bernoulli(key, p, shape)` for a threefry key, made where its shards are."""
    shards = [1 if axis is None else num_shards(axis) for axis in axes]
    local = tuple(size // n for size, n in zip(shape, shards))

    def own(words_2: jax.Array) -> jax.Array:
        starts = [jnp.uint32(size) * shard_index(axis) for size, axis in zip(local, axes)]
        keys = (jnp.broadcast_to(word, local) for word in words_2)
        bits_1, bits_2 = threefry2x32_p.bind(*keys, *flat_indices(shape, starts, local))
        # As `jax.random.uniform` makes numbers in [0, 1) of 23 bits.
        uniform = ((bits_1 ^ bits_2) >> jnp.uint32(9)).astype(jnp.float32) * jnp.float32(2**-23)
        return uniform < jnp.float32(p)

    return shard_op(own, [(None,)], axes)(jax.random.key_data(key))


def flat_indices(
    shape: Sequence[int], starts: Sequence[jax.Array], local: tuple[int, ...]
) -> list[jax.Array]:
    """The indices in a flattened array of a part of it, of the shape `local` from `starts` on.

    They are what threefry counts. Returns their higher and their lower 32 bits, uint32 each.
    """
    high = low = jnp.zeros((1,) * len(shape), jnp.uint32)
    for i, (start, size) in enumerate(zip(starts, local)):
        along = [1] * i + [size] + [1] * (len(shape) - 1 - i)
        index = (start + jax.lax.iota(jnp.uint32, size)).reshape(along)
        more_high, more_low = _product(index, math.prod(shape[i + 1 :]))
        before, low = low, low + more_low
        high = high + more_high + (low < before).astype(jnp.uint32)  # which has a carry
    return jnp.broadcast_arrays(high, low)


def _product(index: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    """The higher and lower 32 bits of uint32 numbers times a number of up to 64 bits."""
    high, low = (jnp.uint32(x) for x in divmod(stride, 1 << 32))
    half = jnp.uint32(0xFFFF)
    a, b, c, d = index & half, index >> 16, low & half, low >> 16
    middle = (a * c >> 16) + (a * d & half) + (b * c & half)
    higher = b * d + (a * d >> 16) + (b * c >> 16) + (middle >> 16) + index * high
    return higher, (a * c & half) | (middle << 16)
