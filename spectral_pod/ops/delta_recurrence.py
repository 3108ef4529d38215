"""The delta rule by its definition, one token after another."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

STRETCH = 32  # tokens between stored states

# Accelerators round float32 operands by default, and the errors would add up in the state.
dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Tokens(NamedTuple):
    """What the tokens of sequences bring; q, k: [B, N, H, K], v: [B, N, H, V], others [B, N, H]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array  # write strengths, >= 0
    log_gate: jax.Array | None = None  # log of the part of the memory that is kept, <= 0


def delta_rule_recurrent(
    tokens: Tokens, state_BHVK: jax.Array, clip: float | None = 10.0
) -> tuple[jax.Array, jax.Array]:
    """The definition (`delta_rule.py`) as a scan, in the dtype of its arguments.

    The backward pass holds one state per `STRETCH` tokens and recomputes those between.

    Returns:
      The reads o_BNHV and the final state_BHVK.
    """

    def step(state_BHVK: jax.Array, token: Tokens) -> tuple[jax.Array, jax.Array]:
        q_BHK, k_BHK, v_BHV, rate_BH, log_gate_BH = token
        if log_gate_BH is not None:
            state_BHVK *= jnp.exp(log_gate_BH)[..., None, None]
        error_BHV1 = v_BHV[..., None] - dot(state_BHVK, k_BHK[..., None])
        if clip is not None:
            size2_BH = jnp.sum(error_BHV1**2, (-2, -1)) * jnp.sum(k_BHK**2, -1)
            rate_BH *= clip / jnp.sqrt(jnp.maximum(size2_BH, clip**2))
        # As a product of matrices: XLA's backward pass of a broadcast product is 3x slower on CPU.
        state_BHVK += dot(rate_BH[..., None, None] * error_BHV1, k_BHK[..., None, :])
        return state_BHVK, dot(state_BHVK, q_BHK[..., None])[..., 0]

    def stretch(state_BHVK: jax.Array, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(step, state_BHVK, tokens)

    N = tokens.k.shape[1]
    stretches = math.ceil(N / STRETCH)
    length = math.ceil(N / stretches)

    def in_stretches(x_BNH: jax.Array) -> jax.Array:
        x_NBH = jnp.moveaxis(pad_tokens(x_BNH, stretches * length), 1, 0)
        return x_NBH.reshape(stretches, length, *x_NBH.shape[1:])

    state_BHVK, o = jax.lax.scan(
        jax.checkpoint(stretch, prevent_cse=False), state_BHVK, jax.tree.map(in_stretches, tokens)
    )
    o_NBHV = o.reshape(stretches * length, *o.shape[2:])[:N]
    return jnp.moveaxis(o_NBHV, 0, 1), state_BHVK


def pad_tokens(x_BNH: jax.Array, length: int) -> jax.Array:
    """Adds zero tokens at the end, which change no memory: beta and the log gate are zero, too."""
    return jnp.pad(
        x_BNH, [(0, length - n if axis == 1 else 0) for axis, n in enumerate(x_BNH.shape)]
    )
