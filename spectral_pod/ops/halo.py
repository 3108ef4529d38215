"""Halo exchange: positions from the neighbouring devices where positions are split."""

import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import SEQUENCE, num_shards


def previous(x_BND: jax.Array, count: int) -> jax.Array:
    """The last `count` positions of the previous device, zeros on the first; for `shard_op`.

    A device that has all positions may have fewer than `count`.

    Args:
      x_BND: this device's shard, of any dtype and any number of trailing axes.
      count: number of positions, >= 0.

    Raises:
      ValueError: one of several devices has fewer than `count` positions.
    """
    shards = num_shards("position")
    if shards == 1:
        return jnp.zeros((x_BND.shape[0], count, *x_BND.shape[2:]), x_BND.dtype)
    if count > x_BND.shape[1]:
        raise ValueError(f"{x_BND.shape[1]} positions of a device cannot give {count} to the next")
    last = x_BND[:, x_BND.shape[1] - count :]
    return jax.lax.ppermute(last, SEQUENCE, [(i, i + 1) for i in range(shards - 1)])


def following(x_BND: jax.Array, count: int) -> jax.Array:
    """The first `count` positions of the next device, zeros on the last; for use in `shard_op`.

    A device that has all positions may have fewer than `count`.

    Args:
      x_BND: this device's shard, of any dtype and any number of trailing axes.
      count: number of positions, >= 0.

    Raises:
      ValueError: one of several devices has fewer than `count` positions.
    """
    shards = num_shards("position")
    if shards == 1:
        return jnp.zeros((x_BND.shape[0], count, *x_BND.shape[2:]), x_BND.dtype)
    if count > x_BND.shape[1]:
        raise ValueError(f"{x_BND.shape[1]} positions of a device cannot give {count} to another")
    first = x_BND[:, :count]
    return jax.lax.ppermute(first, SEQUENCE, [(i + 1, i) for i in range(shards - 1)])
