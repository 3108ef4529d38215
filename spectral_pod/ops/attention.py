"""Softmax attention, over all positions or over a local window: dispatch.

Each device attends within its own sequences and heads. Where the mesh splits positions, keys and
values are all-gathered, or for a window exchanged with the neighbouring devices, with the same
results. Results at invalid positions, and of queries without a valid key, are finite and mean
nothing.

All methods compute the same function over all positions:

- "plain": `attend`, the definition, which holds the scores of all pairs of positions;
- "blocked": by blocks of queries and keys, with memory that grows with N (`blocked_attention.py`);
- "fused": a kernel, on TPUs JAX's (`kernels/flash.py`), on GPUs cuDNN's (`kernels/flash_gpu.py`).
"""

import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spectral_pod.ops import blocked_attention, kernels
from spectral_pod.ops.choice import Choice, configured
from spectral_pod.ops.halo import following, previous
from spectral_pod.ops.kernels import flash, flash_gpu
from spectral_pod.parallel.sharding import SEQUENCE, num_shards, platform, shard_op

_Op = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

METHODS = ("plain", "blocked")  # on any platform; a kernel is "fused"
KERNELS: dict[str, types.ModuleType] = {"tpu": flash, "gpu": flash_gpu}
_MAX_PLAIN = 128  # positions up to which "plain" is no slower on CPUs (docs/results.md)


def choose(platform: str, length: int, head_dim: int, dtype: DTypeLike) -> Choice:
    """The fastest method: by measurement on CPUs; elsewhere the kernel, if it serves the sizes."""
    if platform == "cpu" and length <= _MAX_PLAIN:
        return Choice("plain", f"up to {_MAX_PLAIN} positions measured fastest on CPUs")
    if platform == "cpu":
        return Choice("blocked", f"above {_MAX_PLAIN} positions measured fastest on CPUs")
    if reason := _unserved(head_dim, dtype):
        return Choice("blocked", f"not 'fused': {reason}")
    return Choice("fused", "the scores never leave the chip")


def resolve(method: str, length: int, head_dim: int, dtype: DTypeLike) -> Choice:
    """The method itself, or that of `choose` on the mesh that is set: for "auto", and, with a
    warning, for a kernel that the mesh, the device or the sizes rule out.

    Args:
      length: of all devices.
    """
    if method not in ("auto", "fused"):
        return configured(method)
    chosen = choose(platform(), length, head_dim, dtype)
    if method == "auto":
        return chosen
    reason = _unserved(head_dim, dtype)
    return kernels.instead_of(method, reason, chosen) if reason else configured(method)


def _unserved(head_dim: int, dtype: DTypeLike) -> str | None:
    if num_shards("position") > 1:
        return "it needs all positions of a sequence, and they are split over devices"
    return kernels.unserved(KERNELS, head_dim, dtype)


def attend(
    q_BNHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """`jax.nn.dot_product_attention` in the dtype of its inputs, with the softmax in float32.

    `mask` is True where a query may attend to a key and broadcasts to [B, H, N, S].
    """
    # JAX's function promotes dtypes internally, to find that of its logits.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q_BNHK, k_BSHK, v_BSHK, mask=mask)


def attention(
    q_BNHK: jax.Array,
    k_BNHK: jax.Array,
    v_BNHK: jax.Array,
    mask_BN: jax.Array,
    *,
    causal: bool,
    method: str = "auto",
) -> jax.Array:
    """`softmax(q k^T / sqrt(K)) v` over the valid positions; if `causal`, not past the query's own.

    Args:
      q_BNHK, k_BNHK, v_BNHK: arrays of one dtype; the softmax is computed in float32.
      mask_BN: whether a position is valid as a key and value.
      causal: whether queries attend to their own and earlier positions only.
      method: one of `METHODS`, "fused", or "auto" to let `choose` decide.

    Returns:
      o_BNHK in the dtype of the inputs.
    """
    split = num_shards("position") > 1
    method = resolve(method, q_BNHK.shape[1], q_BNHK.shape[3], q_BNHK.dtype).method
    if method == "fused":
        compute = functools.partial(KERNELS[platform()].attention, causal=causal)
        return _on_devices(compute, checked=False)(q_BNHK, k_BNHK, v_BNHK, mask_BN)

    def op(q: jax.Array, k: jax.Array, v: jax.Array, mask_BN: jax.Array) -> jax.Array:
        t_T = None
        if split:
            t_T = jax.lax.axis_index(SEQUENCE) * q.shape[1] + jnp.arange(q.shape[1])
            k, v, mask_BN = (
                jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True) for x in (k, v, mask_BN)
            )
        if method == "blocked":
            return blocked_attention.attention(q, k, v, mask_BN, causal=causal, t_N=t_T)
        seen = mask_BN[:, None, None]
        if causal:
            t_T = jnp.arange(q.shape[1]) if t_T is None else t_T
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
    """`attention` over a window, from `before` positions before the query to `after` after it.

    Each block of queries attends to its own and the adjacent blocks of keys: O(N (before + after)).

    Raises:
      ValueError: positions are split over devices and a shard has fewer than `before` or `after`.
    """
    shards, block = num_shards("position"), max(before, after, 1)

    def op(q: jax.Array, k: jax.Array, v: jax.Array, mask_BN: jax.Array) -> jax.Array:
        length = q.shape[1]
        rest = -length % block
        q_BGTHK = _blocks(_pad(q, 0, rest), block)

        def window(x: jax.Array) -> jax.Array:
            """The keys of each block of queries: the block before, its own, the block after."""
            if shards > 1:
                x = jnp.concatenate([previous(x, before), x, following(x, after)], axis=1)
            else:
                x = _pad(x, before, after)
            x = _blocks(_pad(x, block - before, rest + block - after), block)
            count = 3 if after else 2
            blocks = [x[:, i : i + q_BGTHK.shape[1]] for i in range(count)]
            return _merge(jnp.concatenate(blocks, axis=2))

        # The offset of each key of the window from the first query of the block.
        offset_S = jnp.arange(block * (3 if after else 2)) - block
        distance_TS = offset_S[None] - jnp.arange(block)[:, None]
        near_TS = (distance_TS >= -before) & (distance_TS <= after)
        seen = near_TS[None, None] & window(mask_BN)[:, None, None]
        o = attend(_merge(q_BGTHK), window(k), window(v), seen)
        return o.reshape(len(q), -1, *q.shape[2:])[:, :length]

    return _on_devices(op)(q_BNHK, k_BNHK, v_BNHK, mask_BN)


def _on_devices(op: _Op, *, checked: bool = True) -> _Op:
    position = "position" if num_shards("position") > 1 else None
    tokens = ("batch", position, "head", None)
    return shard_op(op, (tokens, tokens, tokens, tokens[:2]), tokens, checked=checked)


def _pad(x: jax.Array, before: int, after: int) -> jax.Array:
    """Pads positions with zeros."""
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def _blocks(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _merge(x: jax.Array) -> jax.Array:
    """Merges the axes of sequences and of blocks."""
    return x.reshape(-1, *x.shape[2:])
