"""Softmax attention on GPUs by cuDNN's flash kernel, through JAX.

It takes the number of valid positions of a sequence, which come first, as they do in all batches of
training and evaluation. Any other mask, such as that of left-padded prompts, goes to the blocked
form: each device decides, at run time.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spectral_pod.ops import blocked_attention
from spectral_pod.parallel.sharding import platform

_MAX_HEAD_DIM = 128  # on every generation; on Hopper and later it would be 256


def unserved(head_dim: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot compute these sizes on the current mesh; None if it can."""
    if platform() != "gpu":
        return f"it is a kernel for GPUs, and this is a {platform()}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's kernel is for bfloat16 and float16, and not for {jnp.dtype(dtype).name}"
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        return f"heads have up to {_MAX_HEAD_DIM} channels, a multiple of 8, and not {head_dim}"
    return None


def attention(
    q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, mask_BN: jax.Array, *, causal: bool
) -> jax.Array:
    """As `ops.attention.attention`, of a device's own sequences and heads; 0 where invalid."""
    count_B = jnp.sum(mask_BN, axis=1, dtype=jnp.int32)
    first = jnp.all(mask_BN == (jnp.arange(mask_BN.shape[1])[None] < count_B[:, None]))

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        lengths_B = jnp.maximum(count_B, 1)  # a softmax over no key would be 0 / 0
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, query_seq_lengths=lengths_B, key_value_seq_lengths=lengths_B,
            implementation="cudnn",
        )  # fmt: skip

    def blocked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return blocked_attention.attention(q, k, v, mask_BN, causal=causal)

    o_BNHK = jax.lax.cond(first, fused, blocked, q_BNHK, k_BNHK, v_BNHK)
    return jnp.where(mask_BN[..., None, None], o_BNHK, jnp.zeros((), o_BNHK.dtype))
