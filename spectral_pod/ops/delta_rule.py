"""The delta rule with gates and clipped writes, an error-correcting associative memory: dispatch.

A head holds a matrix S [V, K]. Every token decays it by a gate g, computes the prediction error for
its key, writes the error, and reads with its query:

    S <- g S,    e = v - S k,    S <- S + beta min(1, clip / |e||k|) e k^T,    o = S q.

Without gates g is 1; with them this is the gated delta rule (Yang et al. 2024, "Gated Delta
Networks: Improving Mamba2 with Delta Rule"). `delta_recurrence.py` computes this definition by a
scan, `delta_chunks.py` and `delta_batched.py` the same function by matrix products, and
`delta_sequence.py` the latter for sequences split over devices. `kernels/delta.py` is a kernel for
TPUs; `kernels/delta_gpu.py` and `kernels/delta_gpu_chunks.py` are two for GPUs. docs/math.md
has the derivations (4 and 5).
"""

import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spectral_pod.ops import delta_batched, delta_chunks, kernels
from spectral_pod.ops.choice import Choice, configured
from spectral_pod.ops.delta_recurrence import DeltaInputs, DeltaResult, delta_rule_recurrent
from spectral_pod.ops.delta_sequence import delta_rule_split
from spectral_pod.ops.kernels import delta, delta_gpu, delta_gpu_chunks
from spectral_pod.parallel.sharding import num_shards, platform, shard_op

_Method = Callable[[DeltaInputs, jax.Array, float | None], DeltaResult]

METHODS: dict[str, _Method] = {  # on any platform
    "chunked": delta_chunks.delta_rule_chunked,
    "batched": delta_batched.delta_rule_batched,
    "recurrent": delta_rule_recurrent,
}
KERNELS: dict[str, dict[str, types.ModuleType]] = {
    "fused": {"tpu": delta, "gpu": delta_gpu},
    "fused_chunks": {"gpu": delta_gpu_chunks},  # not chosen before it has been measured
}
# The kernel for GPUs takes some 2.6 us for a token, as long as there are fewer heads than fill the
# card, and "batched" 20 to 30 ns for a token of each head (docs/results.md).
_MIN_HEADS_ON_GPUS = 96
# The methods that keep split positions split; the others gather them.
SPLIT: dict[str, _Method] = {
    "chunked": functools.partial(delta_rule_split, delta_chunks),
    "batched": functools.partial(delta_rule_split, delta_batched),
}


def choose(platform: str, key_width: int, value_width: int, heads: int) -> Choice:
    """The fastest method for whole sequences.

    On CPUs it is the one with small segments, which fit the caches; elsewhere the kernel, if it
    serves these sizes, a device has all positions, and on GPUs enough heads, or else the one with
    the fewest operations.

    Args:
      platform: "cpu", "gpu" or "tpu".
      key_width, value_width: K and V.
      heads: of all sequences of a device.
    """
    if platform == "cpu":
        return Choice("chunked", "its small segments fit the caches of CPUs")
    reason = KERNELS["fused"][platform].unserved(key_width, value_width)
    if num_shards("position") > 1:
        reason = "positions are split over devices, and it would gather them"
    elif platform == "gpu" and heads < _MIN_HEADS_ON_GPUS:
        reason = f"{heads} heads of all sequences of a device are fewer than {_MIN_HEADS_ON_GPUS}"
    if reason:
        return Choice("batched", f"not 'fused': {reason}")
    return Choice("fused", "the states never leave the chip")


def resolve(method: str, key_width: int, value_width: int, heads: int) -> Choice:
    """The method itself, or that of `choose` on the mesh that is set: for "auto", and, with a
    warning, for a kernel that the device or the sizes rule out.

    Args:
      heads: of all sequences of all devices.
    """
    if method != "auto" and method not in KERNELS:
        return configured(method)
    heads //= num_shards("batch") * num_shards("head")
    chosen = choose(platform(), key_width, value_width, heads)
    if method == "auto":
        return chosen
    reason = kernels.unserved(KERNELS[method], key_width, value_width)
    return kernels.instead_of(method, reason, chosen) if reason else configured(method)


def delta_rule(
    q_BNHK: jax.Array,
    k_BNHK: jax.Array,
    v_BNHV: jax.Array,
    beta_BNH: jax.Array,
    *,
    log_gate_BNH: jax.Array | None = None,
    state_BHVK: jax.Array | None = None,
    mask_BN: jax.Array | None = None,
    method: str = "auto",
    clip: float | None = None,
) -> DeltaResult:
    """Applies the delta rule to whole sequences, in float32 whatever the input dtype.

    Runs on each device's own sequences and heads, so that each device decides for itself whether a
    write was clipped. Do not `vmap` over it: both sides of that branch would then run. Where the
    mesh splits positions, they stay split, evenly, except that kernels and "recurrent" gather them.

    Args:
      q_BNHK: queries.
      k_BNHK: keys.
      v_BNHV: values.
      beta_BNH: write strengths, >= 0.
      log_gate_BNH: log g, <= 0; no decay if None.
      state_BHVK: the state before the first token; zero if None.
      mask_BN: valid tokens; the others leave the state unchanged and their output is 0. All are
        valid if None.
      method: for training and prefill "chunked", "batched", the kernels "fused" and, on GPUs,
        "fused_chunks", or "auto", which lets `choose` decide; "recurrent" for a few tokens at a
        time. For tests, "fused_interpreted" runs the kernel for TPUs without one, slowly.
      clip: the largest |e||k| written in full, up to 1e19; None for no limit. It keeps the state
        finite for keys of any length. Unit keys need none: with beta <= 1 a write then shortens
        the error of its key and changes nothing else.

    Returns:
      The outputs o_BNHV in the dtype of v, the float32 state_BHVK after the last token, and the
      number of clipped tokens.
    """
    B, _, H, K = k_BNHK.shape
    inputs = DeltaInputs(q_BNHK, k_BNHK, v_BNHV, beta_BNH, log_gate_BNH)
    if mask_BN is not None:
        inputs = jax.tree.map(
            lambda x: jnp.where(jnp.expand_dims(mask_BN, range(2, x.ndim)), x, 0), inputs
        )
    if state_BHVK is None:
        state_BHVK = jnp.zeros((B, H, v_BNHV.shape[-1], K), jnp.float32)

    method = resolve(method, K, v_BNHV.shape[-1], B * H).method
    split = method in SPLIT and num_shards("position") > 1
    compute = SPLIT[method] if split else _method(method)

    def local(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        *inputs, state_BHVK = arrays
        return tuple(compute(DeltaInputs(*inputs), state_BHVK, clip))

    axes = ("batch", "position" if split else None, "head", None)
    state_axes = ("batch", "head", None, None)
    arrays = [x.astype(jnp.float32) for x in (*inputs, state_BHVK) if x is not None]
    run = shard_op(
        local,
        in_axes=[*(axes[: x.ndim] for x in arrays[:-1]), state_axes],
        out_axes=[axes, state_axes, state_axes[:2]],
    )
    o_BNHV, state_BHVK, clipped_BH = run(*arrays)
    return DeltaResult(o_BNHV.astype(v_BNHV.dtype), state_BHVK, clipped_BH)


def _method(name: str) -> _Method:
    if name in KERNELS:
        return KERNELS[name][platform()].delta_rule
    if name == "fused_interpreted":
        return functools.partial(delta.delta_rule, interpret=True)
    return METHODS[name]
