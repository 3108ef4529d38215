"""Softmax attention on TPUs by the flash kernel that is shipped with JAX.

Valid and invalid positions are two segments, and a query attends to keys of its own segment only.
So every query has a key, any mask is served, and what is computed at invalid positions is finite.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as shipped
from jax.typing import DTypeLike

from spectral_pod.parallel.sharding import platform

_LANES = 128
_BLOCK = 512  # positions, at most; the kernel's own default, 128, leaves the matrix unit waiting


def unserved(head_dim: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot compute these sizes on the current mesh; None if it can."""
    if platform() != "tpu":
        return f"it is a kernel for TPUs, and this is a {platform()}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it multiplies in bfloat16, and not in {jnp.dtype(dtype).name}"
    if head_dim > _LANES and head_dim % _LANES:
        return f"heads have at most {_LANES} channels or a multiple of it, and not {head_dim}"
    return None


def attention(
    q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, mask_BN: jax.Array, *, causal: bool
) -> jax.Array:
    """As `ops.attention.attention`, of a device's own sequences and heads."""
    length = q_BNHK.shape[1]
    count = -(-length // _BLOCK)
    block = -(-length // (count * _LANES)) * _LANES
    rest = count * block - length
    q, k, v = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))), 1, 2)
        for x in (q_BNHK, k_BNHK, v_BNHK)
    )
    segment_BN = jnp.pad(mask_BN, ((0, 0), (0, rest))).astype(jnp.int32)
    sizes = shipped.BlockSizes(
        block, block, block, 1,
        block_q_major_dkv=block, block_k_major_dkv=block, block_k_dkv=block, block_q_dkv=block,
        block_k_major_dq=block, block_k_dq=block, block_q_dq=block,
    )  # fmt: skip
    o = shipped.flash_attention(
        q, k, v, segment_ids=shipped.SegmentIds(segment_BN, segment_BN), causal=causal,
        sm_scale=q_BNHK.shape[-1] ** -0.5, block_sizes=sizes,
    )  # fmt: skip
    return jnp.swapaxes(o, 1, 2)[:, :length]
