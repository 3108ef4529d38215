"""The delta rule by matrix products over chunks of tokens, with exact clipping and its gradient.

Let q, k, v hold the tokens of a chunk as rows and beta be a column. Let g_t be the gate of token t,
and G(s, t) the product of the gates of the tokens after s up to t, with s = 0 before the chunk. Let
S be the state before the chunk. Without clipping, the prediction errors are

    e_t = v_t - G(0, t) S k_t - sum_{s < t} G(s, t) (k_t . k_s) beta_s e_s,    that is
    e = (I + L diag(beta))^-1 (v - a k S^T),    L = tril(G * k k^T, -1),    u = beta e,
    o = a q S^T + A u,    A = tril(G * q k^T),    S <- G(0, T) S + (z u)^T k,

with the columns a = G(0, t) and z = G(t, T): the chunked form of Yang et al. 2024, "Parallelizing
Linear Transformers with the Delta Rule over Sequence Length", with the gates of Yang et al. 2024,
"Gated Delta Networks", solved for errors instead of writes. Without gates every G is 1. Logs of G
are sums of log gates and never differences of sums, so G is at most 1 and exact to rounding.

Detecting clips is free: |e_t||k_t| > clip means that the write of token t would have been clipped.
Up to the first clipped write both forms agree, so the chunked form detects a clip if and only if
the recurrence clips. A segment of chunks with a clipped write is recomputed by the recurrence, so
a clip changes earlier outputs of its segment by rounding only. The backward pass starts from the
stored states before the segments and recomputes everything else.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.ops.delta_recurrence import (
    DeltaInputs,
    DeltaResult,
    delta_rule_recurrent,
    dot,
    pad_tokens,
)

CHUNK = 32  # tokens of one triangular solve
MATRICES = 8  # processed at once: several chunks of each head, if there are fewer heads than that

_Pair = tuple[jax.Array, jax.Array]


class Plan(NamedTuple):
    """How a sequence is divided into segments and chunks, and the clip."""

    segment: int  # inputs
    chunk: int  # inputs, 8 times a power of two
    clip: float | None


class Residuals(NamedTuple):
    """What the backward pass needs of the forward pass; the leading axis runs over segments."""

    inputs: DeltaInputs
    states: jax.Array  # before each segment
    clipped: jax.Array | None  # whether a write of the segment was clipped; None without a clip


def delta_rule_chunked(
    inputs: DeltaInputs, state_BHVK: jax.Array, clip: float | None = None, chunk: int = CHUNK
) -> DeltaResult:
    """The same function as `delta_rule_recurrent`, by matrix products, in float32.

    Args:
      inputs, state_BHVK, clip: as in `delta_rule_recurrent`.
      chunk: tokens of one triangular solve, 8 times a power of two.

    Raises:
      ValueError: `chunk` is not 8 times a power of two.
    """
    N = inputs.k.shape[1]
    plan, inputs = cut(inputs, clip, chunk)
    result = _chunked(plan, inputs, state_BHVK)
    return result._replace(o_BNHV=result.o_BNHV[:, :N])


def cut(inputs: DeltaInputs, clip: float | None, chunk: int = CHUNK) -> tuple[Plan, DeltaInputs]:
    """Plans segments of equal length, and pads the inputs to whole segments.

    A segment is one chunk if sequences times heads suffice to keep a device busy. Longer segments
    would then only exceed the caches, and more tokens would be recomputed where a write is clipped.
    """
    B, N, H, _ = inputs.k.shape
    at_once = max(1, MATRICES // (B * H))
    segments = math.ceil(N / (at_once * chunk))
    plan = Plan(chunk * math.ceil(N / (segments * chunk)), chunk, clip)
    return plan, jax.tree.map(lambda x: pad_tokens(x, segments * plan.segment), inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan: Plan, inputs: DeltaInputs, state_BHVK: jax.Array) -> DeltaResult:
    return forward(plan, inputs, state_BHVK)[0]


def forward(
    plan: Plan, inputs: DeltaInputs, state_BHVK: jax.Array
) -> tuple[DeltaResult, Residuals]:
    """The result for whole segments, and the residuals for `backward`."""

    def segment(carry: _Pair, start: jax.Array) -> tuple[_Pair, Any]:
        state_BHVK, o_BNHV = carry
        result, clipped = _segment(plan, _slice(plan, inputs, start), state_BHVK)
        carry = result.state_BHVK, _write(o_BNHV, result.o_BNHV, start)
        return carry, (state_BHVK, clipped, result.clipped_BH)

    # Slices are updated in place; scanned inputs and outputs would all be copied once more.
    (state_BHVK, o_BNHV), (*saved, counts) = jax.lax.scan(
        segment, (state_BHVK, jnp.zeros_like(inputs.v)), _starts(plan, inputs)
    )
    return DeltaResult(o_BNHV, state_BHVK, jnp.sum(counts, 0)), Residuals(inputs, *saved)


def backward(
    plan: Plan, residuals: Residuals, cotangents: DeltaResult
) -> tuple[DeltaInputs, jax.Array]:
    """The cotangents of the inputs and the initial state, given those of `forward`'s result."""
    do_BNHV, dstate_BHVK, _ = cotangents
    inputs, states, clipped = residuals

    def segment(carry: Any, at: Any) -> tuple[Any, None]:
        dstate_BHVK, dinputs = carry
        start, state_BHVK, clipped = at
        part, do_part = _slice(plan, (inputs, do_BNHV), start)
        dpart, dstate_BHVK = _segment_backward(
            plan, part, state_BHVK, clipped, (do_part, dstate_BHVK)
        )
        dinputs = jax.tree.map(lambda all_, part: _write(all_, part, start), dinputs, dpart)
        return (dstate_BHVK, dinputs), None

    carry = dstate_BHVK, jax.tree.map(jnp.zeros_like, inputs)
    at = _starts(plan, inputs), states, clipped
    (dstate_BHVK, dinputs), _ = jax.lax.scan(segment, carry, at, reverse=True)
    return dinputs, dstate_BHVK


_chunked.defvjp(forward, backward)


def _starts(plan: Plan, inputs: DeltaInputs) -> jax.Array:
    return jnp.arange(0, inputs.k.shape[1], plan.segment)


def _slice(plan: Plan, tree: Any, start: jax.Array) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, start, plan.segment, axis=1), tree
    )


def _write(x_BNH: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BNH, part, start, axis=1)


# ---- one segment


def _segment(
    plan: Plan, inputs: DeltaInputs, state_BHVK: jax.Array
) -> tuple[DeltaResult, jax.Array | None]:
    """The segment's result, by the recurrence if a write is clipped, and whether one is."""
    q, k, _, beta, _ = parts = jax.tree.map(lambda x: _split(x, plan.chunk), inputs)
    decays, _, _, states, e, state = _solve(parts, state_BHVK)
    attention = jnp.tril(dot(q, k.mT) * decays.between)
    o = decays.since * dot(q, states.mT) + dot(attention, beta[..., None] * e)
    result = DeltaResult(_join(o), state, jnp.zeros_like(beta[:, 0, :, 0]))
    if plan.clip is None:
        return result, None
    size2_BGHT = jnp.sum(e**2, -1) * jnp.sum(k**2, -1)
    # Not `any(>)`: without clipping, the segment may have overflowed to NaN.
    clipped = ~jnp.all(size2_BGHT <= plan.clip**2)
    by_recurrence = functools.partial(delta_rule_recurrent, clip=plan.clip)
    return jax.lax.cond(clipped, by_recurrence, lambda *_: result, inputs, state_BHVK), clipped


def _segment_backward(
    plan: Plan,
    inputs: DeltaInputs,
    state_BHVK: jax.Array,
    clipped: jax.Array | None,
    cotangents: _Pair,
) -> tuple[DeltaInputs, jax.Array]:
    def by_recurrence() -> tuple[DeltaInputs, jax.Array]:
        def recurrence(inputs: DeltaInputs, state_BHVK: jax.Array) -> _Pair:
            return delta_rule_recurrent(inputs, state_BHVK, plan.clip)[:2]

        return jax.vjp(recurrence, inputs, state_BHVK)[1](cotangents)

    def by_chunks() -> tuple[DeltaInputs, jax.Array]:
        do_BNHV, dstate_BHVK = cotangents
        parts, do = jax.tree.map(lambda x: _split(x, plan.chunk), (inputs, do_BNHV))
        dparts, dstate_BHVK = _chunks_backward(parts, state_BHVK, do, dstate_BHVK)
        return jax.tree.map(_join, dparts), dstate_BHVK

    # The backward pass branches too: zero cotangents of an overflowed chunk would become NaN.
    return by_chunks() if clipped is None else jax.lax.cond(clipped, by_recurrence, by_chunks)


# ---- chunks; inputs are [B, G, H, T, ...] here


class _Decays(NamedTuple):
    """Products of gates, or, from `_log_decays`, sums of their logs."""

    between: jax.Array  # [B, G, H, T, T], G(s, t) in row t and column s < t
    since: jax.Array  # [B, G, H, T, 1], a
    until: jax.Array  # [B, G, H, T, 1], z
    whole: jax.Array  # [B, G, H, 1, 1], G(0, T)


class _Solved(NamedTuple):
    decays: _Decays
    lower: jax.Array  # L
    inverse: jax.Array  # (I + L diag(beta))^-1
    states: jax.Array  # [B, G, H, V, K], before each chunk
    e: jax.Array
    state: jax.Array  # after the last chunk


def _solve(inputs: DeltaInputs, state_BHVK: jax.Array) -> _Solved:
    """The errors of all tokens without clipping, and the states before and after the chunks."""
    _, k, v, beta, _ = inputs
    decays = _decays(inputs)
    lower = jnp.tril(dot(k, k.mT) * decays.between, -1)
    inverse = _unit_lower_inverse(lower * beta[..., None, :])

    def write(state: jax.Array, chunk: Any) -> tuple[jax.Array, _Pair]:
        inverse, k, v, beta, (_, since, until, whole) = chunk
        e = dot(inverse, v - since * dot(k, state.mT))
        return whole * state + dot((until * beta * e).mT, k), (state, e)

    chunks = inverse, k, v, beta[..., None], decays
    state_BHVK, (states, e) = _scan_chunks(write, state_BHVK, chunks)
    return _Solved(decays, lower, inverse, states, e, state_BHVK)


def _chunks_backward(
    inputs: DeltaInputs, state_BHVK: jax.Array, do: jax.Array, dstate_BHVK: jax.Array
) -> tuple[DeltaInputs, jax.Array]:
    """The cotangents of the inputs and of the initial state, writing dx for that of x.

    With P the inverse and r = v - a k S^T, so that e = P r, and with S' the state after a chunk,
    from the last chunk to the first:

        du = A^T do + z k dS'^T,    dr = P^T (beta du),
        dS = G(0, T) dS' + (a do)^T q - (a dr)^T k.

    The rest is independent of order: by e = r - L u, dL = -tril(dr u^T, -1) and
    dbeta = e . (du - L^T dr); the product rule gives the others.
    """
    q, k, _, beta, log_gate = inputs
    beta = beta[..., None]
    decays, lower, inverse, states, e, _ = _solve(inputs, state_BHVK)
    attention = jnp.tril(dot(q, k.mT) * decays.between)

    def unwrite(dstate: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
        inverse, k, beta, (_, since, until, whole), du, dstate_read = chunk
        du += until * dot(k, dstate.mT)
        dr = dot(inverse.mT, beta * du)
        return whole * dstate + dstate_read - dot((since * dr).mT, k), (dstate, du, dr)

    u, do_state = beta * e, decays.since * do
    chunks = inverse, k, beta, decays, dot(attention.mT, do), dot(do_state.mT, q)
    dstate_BHVK, (dstates, du, dr) = _scan_chunks(unwrite, dstate_BHVK, chunks, reverse=True)

    # The contributions through the state S, through A and through L.
    dq_state, dk_state = dot(do_state, states), -dot(decays.since * dr, states)
    dk_write = dot(decays.until * u, dstates)
    dattention, dlower = jnp.tril(dot(do, u.mT)), -jnp.tril(dot(dr, u.mT), -1)
    dqk, dkk = dattention * decays.between, dlower * decays.between
    dq = dq_state + dot(dqk, k)
    dk = dk_state + dk_write + dot(dqk.mT, q) + dot(dkk + dkk.mT, k)
    dbeta = jnp.sum((du - dot(lower.mT, dr)) * e, -1)
    dlog_gate = None
    if log_gate is not None:
        dlogs = _Decays(
            between=dattention * attention + dlower * lower,
            since=jnp.sum(dq_state * q + dk_state * k, -1, keepdims=True),
            until=jnp.sum(dk_write * k, -1, keepdims=True),
            whole=decays.whole * jnp.sum(dstates * states, (-2, -1), keepdims=True),
        )
        (dlog_gate,) = jax.vjp(_log_decays, log_gate)[1](dlogs)
    return DeltaInputs(dq, dk, dr, dbeta, dlog_gate), dstate_BHVK


def _decays(inputs: DeltaInputs) -> _Decays:
    if inputs.log_gate is None:
        return _Decays(*4 * [jnp.ones((1, inputs.k.shape[1], 1, 1, 1), inputs.k.dtype)])
    return jax.tree.map(jnp.exp, _log_decays(inputs.log_gate))


def _log_decays(log_gate_BGHT: jax.Array) -> _Decays:
    T = log_gate_BGHT.shape[-1]
    rows = jnp.broadcast_to(log_gate_BGHT[..., None], (*log_gate_BGHT.shape, T))
    between = jnp.cumsum(jnp.tril(rows, -1), -2)
    since = jnp.cumsum(log_gate_BGHT, -1)[..., None]
    return _Decays(between, since, between[..., -1, :, None], since[..., -1:, :])


def _unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I + lower)^-1 for strictly lower triangular matrices [..., T, T], T = 8 * 2^j.

    Recursive halving by [[P, 0], [C, Q]]^-1 = [[P^-1, 0], [-Q^-1 C P^-1, Q^-1]], down to blocks of
    4, whose inverse is (I - L)(I + L^2), exact as L^4 = 0. With repeated keys, the powers of L that
    larger blocks need grow like binomial coefficients and cancel: blocks of 8 would lose a digit,
    whole chunks all of them.

    Raises:
      ValueError: T is not 8 * 2^j.
    """
    size = lower.shape[-1]
    if size == 8:  # both blocks of 4 in one matrix, as CPUs are slow at 4 x 4 products
        eye = jnp.broadcast_to(jnp.eye(8, dtype=lower.dtype), lower.shape)
        blocks = lower.at[..., 4:, :4].set(0.0)
        inverse = dot(eye - blocks, eye + dot(blocks, blocks))
        return inverse - dot(inverse, dot(lower - blocks, inverse))
    if size % 16:
        raise ValueError(f"a chunk must have 8 * 2^j tokens; halving it led to {size}")
    half = size // 2
    halves = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = _unit_lower_inverse(halves)
    corner = -dot(second, dot(lower[..., half:, :half], first))
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)


def _scan_chunks(
    f: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    state: jax.Array,
    chunks: Any,
    reverse: bool = False,
) -> tuple[jax.Array, Any]:
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunks)
    state, found = jax.lax.scan(f, state, chunks, reverse=reverse)
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def _split(x_BNH: jax.Array, chunk: int) -> jax.Array:
    """[B, N, H, ...] -> [B, G, H, T, ...]."""
    B, _, *rest = x_BNH.shape
    return jnp.swapaxes(x_BNH.reshape(B, -1, chunk, *rest), 2, 3)


def _join(x_BGHT: jax.Array) -> jax.Array:
    """[B, G, H, T, ...] -> [B, N, H, ...], the inverse of `_split`."""
    x_BGTH = jnp.swapaxes(x_BGHT, 2, 3)
    B, G, T, *rest = x_BGTH.shape
    return x_BGTH.reshape(B, G * T, *rest)
