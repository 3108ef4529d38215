"""The delta rule by matrix products over chunks of tokens, a segment of chunks at a time.

The algebra is that of `delta_algebra.py`, with the rates beta, as if there were no clip. Detecting
clips is free: |e_t||k_t| > clip means that the write of token t would have been clipped. Up to the
first clipped write both forms agree, so the chunked form detects a clip if and only if the
recurrence clips. A segment of chunks with a clipped write is recomputed by the recurrence, so
a clip changes earlier outputs of its segment by rounding only. The backward pass starts from the
stored states before the segments and recomputes everything else.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.ops import delta_algebra
from spectral_pod.ops.delta_algebra import Solved, join, split, unit_lower_inverse
from spectral_pod.ops.delta_recurrence import (
    DeltaInputs,
    DeltaResult,
    delta_rule_recurrent,
    dot,
    pad_tokens,
    recurrent_cotangents,
)
from spectral_pod.parallel.sharding import vary_like

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


def affine_map(plan: Plan, inputs: DeltaInputs) -> _Pair:
    """M_BHKK and b_BHVK of all chunks together, S -> S M + b, as if there were no clip.

    Rows of a state evolve independently: one run with values [v, 0] and initial state [0; I] gives
    both.
    """
    B, _, H, K = inputs.k.shape
    V = inputs.v.shape[-1]
    below_BHUK = jnp.broadcast_to(jnp.eye(V + K, K, -V, jnp.float32), (B, H, V + K, K))
    padded = inputs._replace(v=jnp.pad(inputs.v, [(0, 0)] * 3 + [(0, K)]))
    plan = plan._replace(clip=None)
    (_, state_BHUK, _), _ = forward(plan, padded, vary_like(below_BHUK, inputs.k))
    return state_BHUK[..., V:, :], state_BHUK[..., :V, :]


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
    parts = jax.tree.map(lambda x: split(x, plan.chunk), inputs)
    solved, state = _solve(parts, state_BHVK)
    e, beta = solved.e, parts.beta
    o = delta_algebra.outputs(parts, solved.decays, solved.states, beta[..., None], e)
    result = DeltaResult(join(o), state, jnp.zeros_like(beta[:, 0, :, 0]))
    if plan.clip is None:
        return result, None
    size2_BGHT = jnp.sum(e**2, -1) * jnp.sum(parts.k**2, -1)
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
        return recurrent_cotangents(inputs, state_BHVK, plan.clip, cotangents)

    def by_chunks() -> tuple[DeltaInputs, jax.Array]:
        do_BNHV, dstate_BHVK = cotangents
        parts, do = jax.tree.map(lambda x: split(x, plan.chunk), (inputs, do_BNHV))
        dparts, dstate_BHVK = _chunks_backward(parts, state_BHVK, do, dstate_BHVK)
        return jax.tree.map(join, dparts), dstate_BHVK

    # The backward pass branches too: zero cotangents of an overflowed chunk would become NaN.
    return by_chunks() if clipped is None else jax.lax.cond(clipped, by_recurrence, by_chunks)


# ---- chunks; inputs are [B, G, H, T, ...] here


def _solve(inputs: DeltaInputs, state_BHVK: jax.Array) -> tuple[Solved, jax.Array]:
    """The errors of all tokens without clipping, and the state after the last chunk."""
    _, k, v, beta, _ = inputs
    decays = delta_algebra.gate_products(inputs)
    lower = delta_algebra.key_products(inputs, decays)
    inverse = unit_lower_inverse(lower * beta[..., None, :])

    def write(state: jax.Array, chunk: Any) -> tuple[jax.Array, _Pair]:
        inverse, k, v, beta, (_, since, until, whole) = chunk
        e = dot(inverse, v - since * dot(k, state.mT))
        return whole * state + dot((until * beta * e).mT, k), (state, e)

    chunks = inverse, k, v, beta[..., None], decays
    state_BHVK, (states, e) = _scan_chunks(write, state_BHVK, chunks)
    return Solved(decays, lower, inverse, states, e), state_BHVK


def _chunks_backward(
    inputs: DeltaInputs, state_BHVK: jax.Array, do: jax.Array, dstate_BHVK: jax.Array
) -> tuple[DeltaInputs, jax.Array]:
    """The cotangents of the inputs and of the initial state, writing dx for that of x.

    With P the inverse and r = v - a k S^T, so that e = P r, and with S' the state after a chunk,
    from the last chunk to the first:

        du = A^T do + z k dS'^T,    dr = P^T (beta du),
        dS = G(0, T) dS' + (a do)^T q - (a dr)^T k.

    The rest is independent of order.
    """
    solved, _ = _solve(inputs, state_BHVK)
    decays, beta = solved.decays, inputs.beta[..., None]
    reads = delta_algebra.read_cotangents(inputs, decays, do)

    def unwrite(dstate: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
        inverse, k, beta, (_, since, until, whole), du, dstate_read = chunk
        du += until * dot(k, dstate.mT)
        dr = dot(inverse.mT, beta * du)
        return whole * dstate + dstate_read - dot((since * dr).mT, k), (dstate, du, dr)

    u = beta * solved.e
    chunks = solved.inverse, inputs.k, beta, decays, reads.du, reads.dstate
    dstate_BHVK, (dstates, du, dr) = _scan_chunks(unwrite, dstate_BHVK, chunks, reverse=True)
    dinputs = delta_algebra.input_cotangents(inputs, solved, reads, u, du, dr, dstates)
    return dinputs, dstate_BHVK


def _scan_chunks(
    f: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    state: jax.Array,
    chunks: Any,
    reverse: bool = False,
) -> tuple[jax.Array, Any]:
    """`jax.lax.scan` over axis G of `chunks`, which the results have, too."""
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunks)
    state, found = jax.lax.scan(f, state, chunks, reverse=reverse)
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
