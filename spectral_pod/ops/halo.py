"""What a device needs of its neighbours where positions are split."""

import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import SEQUENCE, num_shards


def previous(x_BND: jax.Array, count: int) -> jax.Array:
    """Inside `shard_op`: the last `count` positions of the device before, zero at the beginning.

    Raises:
      ValueError: a device has fewer than `count` positions.
    """
    if count > x_BND.shape[1]:
        raise ValueError(f"{x_BND.shape[1]} positions of a device cannot give {count} to the next")
    last = x_BND[:, x_BND.shape[1] - count :]
    shards = num_shards("position")
    if shards == 1:
        return jnp.zeros_like(last)
    return jax.lax.ppermute(last, SEQUENCE, [(i, i + 1) for i in range(shards - 1)])


def following(x_BND: jax.Array, count: int) -> jax.Array:
    """Inside `shard_op`: the first `count` positions of the device after, zero at the end.

    Raises:
      ValueError: a device has fewer than `count` positions.
    """
    if count > x_BND.shape[1]:
        raise ValueError(f"{x_BND.shape[1]} positions of a device cannot give {count} to another")
    first = x_BND[:, :count]
    shards = num_shards("position")
    if shards == 1:
        return jnp.zeros_like(first)
    return jax.lax.ppermute(first, SEQUENCE, [(i + 1, i) for i in range(shards - 1)])
