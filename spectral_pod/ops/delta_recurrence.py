"""The delta rule as a sequential scan over tokens, its definition."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SEGMENT = 32  # tokens between stored states

# Accelerators round float32 operands by default, and the errors would accumulate in the state.
dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class DeltaInputs(NamedTuple):
    """The inputs of the delta rule; q, k: [B, N, H, K], v: [B, N, H, V], the others [B, N, H]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array  # write strengths, >= 0
    log_gate: jax.Array | None = None  # log of the decay of the state, <= 0


class DeltaResult(NamedTuple):
    """What the delta rule returns."""

    o_BNHV: jax.Array  # the reads
    state_BHVK: jax.Array  # after the last token
    clipped_BH: jax.Array  # the number of tokens whose write was clipped, in the dtype of the state


def delta_rule_recurrent(
    inputs: DeltaInputs, state_BHVK: jax.Array, clip: float | None = None
) -> DeltaResult:
    """The delta rule as defined in `delta_rule.py`, by a scan, in the dtype of its arguments.

    The backward pass stores one state per `SEGMENT` tokens and recomputes the others.
    """

    def step(state_BHVK: jax.Array, token: DeltaInputs) -> tuple[jax.Array, Any]:
        q_BHK, k_BHK, v_BHV, rate_BH, log_gate_BH = token
        if log_gate_BH is not None:
            state_BHVK *= jnp.exp(log_gate_BH)[..., None, None]
        error_BHV1 = v_BHV[..., None] - dot(state_BHVK, k_BHK[..., None])
        clipped_BH = jnp.zeros_like(rate_BH)
        if clip is not None:
            size2_BH = jnp.sum(error_BHV1**2, (-2, -1)) * jnp.sum(k_BHK**2, -1)
            rate_BH *= clip / jnp.sqrt(jnp.maximum(size2_BH, clip**2))
            clipped_BH = (size2_BH > clip**2).astype(rate_BH.dtype)
        # A matrix product: XLA's backward pass of a broadcast product is 3x slower on CPUs.
        state_BHVK += dot(rate_BH[..., None, None] * error_BHV1, k_BHK[..., None, :])
        return state_BHVK, (dot(state_BHVK, q_BHK[..., None])[..., 0], clipped_BH)

    def run_segment(state_BHVK: jax.Array, inputs: DeltaInputs) -> tuple[jax.Array, Any]:
        return jax.lax.scan(step, state_BHVK, inputs)

    N = inputs.k.shape[1]
    segments = math.ceil(N / SEGMENT)
    length = math.ceil(N / segments)

    def split(x_BNH: jax.Array) -> jax.Array:
        x_NBH = jnp.moveaxis(pad_tokens(x_BNH, segments * length), 1, 0)
        return x_NBH.reshape(segments, length, *x_NBH.shape[1:])

    state_BHVK, (o, clipped) = jax.lax.scan(
        jax.checkpoint(run_segment, prevent_cse=False), state_BHVK, jax.tree.map(split, inputs)
    )
    o_NBHV = o.reshape(segments * length, *o.shape[2:])[:N]
    return DeltaResult(jnp.moveaxis(o_NBHV, 0, 1), state_BHVK, jnp.sum(clipped, (0, 1)))


def recurrent_cotangents(
    inputs: DeltaInputs,
    state_BHVK: jax.Array,
    clip: float | None,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[DeltaInputs, jax.Array]:
    """The cotangents of the inputs and the initial state of `delta_rule_recurrent`, given those of
    the outputs and of the last state."""

    def recurrence(inputs: DeltaInputs, state_BHVK: jax.Array) -> tuple[jax.Array, jax.Array]:
        return delta_rule_recurrent(inputs, state_BHVK, clip)[:2]

    return jax.vjp(recurrence, inputs, state_BHVK)[1](cotangents)


def pad_tokens(x_BNH: jax.Array, length: int) -> jax.Array:
    """Appends zero tokens, which leave the state unchanged: beta and the log gate are zero too."""
    return jnp.pad(
        x_BNH, [(0, length - n if axis == 1 else 0) for axis, n in enumerate(x_BNH.shape)]
    )
