"""The delta rule, an associative memory that corrects what it recalls, with clipped writes.

A head holds a matrix S [V, K]. Every token keeps a part g of it, reads its error, writes, and then
reads its output:

    S <- g S,    e = v - S k,    S <- S + beta min(1, clip / |e||k|) e k^T,    o = S q.

Without gates g is 1; with them this is the gated delta rule (Yang et al. 2024, "Gated Delta
Networks: Improving Mamba2 with Delta Rule"). `delta_recurrence.py` is this definition as a scan,
`delta_chunks.py` the same function by matrix products, and `delta_sequence.py` those on sequences
that are split over devices.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from spectral_pod.ops.delta_chunks import delta_rule_chunked
from spectral_pod.ops.delta_recurrence import Tokens, delta_rule_recurrent
from spectral_pod.ops.delta_sequence import delta_rule_split
from spectral_pod.parallel.sharding import num_shards, shard_op


def delta_rule(
    q_BNHK: jax.Array,
    k_BNHK: jax.Array,
    v_BNHV: jax.Array,
    beta_BNH: jax.Array,
    *,
    log_gate_BNH: jax.Array | None = None,
    state_BHVK: jax.Array | None = None,
    mask_BN: jax.Array | None = None,
    method: Literal["chunked", "recurrent"] = "chunked",
    clip: float | None = 10.0,
) -> tuple[jax.Array, jax.Array]:
    """Writes every token into the memory and reads it back, in float32 whatever the input dtype.

    Runs on each device's own sequences and heads, so that each decides for itself whether a clip
    fired. Do not `vmap` over it: that would turn the branch into running both sides. Where the mesh
    splits positions, "chunked" leaves them split, evenly, and "recurrent" gathers them.

    Args:
      q_BNHK: queries.
      k_BNHK: keys.
      v_BNHV: values.
      beta_BNH: write strengths, >= 0.
      log_gate_BNH: log g, <= 0; nothing is forgotten if None.
      state_BHVK: memory before the first token; zero if None.
      mask_BN: tokens that count; the others leave the memory as it is and read 0. All count if
        None.
      method: "chunked" to train and prefill, "recurrent" for a few tokens at a time.
      clip: largest |e||k| written in full; None writes unclipped. Clips hold up to |e||k| = 1e19.

    Returns:
      The reads o_BNHV in the dtype of v, and the float32 state_BHVK after the last token.
    """
    B, _, H, K = k_BNHK.shape
    tokens = Tokens(q_BNHK, k_BNHK, v_BNHV, beta_BNH, log_gate_BNH)
    if mask_BN is not None:
        tokens = jax.tree.map(
            lambda x: jnp.where(jnp.expand_dims(mask_BN, range(2, x.ndim)), x, 0), tokens
        )
    if state_BHVK is None:
        state_BHVK = jnp.zeros((B, H, v_BNHV.shape[-1], K))

    split = method == "chunked" and num_shards("position") > 1
    chunked = delta_rule_split if split else delta_rule_chunked
    methods = {"chunked": chunked, "recurrent": delta_rule_recurrent}

    def local(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        *tokens, state_BHVK = inputs
        return methods[method](Tokens(*tokens), state_BHVK, clip)

    axes = ("batch", "position" if split else None, "head", None)
    state_axes = ("batch", "head", None, None)
    inputs = [x.astype(jnp.float32) for x in (*tokens, state_BHVK) if x is not None]
    run = shard_op(
        local,
        in_axes=[*(axes[: x.ndim] for x in inputs[:-1]), state_axes],
        out_axes=[axes, state_axes],
    )
    o_BNHV, state_BHVK = run(*inputs)
    return o_BNHV.astype(v_BNHV.dtype), state_BHVK
