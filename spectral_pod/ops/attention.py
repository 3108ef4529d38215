"""Softmax attention over all positions, and over a window of them.

Runs on each device's own sequences and heads, with the same numbers where the mesh splits
positions: keys and values are then gathered, or for a window exchanged at the borders. A query that
no valid key is in sight of gets a finite result that means nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spectral_pod.ops.halo import following, previous
from spectral_pod.parallel.sharding import SEQUENCE, num_shards, shard_op

_Op = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def attend(
    q_BNHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """`jax.nn.dot_product_attention`: of one dtype in and out, with the softmax in float32.

    `mask` says which keys a query sees and broadcasts to [B, H, N, S].
    """
    # It promotes dtypes itself, to find that of its logits.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q_BNHK, k_BSHK, v_BSHK, mask=mask)


def attention(
    q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, mask_BN: jax.Array, *, causal: bool
) -> jax.Array:
    """`softmax(q k^T / sqrt(K)) v` over the valid positions, if `causal` those up to the query's.

    Args:
      q_BNHK, k_BNHK, v_BNHK: of one dtype; the softmax is in float32.
      mask_BN: whether a position is valid, as a key and a value.
      causal: whether a query sees nothing later.

    Returns:
      o_BNHK in the dtype of the inputs.
    """
    shards = num_shards("position")

    def op(q: jax.Array, k: jax.Array, v: jax.Array, mask_BN: jax.Array) -> jax.Array:
        t_T = jnp.arange(q.shape[1])
        if shards > 1:
            t_T += jax.lax.axis_index(SEQUENCE) * len(t_T)
            k, v, mask_BN = (
                jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True) for x in (k, v, mask_BN)
            )
        seen = mask_BN[:, None, None]
        if causal:
            seen &= (t_T[:, None] >= jnp.arange(k.shape[1])[None])[None, None]
        return attend(q, k, v, seen)

    return _on_devices(op)(q_BNHK, k_BNHK, v_BNHK, mask_BN)


def local_attention(
    q_BNHK: jax.Array,
    k_BNHK: jax.Array,
    v_BNHK: jax.Array,
    mask_BN: jax.Array,
    *,
    before: int,
    after: int,
) -> jax.Array:
    """`attention` over the positions from `before` before the query's to `after` after it.

    Blocks of queries meet their own block of keys and those beside it: O(N (before + after)).

    Raises:
      ValueError: positions are split and a device has fewer than `before` or `after`.
    """
    shards, block = num_shards("position"), max(before, after, 1)

    def op(q: jax.Array, k: jax.Array, v: jax.Array, mask_BN: jax.Array) -> jax.Array:
        length = q.shape[1]
        rest = -length % block
        q_BGTHK = _blocks(_pad(q, 0, rest), block)

        def beside(x: jax.Array) -> jax.Array:
            """What each block of queries may see: a block before it, its own, one after it."""
            if shards > 1:
                x = jnp.concatenate([previous(x, before), x, following(x, after)], axis=1)
            else:
                x = _pad(x, before, after)
            x = _blocks(_pad(x, block - before, rest + block - after), block)
            count = 3 if after else 2
            stretches = [x[:, i : i + q_BGTHK.shape[1]] for i in range(count)]
            return _merge(jnp.concatenate(stretches, axis=2))

        # A key's place among those of its stretch, from the query's in its block.
        place_S = jnp.arange(block * (3 if after else 2)) - block
        distance_TS = place_S[None] - jnp.arange(block)[:, None]
        near_TS = (distance_TS >= -before) & (distance_TS <= after)
        seen = near_TS[None, None] & beside(mask_BN)[:, None, None]
        o = attend(_merge(q_BGTHK), beside(k), beside(v), seen)
        return o.reshape(len(q), -1, *q.shape[2:])[:, :length]

    return _on_devices(op)(q_BNHK, k_BNHK, v_BNHK, mask_BN)


def _on_devices(op: _Op) -> _Op:
    position = "position" if num_shards("position") > 1 else None
    tokens = ("batch", position, "head", None)
    return shard_op(op, (tokens, tokens, tokens, tokens[:2]), tokens)


def _pad(x: jax.Array, before: int, after: int) -> jax.Array:
    """With zeros along positions."""
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def _blocks(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _merge(x: jax.Array) -> jax.Array:
    """The blocks of all sequences as sequences."""
    return x.reshape(-1, *x.shape[2:])
