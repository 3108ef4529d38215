"""The delta rule by matrix products, exact clips included, with its gradient by hand.

With the tokens of a chunk as rows of q, k, v and beta as a column, let g_t be the gate of token t
and G(s, t) the product of those of the tokens after s up to t, with S the state before the chunk
and s = 0 before its first token. What the unclipped tokens see adds up to

    e_t = v_t - G(0, t) S k_t - sum_{s < t} G(s, t) (k_t . k_s) beta_s e_s,    that is
    e = (I + L diag(beta))^-1 (v - a k S^T),    L = tril(G * k k^T, -1),    u = beta e,
    o = a q S^T + A u,    A = tril(G * q k^T),    S <- G(0, T) S + (z u)^T k,

with a = G(0, t) and z = G(t, T) as columns: the chunked form of Yang et al. 2024, "Parallelizing
Linear Transformers with the Delta Rule over Sequence Length", with the gates of Yang et al. 2024,
"Gated Delta Networks", solved for errors instead of writes. Without gates every G is 1. Logs of G
are sums of log gates and never differences of sums, so G is at most 1 and exact to rounding.

The clip certificate is free: |e_t||k_t| > clip says that token t would have been clipped. Up to the
first clip both forms agree, so some clip in the chunked form is equivalent to some clip in the
recurrence, and a segment of chunks where one fires is redone by the recurrence (so a clip changes
earlier reads of its segment by rounding, and only by that). The backward pass starts from the
states before the segments and recomputes the rest.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.ops.delta_recurrence import Tokens, delta_rule_recurrent, dot, pad_tokens

CHUNK = 32  # tokens solved for at once
MATRICES = 8  # worked on at once, where there are fewer sequences and heads than that

_Pair = tuple[jax.Array, jax.Array]


class Plan(NamedTuple):
    """How a sequence is cut, and the clip."""

    segment: int  # tokens
    chunk: int  # tokens, 8 times a power of two
    clip: float | None


class Residuals(NamedTuple):
    """What the backward pass needs of the forward pass; segments in front."""

    tokens: Tokens
    states: jax.Array  # before each segment
    fired: jax.Array | None  # whether a clip fired in the segment; None without a clip


def delta_rule_chunked(
    tokens: Tokens, state_BHVK: jax.Array, clip: float | None = 10.0, chunk: int = CHUNK
) -> _Pair:
    """The same function as `delta_rule_recurrent`, in float32.

    Args:
      tokens, state_BHVK, clip: as there.
      chunk: tokens solved for at once, 8 times a power of two.

    Returns:
      The reads o_BNHV and the final state_BHVK.
    """
    N = tokens.k.shape[1]
    plan, tokens = cut(tokens, clip, chunk)
    o_BNHV, state_BHVK = _chunked(plan, tokens, state_BHVK)
    return o_BNHV[:, :N], state_BHVK


def cut(tokens: Tokens, clip: float | None, chunk: int = CHUNK) -> tuple[Plan, Tokens]:
    """Segments of equal lengths, and the tokens padded to whole ones.

    A segment is one chunk if there are enough sequences and heads to keep a device busy. Working
    on more at once only leaves the caches, and where a clip fires more is redone.
    """
    B, N, H, _ = tokens.k.shape
    at_once = max(1, MATRICES // (B * H))
    segments = math.ceil(N / (at_once * chunk))
    plan = Plan(chunk * math.ceil(N / (segments * chunk)), chunk, clip)
    return plan, jax.tree.map(lambda x: pad_tokens(x, segments * plan.segment), tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan: Plan, tokens: Tokens, state_BHVK: jax.Array) -> _Pair:
    return forward(plan, tokens, state_BHVK)[0]


def forward(plan: Plan, tokens: Tokens, state_BHVK: jax.Array) -> tuple[_Pair, Residuals]:
    """The reads and the final state of whole segments of tokens, and what `backward` needs."""

    def segment(carry: _Pair, start: jax.Array) -> tuple[_Pair, Any]:
        state_BHVK, o_BNHV = carry
        results, fired = _segment(plan, _slice(plan, tokens, start), state_BHVK)
        return (results[1], _write(o_BNHV, results[0], start)), (state_BHVK, fired)

    # Slices are written in place; scanned inputs and outputs would all be copied once more.
    (state_BHVK, o_BNHV), saved = jax.lax.scan(
        segment, (state_BHVK, jnp.zeros_like(tokens.v)), _starts(plan, tokens)
    )
    return (o_BNHV, state_BHVK), Residuals(tokens, *saved)


def backward(plan: Plan, residuals: Residuals, cotangents: _Pair) -> tuple[Tokens, jax.Array]:
    """The cotangents of the tokens and of the first state from those of `forward`'s results."""
    do_BNHV, dstate_BHVK = cotangents
    tokens, states, fired = residuals

    def segment(carry: Any, at: Any) -> tuple[Any, None]:
        dstate_BHVK, dtokens = carry
        start, state_BHVK, fired = at
        part, do_part = _slice(plan, (tokens, do_BNHV), start)
        dpart, dstate_BHVK = _segment_backward(
            plan, part, state_BHVK, fired, (do_part, dstate_BHVK)
        )
        dtokens = jax.tree.map(lambda all_, part: _write(all_, part, start), dtokens, dpart)
        return (dstate_BHVK, dtokens), None

    carry = dstate_BHVK, jax.tree.map(jnp.zeros_like, tokens)
    at = _starts(plan, tokens), states, fired
    (dstate_BHVK, dtokens), _ = jax.lax.scan(segment, carry, at, reverse=True)
    return dtokens, dstate_BHVK


_chunked.defvjp(forward, backward)


def _starts(plan: Plan, tokens: Tokens) -> jax.Array:
    return jnp.arange(0, tokens.k.shape[1], plan.segment)


def _slice(plan: Plan, tree: Any, start: jax.Array) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, start, plan.segment, axis=1), tree
    )


def _write(x_BNH: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BNH, part, start, axis=1)


# ---- one segment


def _segment(plan: Plan, tokens: Tokens, state_BHVK: jax.Array) -> tuple[_Pair, jax.Array | None]:
    """The results and whether a clip fired, in which case they are those of the recurrence."""
    q, k, _, beta, _ = parts = jax.tree.map(lambda x: _split(x, plan.chunk), tokens)
    decays, _, _, states, e, state = _solve(parts, state_BHVK)
    attention = jnp.tril(dot(q, k.mT) * decays.between)
    o = decays.since * dot(q, states.mT) + dot(attention, beta[..., None] * e)
    results = _join(o), state
    if plan.clip is None:
        return results, None
    size2_BGHT = jnp.sum(e**2, -1) * jnp.sum(k**2, -1)
    # Not `any(>)`: without its clips a segment may have overflowed to NaN.
    fired = ~jnp.all(size2_BGHT <= plan.clip**2)
    by_recurrence = functools.partial(delta_rule_recurrent, clip=plan.clip)
    return jax.lax.cond(fired, by_recurrence, lambda *_: results, tokens, state_BHVK), fired


def _segment_backward(
    plan: Plan,
    tokens: Tokens,
    state_BHVK: jax.Array,
    fired: jax.Array | None,
    cotangents: _Pair,
) -> tuple[Tokens, jax.Array]:
    def by_recurrence() -> tuple[Tokens, jax.Array]:
        recurrence = functools.partial(delta_rule_recurrent, clip=plan.clip)
        return jax.vjp(recurrence, tokens, state_BHVK)[1](cotangents)

    def by_chunks() -> tuple[Tokens, jax.Array]:
        do_BNHV, dstate_BHVK = cotangents
        parts, do = jax.tree.map(lambda x: _split(x, plan.chunk), (tokens, do_BNHV))
        dparts, dstate_BHVK = _chunks_backward(parts, state_BHVK, do, dstate_BHVK)
        return jax.tree.map(_join, dparts), dstate_BHVK

    # A branch here too: zero cotangents through chunk maths that overflowed would be NaN.
    return by_chunks() if fired is None else jax.lax.cond(fired, by_recurrence, by_chunks)


# ---- chunks; the tokens are [B, G, H, T, ...] here


class _Decays(NamedTuple):
    """Products of gates, or sums of their logs."""

    between: jax.Array  # [B, G, H, T, T], G(s, t) in row t and column s < t
    since: jax.Array  # [B, G, H, T, 1], a
    until: jax.Array  # [B, G, H, T, 1], z
    whole: jax.Array  # [B, G, H, 1, 1], G(0, T)


class _Solved(NamedTuple):
    decays: _Decays
    lower: jax.Array  # L
    inverse: jax.Array  # (I + L diag(beta))^-1
    states: jax.Array  # [B, G, H, V, K] before the chunks
    e: jax.Array
    state: jax.Array  # after the last chunk


def _solve(tokens: Tokens, state_BHVK: jax.Array) -> _Solved:
    """The errors of all tokens of the chunks, unclipped, and the states that they leave."""
    _, k, v, beta, _ = tokens
    decays = _decays(tokens)
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
    tokens: Tokens, state_BHVK: jax.Array, do: jax.Array, dstate_BHVK: jax.Array
) -> tuple[Tokens, jax.Array]:
    """The cotangents of the tokens and of the state before them, with dx for that of x.

    With P the inverse and r = v - a k S^T, so that e = P r, and with S' the state that a chunk
    leaves, from the last chunk to the first:

        du = A^T do + z k dS'^T,    dr = P^T (beta du),
        dS = G(0, T) dS' + (a do)^T q - (a dr)^T k.

    The rest needs no order: by e = r - L u, dL = -tril(dr u^T, -1) and dbeta = e . (du - L^T dr),
    and the product rule gives the others.
    """
    q, k, _, beta, log_gate = tokens
    beta = beta[..., None]
    decays, lower, inverse, states, e, _ = _solve(tokens, state_BHVK)
    attention = jnp.tril(dot(q, k.mT) * decays.between)

    def unwrite(dstate: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
        inverse, k, beta, (_, since, until, whole), du, dstate_read = chunk
        du += until * dot(k, dstate.mT)
        dr = dot(inverse.mT, beta * du)
        return whole * dstate + dstate_read - dot((since * dr).mT, k), (dstate, du, dr)

    u, do_state = beta * e, decays.since * do
    chunks = inverse, k, beta, decays, dot(attention.mT, do), dot(do_state.mT, q)
    dstate_BHVK, (dstates, du, dr) = _scan_chunks(unwrite, dstate_BHVK, chunks, reverse=True)

    # By way of S, of A and of L.
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
    return Tokens(dq, dk, dr, dbeta, dlog_gate), dstate_BHVK


def _decays(tokens: Tokens) -> _Decays:
    if tokens.log_gate is None:
        return _Decays(*4 * [jnp.ones((1, tokens.k.shape[1], 1, 1, 1))])
    return jax.tree.map(jnp.exp, _log_decays(tokens.log_gate))


def _log_decays(log_gate_BGHT: jax.Array) -> _Decays:
    T = log_gate_BGHT.shape[-1]
    rows = jnp.broadcast_to(log_gate_BGHT[..., None], (*log_gate_BGHT.shape, T))
    between = jnp.cumsum(jnp.tril(rows, -1), -2)
    since = jnp.cumsum(log_gate_BGHT, -1)[..., None]
    return _Decays(between, since, between[..., -1, :, None], since[..., -1:, :])


def _unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I + lower)^-1 for strictly lower triangular matrices [..., T, T], T = 8 * 2^j.

    Halves by [[P, 0], [C, Q]]^-1 = [[P^-1, 0], [-Q^-1 C P^-1, Q^-1]], down to blocks of 4, whose
    inverse is (I - L)(I + L^2), exact as L^4 = 0. For repeated keys the powers that larger blocks
    need grow like binomial coefficients and cancel: blocks of 8 lose a digit, chunks all of them.

    Raises:
      ValueError: T is not 8 * 2^j.
    """
    size = lower.shape[-1]
    if size == 8:  # both halves in one matrix, as CPUs are slow at products of 4 x 4
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
