"""Diagonal linear recurrences with constant coefficients, computed in parallel over positions."""

import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import SEQUENCE, num_shards, shard_op


def diagonal_scan(log_a_K: jax.Array, b_BNK: jax.Array, *, reverse: bool = False) -> jax.Array:
    """`x_n = a x_{n-1} + b_n` from a zero state, a = exp(log_a); with x_{n+1} if `reverse`.

    An associative scan of the maps x -> a x + b (Blelloch 1990). Where the mesh splits positions,
    the devices exchange only their final states.

    Args:
      log_a_K: complex64 with real parts <= 0, for K states.
      b_BNK: complex64 inputs.

    Returns:
      x_BNK, complex64.
    """
    split = num_shards("position") > 1

    def op(log_a_K: jax.Array, b_BNK: jax.Array) -> jax.Array:
        length = b_BNK.shape[1]
        a_1NK = jnp.broadcast_to(jnp.exp(log_a_K)[None, None], (1, length, len(log_a_K)))
        _, x_BNK = jax.lax.associative_scan(_compose, (a_1NK, b_BNK), reverse=reverse, axis=1)
        if not split:
            return x_BNK
        steps_N = jnp.arange(1, length + 1).astype(jnp.complex64)
        steps_N = steps_N[::-1] if reverse else steps_N
        decay_NK = jnp.exp(steps_N[:, None] * log_a_K[None])
        first_BK = _before(log_a_K, x_BNK[:, 0 if reverse else -1], length, reverse)
        return x_BNK + decay_NK[None] * first_BK[:, None]

    axes = ("batch", "position" if split else None, "channel")
    return shard_op(op, (("channel",), axes), axes)(log_a_K, b_BNK)


def _compose(
    first: tuple[jax.Array, jax.Array], then: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return then[0] * first[0], then[0] * first[1] + then[1]


def _before(log_a_K: jax.Array, own_BK: jax.Array, length: int, reverse: bool) -> jax.Array:
    """This device's initial state, from the final states of all devices that share the sequence."""
    states_SBK = jax.lax.all_gather(own_BK, SEQUENCE)
    distance_S = jax.lax.axis_index(SEQUENCE) - jnp.arange(len(states_SBK))
    distance_S = -distance_S if reverse else distance_S
    between_S = (length * jnp.maximum(distance_S - 1, 0)).astype(jnp.complex64)
    decay_SK = jnp.exp(between_S[:, None] * log_a_K[None])
    decay_SK = jnp.where(distance_S[:, None] > 0, decay_SK, 0.0)
    return jnp.sum(decay_SK[:, None] * states_SBK, axis=0)
