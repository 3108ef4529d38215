"""Softmax attention without an array of all pairs of positions, by blocks of queries and of keys.

For every block of queries and block of keys that one of them may see, the scores are computed,
used and dropped. A softmax over the keys seen so far is kept as its maximum, its sum and the
weighted sum of values, which are rescaled when the maximum grows (Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax"). The gradient computes the scores again, with the
logarithm of the whole sum (Dao et al. 2022, "FlashAttention"). So memory grows with N, forward and
backward. Keys that a query does not see have weight and gradient exactly 0, and a query without any
key has the result 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import vary_like

_Pairs = tuple[tuple[int, int], ...]  # of blocks of queries and of keys, by their indices

BLOCK = 256  # positions, at most: the scores of a block stay in a cache
_LOWEST = -1e30  # a finite maximum of no scores


def attention(
    q_BNHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_BS: jax.Array,
    *,
    causal: bool,
    t_N: jax.Array | None = None,
) -> jax.Array:
    """Attention over the valid keys; if `causal`, not past the query's own position.

    Args:
      q_BNHK, k_BSHK, v_BSHK: arrays of one dtype. Scores and sums are float32, and weights are
        rounded to that dtype before they multiply values.
      mask_BS: whether a key is valid.
      t_N: int32, the positions of the queries among the keys; those of the first keys if None.

    Returns:
      o_BNHK in the dtype of the inputs.
    """
    length, keys = q_BNHK.shape[1], k_BSHK.shape[1]
    if not length or not keys:
        return jnp.zeros_like(q_BNHK)
    num_q, num_k = -(-length // BLOCK), -(-keys // BLOCK)
    size_q, size_k = -(-length // num_q), -(-keys // num_k)
    skip = causal and t_N is None
    pairs = tuple(
        (i, j) for i in range(num_q) for j in range(num_k)
        if not skip or j * size_k < (i + 1) * size_q
    )  # fmt: skip
    t_N = jnp.arange(length) if t_N is None else t_N
    last_N = t_N if causal else jnp.full_like(t_N, keys - 1)
    last_IT = jnp.pad(last_N, (0, num_q * size_q - length)).reshape(num_q, size_q)
    q = _blocks(q_BNHK, num_q)
    k, v = (_blocks(x, num_k) for x in (k_BSHK, v_BSHK))
    mask_JBS = _blocks(mask_BS[..., None, None], num_k)[:, :, 0, :, 0]
    o = _attention(pairs, q, k, v, mask_JBS, last_IT)
    return jnp.moveaxis(o, (0, 3), (1, 2)).reshape(len(q_BNHK), -1, *q_BNHK.shape[2:])[:, :length]


def _blocks(x: jax.Array, count: int) -> jax.Array:
    """[B, N, H, K] to `count` blocks [count, B, H, T, K], padded with zeros."""
    size = -(-x.shape[1] // count)
    x = jnp.pad(x, ((0, 0), (0, size * count - x.shape[1]), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), (1, 2), (0, 3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(pairs: _Pairs, *arrays: jax.Array) -> jax.Array:
    return _forward(pairs, *arrays)[0]


def _forward(pairs: _Pairs, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # The mask does not depend on parameters. In a scan over layers JAX would compute it for all
    # pairs of blocks beforehand, an array of all pairs of positions, if it did not seem to.
    arrays = tuple(jax.lax.optimization_barrier(arrays))
    q, _, v, _, _ = arrays

    def step(sums: Any, pair: jax.Array) -> tuple[Any, None]:
        i, j = pair
        top, total, acc = (x[i] for x in sums)
        scores = _scores(i, j, *arrays)
        new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights, scale = jnp.exp(scores - new), jnp.exp(top - new)
        total = total * scale + jnp.sum(weights, axis=-1, keepdims=True)
        acc = acc * scale + _product("bhts,bhsk->bhtk", weights.astype(v.dtype), v[j])
        return tuple(x.at[i].set(y) for x, y in zip(sums, (new, total, acc))), None

    zero = vary_like(jnp.zeros(q.shape, jnp.float32), q)
    sums = zero[..., :1] + _LOWEST, zero[..., :1], zero
    (top, total, acc), _ = jax.lax.scan(step, sums, jnp.asarray(pairs, jnp.int32))
    total = jnp.where(total > 0, total, 1.0)
    o = (acc / total).astype(q.dtype)
    return o, (*arrays, o, top + jnp.log(total))


def _backward(
    pairs: _Pairs,
    residuals: tuple[jax.Array, ...],
    do: jax.Array,
) -> tuple[jax.Array | None, ...]:
    *arrays, o, log_sum, do = jax.lax.optimization_barrier((*residuals, do))  # as in _forward
    q, k, v, _, _ = arrays
    mean = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1, keepdims=True)

    def step(sums: Any, pair: jax.Array) -> tuple[Any, None]:
        i, j = pair
        dq, dk, dv = sums
        weights = jnp.exp(_scores(i, j, *arrays) - log_sum[i])
        dweights = _product("bhtk,bhsk->bhts", do[i], v[j])
        dscores = (weights * (dweights - mean[i]) * q.shape[-1] ** -0.5).astype(q.dtype)
        dq = dq.at[i].add(_product("bhts,bhsk->bhtk", dscores, k[j]))
        dk = dk.at[j].add(_product("bhts,bhtk->bhsk", dscores, q[i]))
        dv = dv.at[j].add(_product("bhts,bhtk->bhsk", weights.astype(v.dtype), do[i]))
        return (dq, dk, dv), None

    zeros = tuple(vary_like(jnp.zeros(x.shape, jnp.float32), q) for x in (q, k, v))
    sums, _ = jax.lax.scan(step, zeros, jnp.asarray(pairs, jnp.int32))
    return (*(x.astype(q.dtype) for x in sums), None, None)


_attention.defvjp(_forward, _backward)


def _scores(
    i: jax.Array, j: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, mask_JBS: jax.Array,
    last_IT: jax.Array,
) -> jax.Array:  # fmt: skip
    """float32 [B, H, T, S] of a block of queries and a block of keys; -inf for unseen keys.

    `last_IT` are the last positions of keys that the queries may see.
    """
    del v
    position_S = j * k.shape[3] + jnp.arange(k.shape[3])
    near_TS = position_S[None] <= last_IT[i][:, None]
    seen = mask_JBS[j][:, None, None] & near_TS[None, None]
    scores = _product("bhtk,bhsk->bhts", q[i], k[j]) * q.shape[-1] ** -0.5
    return jnp.where(seen, scores, -jnp.inf)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision="highest", preferred_element_type=jnp.float32)
