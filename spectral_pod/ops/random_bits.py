"""Random bits that every device makes for its own part of an array, with no pass over memory.

The bits are those of `jax.random`, on every mesh and platform. JAX's own primitive for them is
lowered to a loop over whole arrays on CPUs and to a kernel of its own on GPUs, and XLA keeps the
counters of all calls of a step in memory beside each other. Written as plain operations, they are
fused with what reads them (`python -m tools.bench ops --filter=dropout`).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.parallel.sharding import Axes, num_shards, shard_index, shard_op

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)  # of even and of odd groups of four rounds
_PARITY = 0x1BD11BDA


def bernoulli(key: jax.Array, p: float, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """`jax.random.bernoulli(key, p, shape)` for a threefry key, made where its shards are.

    Args:
      key: a typed key.
      p: the probability of True.
      shape: of all devices.
      axes: the logical axes of the result.
    """
    shards = [1 if axis is None else num_shards(axis) for axis in axes]
    local = tuple(size // n for size, n in zip(shape, shards))
    # `jax.random.uniform` has 23 bits: k 2**-23 < p where k is below this.
    below = math.ceil(float(np.float32(p)) * 2**23)

    def own(words_2: jax.Array) -> jax.Array:
        starts = [jnp.uint32(size) * shard_index(axis) for size, axis in zip(local, axes)]
        bits_1, bits_2 = threefry(words_2[0], words_2[1], *flat_indices(shape, starts, local))
        return (bits_1 ^ bits_2) >> jnp.uint32(9) < jnp.uint32(below)

    return shard_op(own, [(None,)], axes)(jax.random.key_data(key))


def threefry(
    key_1: jax.Array, key_2: jax.Array, high: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of 20 rounds (Salmon et al. 2011): two words of 32 random bits a counter.

    Args:
      key_1, key_2: uint32, the two words of a key.
      high, low: uint32 arrays of one shape, the two words of the counters.
    """
    keys = key_1, key_2, key_1 ^ key_2 ^ jnp.uint32(_PARITY)
    a, b = high + key_1, low + key_2
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            a = a + b
            b = a ^ (b << jnp.uint32(rotation) | b >> jnp.uint32(32 - rotation))
        a = a + keys[(group + 1) % 3]
        b = b + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return a, b


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
