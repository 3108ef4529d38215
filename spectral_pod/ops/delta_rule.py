"""The delta rule, an associative memory that corrects what it recalls, with clipped writes.

A head holds a matrix S [V, K]. Every token reads its error, writes, and then reads its output:

    e = v - S k,    S <- S + beta min(1, clip / |e||k|) e k^T,    o = S q.

`delta_rule_recurrent` is this definition as a scan. `delta_rule_chunked` is the same function by
matrix products (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length"). With the tokens of a chunk as rows of q, k, v and with what each of them writes,
u_t = beta_t e_t, as rows of u, an unclipped token sees S_t = S + sum_{s <= t} u_s k_s^T, so

    u_t = beta_t (v_t - S k_t - sum_{s < t} (k_t . k_s) u_s),    that is
    u = (I + L)^-1 diag(beta) (v - k S^T),    L = tril(diag(beta) k k^T, -1),
    o = q S^T + tril(q k^T) u,    S <- S + u^T k.

The clip certificate is free: |u_t||k_t| > clip beta_t says that token t would have been clipped.
Up to the first clip both forms agree, so some clip in the chunked form is equivalent to some clip
in the recurrence, and a segment of chunks where one fires is redone by the recurrence (so a clip
changes earlier reads of its segment by rounding, and only by that). A token with beta = 0 writes
nothing, clipped or not. Segments keep only their inputs for the backward pass, which is derived
by hand in `_chunks_backward`.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import shard_op

SEGMENT_CHUNKS = 8  # at most; chunks that share one clip check and one stored state
STRETCH = 32  # tokens of the recurrence between stored states

_Arrays = tuple[jax.Array, ...]
_Pair = tuple[jax.Array, jax.Array]

# Accelerators round float32 operands by default, and the errors would add up in the state.
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def delta_rule(
    q_BNHK: jax.Array,
    k_BNHK: jax.Array,
    v_BNHV: jax.Array,
    beta_BNH: jax.Array,
    *,
    state_BHVK: jax.Array | None = None,
    mask_BN: jax.Array | None = None,
    method: Literal["chunked", "recurrent"] = "chunked",
    clip: float | None = 10.0,
) -> tuple[jax.Array, jax.Array]:
    """Writes every token into the memory and reads it back, in float32 whatever the input dtype.

    Runs on each device's own sequences and heads, so that each decides for itself whether a clip
    fired. Do not `vmap` over it: that would turn the branch into running both sides.

    Args:
      q_BNHK: queries.
      k_BNHK: keys.
      v_BNHV: values.
      beta_BNH: write strengths, >= 0.
      state_BHVK: memory before the first token; zero if None.
      mask_BN: tokens that count; the others write nothing and read 0. All count if None.
      method: "chunked" to train and prefill, "recurrent" for a few tokens at a time.
      clip: largest |e||k| written in full; None writes unclipped. Clips hold up to |e||k| = 1e19.

    Returns:
      The reads o_BNHV in the dtype of v, and the float32 state_BHVK after the last token.
    """
    B, _, H, K = k_BNHK.shape
    tokens: _Arrays = (q_BNHK, k_BNHK, v_BNHV, beta_BNH)
    if mask_BN is not None:
        tokens = tuple(jnp.where(jnp.expand_dims(mask_BN, range(2, x.ndim)), x, 0) for x in tokens)
    if state_BHVK is None:
        state_BHVK = jnp.zeros((B, H, v_BNHV.shape[-1], K))
    methods = {"chunked": delta_rule_chunked, "recurrent": delta_rule_recurrent}
    token_axes, state_axes = ("batch", None, "head", None), ("batch", "head", None, None)
    run = shard_op(
        functools.partial(methods[method], clip=clip),
        in_axes=[token_axes, token_axes, token_axes, token_axes[:3], state_axes],
        out_axes=[token_axes, state_axes],
    )
    o_BNHV, state_BHVK = run(*(x.astype(jnp.float32) for x in (*tokens, state_BHVK)))
    return o_BNHV.astype(v_BNHV.dtype), state_BHVK


def delta_rule_recurrent(
    q_BNHK: jax.Array,
    k_BNHK: jax.Array,
    v_BNHV: jax.Array,
    beta_BNH: jax.Array,
    state_BHVK: jax.Array,
    clip: float | None = 10.0,
) -> tuple[jax.Array, jax.Array]:
    """The definition, one token at a time, in the dtype of its arguments.

    The backward pass holds one state per `STRETCH` tokens and recomputes those between.

    Returns:
      The reads o_BNHV and the final state_BHVK.
    """

    def step(state_BHVK: jax.Array, token: _Arrays) -> tuple[jax.Array, jax.Array]:
        q_BHK, k_BHK, v_BHV, beta_BH = token
        error_BHV1 = v_BHV[..., None] - _dot(state_BHVK, k_BHK[..., None])
        rate_BH = beta_BH
        if clip is not None:
            size2_BH = jnp.sum(error_BHV1**2, (-2, -1)) * jnp.sum(k_BHK**2, -1)
            rate_BH *= clip / jnp.sqrt(jnp.maximum(size2_BH, clip**2))
        # As a product of matrices: XLA's backward pass of a broadcast product is 3x slower on CPU.
        state_BHVK += _dot(rate_BH[..., None, None] * error_BHV1, k_BHK[..., None, :])
        return state_BHVK, _dot(state_BHVK, q_BHK[..., None])[..., 0]

    def stretch(state_BHVK: jax.Array, tokens: _Arrays) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(step, state_BHVK, tokens)

    N = q_BNHK.shape[1]
    stretches = math.ceil(N / STRETCH)
    length = math.ceil(N / stretches)

    def in_stretches(x_BNH: jax.Array) -> jax.Array:
        x_NBH = jnp.moveaxis(_pad(x_BNH, stretches * length), 1, 0)
        return x_NBH.reshape(stretches, length, *x_NBH.shape[1:])

    tokens = tuple(in_stretches(x) for x in (q_BNHK, k_BNHK, v_BNHV, beta_BNH))
    state_BHVK, o = jax.lax.scan(jax.checkpoint(stretch, prevent_cse=False), state_BHVK, tokens)
    o_NBHV = o.reshape(stretches * length, *o.shape[2:])[:N]
    return jnp.moveaxis(o_NBHV, 0, 1), state_BHVK


def delta_rule_chunked(
    q_BNHK: jax.Array,
    k_BNHK: jax.Array,
    v_BNHV: jax.Array,
    beta_BNH: jax.Array,
    state_BHVK: jax.Array,
    clip: float | None = 10.0,
    chunk: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """The same function by matrix products, as derived at the top of the module.

    Args:
      q_BNHK, k_BNHK, v_BNHV, beta_BNH, state_BHVK, clip: as in `delta_rule`.
      chunk: tokens solved for at once, 8 times a power of two.

    Returns:
      The reads o_BNHV and the final state_BHVK.
    """
    N = q_BNHK.shape[1]
    chunks = math.ceil(N / chunk)
    segments = math.ceil(chunks / SEGMENT_CHUNKS)
    per_segment = math.ceil(chunks / segments)

    def in_segments(x_BNH: jax.Array) -> jax.Array:
        x_GBHT = _split(_pad(x_BNH, segments * per_segment * chunk), chunk)
        return x_GBHT.reshape(segments, per_segment, *x_GBHT.shape[1:])

    def segment(state_BHVK: jax.Array, tokens: _Arrays) -> _Pair:
        o_GBHTV, state_BHVK = _segment(clip, (*tokens, state_BHVK))
        return state_BHVK, o_GBHTV

    tokens = tuple(in_segments(x) for x in (q_BNHK, k_BNHK, v_BNHV, beta_BNH))
    state_BHVK, o = jax.lax.scan(segment, state_BHVK, tokens)
    return _join(o.reshape(-1, *o.shape[2:]))[:, :N], state_BHVK


# The inputs of everything below are (q_GBHTK, k_GBHTK, v_GBHTV, beta_GBHT, state_BHVK), and the
# results (o_GBHTV, state_BHVK), for the G chunks of one segment.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _segment(clip: float | None, inputs: _Arrays) -> _Pair:
    """A segment, by the chunk maths if no clip fires in it and by the recurrence if one does."""
    return _segment_forward(clip, inputs)[0]


def _segment_forward(clip: float | None, inputs: _Arrays) -> tuple[_Pair, Any]:
    o_GBHTV, state_BHVK, (_, _, u_GBHTV) = _chunks(inputs)
    results = o_GBHTV, state_BHVK
    if clip is None:
        return results, (inputs, None)
    _, k_GBHTK, _, beta_GBHT, _ = inputs
    size2_GBHT = jnp.sum(u_GBHTV**2, -1) * jnp.sum(k_GBHTK**2, -1)
    # Not `any(>)`: without its clips a segment may have overflowed to NaN.
    fired = ~jnp.all(size2_GBHT <= (clip * beta_GBHT) ** 2)
    by_recurrence = functools.partial(_chunks_by_recurrence, clip)
    return jax.lax.cond(fired, by_recurrence, lambda _: results, inputs), (inputs, fired)


def _segment_backward(clip: float | None, residuals: Any, cotangents: _Pair) -> tuple[_Arrays]:
    inputs, fired = residuals
    if clip is None:
        return (_chunks_backward(inputs, cotangents),)
    by_recurrence = functools.partial(_chunks_by_recurrence, clip)
    # A branch here too: zero cotangents through chunk maths that overflowed would be NaN.
    dinputs = jax.lax.cond(
        fired,
        lambda: jax.vjp(by_recurrence, inputs)[1](cotangents)[0],
        lambda: _chunks_backward(inputs, cotangents),
    )
    return (dinputs,)


_segment.defvjp(_segment_forward, _segment_backward)


def _chunks_by_recurrence(clip: float, inputs: _Arrays) -> _Pair:
    q_BNHK, k_BNHK, v_BNHV, beta_BNH = (_join(x) for x in inputs[:4])
    o_BNHV, state_BHVK = delta_rule_recurrent(q_BNHK, k_BNHK, v_BNHV, beta_BNH, inputs[4], clip)
    return _split(o_BNHV, inputs[0].shape[3]), state_BHVK


def _chunks(inputs: _Arrays) -> tuple[jax.Array, jax.Array, _Arrays]:
    """The unclipped chunk maths.

    Returns:
      The results, and what the certificate and the backward pass need: (I + L)^-1 of every chunk,
      the states_GBHVK before them and the writes u_GBHTV.
    """
    q_GBHTK, k_GBHTK, v_GBHTV, beta_GBHT, state_BHVK = inputs
    gram_GBHTT = _dot(k_GBHTK, k_GBHTK.mT)
    inverse_GBHTT = _unit_lower_inverse(jnp.tril(beta_GBHT[..., None] * gram_GBHTT, -1))

    def write(state_BHVK: jax.Array, chunk: _Arrays) -> tuple[jax.Array, _Pair]:
        solve_BHTT, k_BHTK, v_BHTV = chunk
        u_BHTV = _dot(solve_BHTT, v_BHTV - _dot(k_BHTK, state_BHVK.mT))
        return state_BHVK + _dot(u_BHTV.mT, k_BHTK), (state_BHVK, u_BHTV)

    solve_GBHTT = inverse_GBHTT * beta_GBHT[..., None, :]
    state_BHVK, (states_GBHVK, u_GBHTV) = jax.lax.scan(
        write, state_BHVK, (solve_GBHTT, k_GBHTK, v_GBHTV)
    )
    attention_GBHTT = jnp.tril(_dot(q_GBHTK, k_GBHTK.mT))
    o_GBHTV = _dot(q_GBHTK, states_GBHVK.mT) + _dot(attention_GBHTT, u_GBHTV)
    return o_GBHTV, state_BHVK, (inverse_GBHTT, states_GBHVK, u_GBHTV)


def _chunks_backward(inputs: _Arrays, cotangents: _Pair) -> _Arrays:
    """The cotangents of the inputs of `_chunks`, whose forward pass it recomputes.

    Let P = (I + L)^-1, A = tril(q k^T) and r = v - k S^T, so that u = P diag(beta) r, and let dx
    be the cotangent of x. From the last chunk to the first, with S' the state that a chunk leaves,

        du = A^T do + k dS'^T,    dr = diag(beta) P^T du,    dS = dS' + do^T q - dr^T k.

    The rest needs no order: dP = du (diag(beta) r)^T and dL = -tril(P^T dP P^T, -1) give
    dL = -tril((P^T du) u^T, -1), and the product rule gives the others.
    """
    q, k, v, beta_GBHT, _ = inputs
    do, dstate = cotangents
    beta = beta_GBHT[..., None]
    _, _, (inverse, states, u) = _chunks(inputs)
    gram, attention = _dot(k, k.mT), jnp.tril(_dot(q, k.mT))

    def unwrite(dstate: jax.Array, chunk: _Arrays) -> tuple[jax.Array, _Pair]:
        solve, k, du_read, dstate_read = chunk
        du = du_read + _dot(k, dstate.mT)
        return dstate + dstate_read - _dot(_dot(solve.mT, du).mT, k), (dstate, du)

    reads = _dot(attention.mT, do), _dot(do.mT, q)
    dstate, (dstates, du) = jax.lax.scan(
        unwrite, dstate, (inverse * beta.mT, k, *reads), reverse=True
    )
    dscaled = _dot(inverse.mT, du)  # of diag(beta) r
    dr = beta * dscaled
    dattention = jnp.tril(_dot(do, u.mT))
    dlower = -jnp.tril(_dot(dscaled, u.mT), -1)
    dgram = beta * dlower
    dq = _dot(do, states) + _dot(dattention, k)
    dk = _dot(dattention.mT, q) + _dot(u, dstates) - _dot(dr, states) + _dot(dgram + dgram.mT, k)
    dbeta = jnp.sum(dscaled * (v - _dot(k, states.mT)), -1) + jnp.sum(dlower * gram, -1)
    return dq, dk, dr, dbeta, dstate


def _unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I + lower)^-1 for strictly lower triangular matrices [..., T, T], T = 8 * 2^j.

    Blocks of 8 by the Neumann product (I - L)(I + L^2)(I + L^4), exact as L^8 = 0; larger ones by
    [[A, 0], [C, E]]^-1 = [[A^-1, 0], [-E^-1 C A^-1, E^-1]]. For a whole chunk of repeated keys the
    Neumann powers would grow like binomial coefficients and cancel, leaving no digits.

    Raises:
      ValueError: T is not 8 * 2^j.
    """
    size = lower.shape[-1]
    if size == 8:
        eye = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
        lower2 = _dot(lower, lower)
        return _dot(_dot(eye - lower, eye + lower2), eye + _dot(lower2, lower2))
    if size % 16:
        raise ValueError(f"a chunk must have 8 * 2^j tokens; halving it led to {size}")
    half = size // 2
    halves = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = _unit_lower_inverse(halves)
    corner = -_dot(second, _dot(lower[..., half:, :half], first))
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)


def _pad(x_BNH: jax.Array, length: int) -> jax.Array:
    """Adds zero tokens at the end, which have beta = 0 and so write nothing."""
    return jnp.pad(
        x_BNH, [(0, length - n if axis == 1 else 0) for axis, n in enumerate(x_BNH.shape)]
    )


def _split(x_BNH: jax.Array, chunk: int) -> jax.Array:
    """[B, N, H, ...] -> [G, B, H, T, ...], with the chunks in front to scan over them."""
    B, _, *rest = x_BNH.shape
    return jnp.moveaxis(x_BNH.reshape(B, -1, chunk, *rest), (1, 3), (0, 2))


def _join(x_GBHT: jax.Array) -> jax.Array:
    """[G, B, H, T, ...] -> [B, N, H, ...], the inverse of `_split`."""
    x_BGTH = jnp.moveaxis(x_GBHT, (0, 2), (1, 3))
    B, G, T, *rest = x_BGTH.shape
    return x_BGTH.reshape(B, G * T, *rest)
