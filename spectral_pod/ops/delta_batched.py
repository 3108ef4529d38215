"""The delta rule by matrix products over all chunks of a sequence at once, with exact clipping.

For accelerators, where many small operations cost more to start than to compute.
The algebra is that of `delta_algebra.py`. With P the inverse, which depends on no state,

    [e0, W] = P [v, a k],    e = e0 - W S^T,
    S <- S M + b,    M = G(0, T) I - (z rho W)^T k,    b = (z rho e0)^T k,

so only S <- S M + b is in the order of chunks, one small product each.

The rates of writes that a clip shortens, rho_t = beta_t c_t with c_t = min(1, clip / |e_t||k_t|),
depend on the errors, and these on the rates of earlier tokens only. So solving with some rates, and
taking new ones from the errors, ends in the exact solution: every round settles one more token at
least. In practice few rounds suffice for thousands of tokens, and one if no write is clipped. Where
`ROUNDS` do not, the recurrence computes the result. The gradient is that (docs/math.md, 5.4)
of the solution, whatever the rounds that led to it.

The backward pass stores P, the errors, the factors and the states before the chunks, about as much
as q, k and v, and recomputes products with L, A, W and M. Arrays have the axes [G, B, H, T, ...].
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.ops import delta_algebra
from spectral_pod.ops.delta_algebra import Decays, Solved, join, split, unit_lower_inverse
from spectral_pod.ops.delta_recurrence import (
    DeltaInputs,
    DeltaResult,
    delta_rule_recurrent,
    dot,
    pad_tokens,
    recurrent_cotangents,
)
from spectral_pod.parallel.sharding import vary_like

CHUNK = 64  # tokens of one triangular solve
ROUNDS = 16  # solves, of which raw keys need up to 15 where they converge; then the recurrence
TOLERANCE = 1e-6  # of a factor, relative to it

_Pair = tuple[jax.Array, jax.Array]


class Plan(NamedTuple):
    """The length of chunks, and the clip."""

    chunk: int  # tokens, 8 times a power of two
    clip: float | None


class Residuals(NamedTuple):
    """What the backward pass needs of the forward pass."""

    inputs: DeltaInputs  # [B, N, H, ...]
    factors: jax.Array  # c [G, B, H, T]
    inverse: jax.Array  # P
    states: jax.Array  # [G, B, H, V, K], before each chunk
    e: jax.Array
    clipped: jax.Array | None  # [G, B, H, T], whether a write was clipped; None without a clip
    unsolved: jax.Array | None  # whether the recurrence computed the result: then all are clipped


def delta_rule_batched(
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
    result = _batched(plan, inputs, state_BHVK)
    return result._replace(o_BNHV=result.o_BNHV[:, :N])


def cut(inputs: DeltaInputs, clip: float | None, chunk: int = CHUNK) -> tuple[Plan, DeltaInputs]:
    """The plan, and the inputs padded to whole chunks."""
    length = chunk * math.ceil(inputs.k.shape[1] / chunk)
    return Plan(chunk, clip), jax.tree.map(lambda x: pad_tokens(x, length), inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batched(plan: Plan, inputs: DeltaInputs, state_BHVK: jax.Array) -> DeltaResult:
    return forward(plan, inputs, state_BHVK)[0]


def forward(
    plan: Plan, inputs: DeltaInputs, state_BHVK: jax.Array
) -> tuple[DeltaResult, Residuals]:
    """The result for whole chunks, and the residuals for `backward`."""
    parts = jax.tree.map(lambda x: _split(x, plan.chunk), inputs)
    decays = delta_algebra.gate_products(parts)
    trial, unsolved = _solve(plan, parts, decays, state_BHVK)
    factors, inverse, states, e, last_BHVK = trial
    rate = (parts.beta * factors)[..., None]
    o = delta_algebra.outputs(parts, decays, states, rate, e)
    if unsolved is None or plan.clip is None:
        result = DeltaResult(_join(o), last_BHVK, jnp.zeros_like(factors[0, ..., 0]))
        return result, Residuals(inputs, factors, inverse, states, e, None, None)
    clipped = ~(_size2(e, parts.k) <= plan.clip**2) | unsolved
    result = DeltaResult(_join(o), last_BHVK, jnp.sum(clipped, (0, -1), factors.dtype))
    by_recurrence = functools.partial(delta_rule_recurrent, clip=plan.clip)
    result = jax.lax.cond(unsolved, by_recurrence, lambda *_: result, inputs, state_BHVK)
    return result, Residuals(inputs, factors, inverse, states, e, clipped, unsolved)


def backward(
    plan: Plan, residuals: Residuals, cotangents: DeltaResult
) -> tuple[DeltaInputs, jax.Array]:
    """The cotangents of the inputs and the initial state, given those of `forward`'s result."""
    do_BNHV, dstate_BHVK, _ = cotangents
    inputs, unsolved = residuals.inputs, residuals.unsolved

    def by_recurrence() -> tuple[DeltaInputs, jax.Array]:
        state_BHVK = residuals.states[0]
        return recurrent_cotangents(inputs, state_BHVK, plan.clip, (do_BNHV, dstate_BHVK))

    def by_chunks() -> tuple[DeltaInputs, jax.Array]:
        parts, do = jax.tree.map(lambda x: _split(x, plan.chunk), (inputs, do_BNHV))
        dparts, dfirst_BHVK = _chunks_backward(parts, residuals, do, dstate_BHVK)
        return jax.tree.map(_join, dparts), dfirst_BHVK

    return by_chunks() if unsolved is None else jax.lax.cond(unsolved, by_recurrence, by_chunks)


_batched.defvjp(forward, backward)


def affine_map(plan: Plan, inputs: DeltaInputs) -> _Pair:
    """M_BHKK and b_BHVK of all chunks together, S -> S M + b, as if there were no clip."""
    parts = jax.tree.map(lambda x: _split(x, plan.chunk), inputs)
    decays, beta = delta_algebra.gate_products(parts), parts.beta[..., None]
    maps = _chunk_maps(parts, decays, delta_algebra.key_products(parts, decays), beta)
    _, _, _, M, b = maps
    _, B, H, V, K = b.shape
    # Rows of a state evolve independently: those of zero give b, those of the identity M.
    first = vary_like(jnp.broadcast_to(jnp.eye(V + K, K, -V, b.dtype), (B, H, V + K, K)), b)
    offsets = jnp.pad(b, [(0, 0)] * 3 + [(0, K), (0, 0)])
    last, _ = _states(M, offsets, first)
    return last[..., V:, :], last[..., :V, :]


# ---- forward


class _ChunkMaps(NamedTuple):
    """What given rates make of the states before chunks."""

    inverse: jax.Array  # P
    e0: jax.Array  # [G, B, H, T, V]
    W: jax.Array  # [G, B, H, T, K]
    M: jax.Array  # [G, B, H, K, K]
    b: jax.Array  # [G, B, H, V, K]


class _Trial(NamedTuple):
    """The solution for given factors."""

    factors: jax.Array  # [G, B, H, T]
    inverse: jax.Array
    states: jax.Array
    e: jax.Array
    last_BHVK: jax.Array  # the state after the last chunk


def _chunk_maps(
    inputs: DeltaInputs, decays: Decays, lower: jax.Array, rate: jax.Array
) -> _ChunkMaps:
    """The affine maps of chunks, for rates [G, B, H, T, 1]."""
    k, v, V = inputs.k, inputs.v, inputs.v.shape[-1]
    inverse = unit_lower_inverse(lower * rate.mT)
    x = dot(inverse, jnp.concatenate([v, decays.since * k], -1))
    y = dot((decays.until * rate * x).mT, k)
    M = decays.whole * _eye(k) - y[..., V:, :]
    return _ChunkMaps(inverse, x[..., :V], x[..., V:], M, y[..., :V, :])


def _states(
    factors: jax.Array, offsets: jax.Array, state: jax.Array, reverse: bool = False
) -> _Pair:
    """The last of the states x <- x factor + offset, and those before each chunk."""

    def step(state: jax.Array, chunk: _Pair) -> _Pair:
        factor, offset = chunk
        return dot(state, factor) + offset, state

    return jax.lax.scan(step, state, (factors, offsets), reverse=reverse)


def _solve(
    plan: Plan, inputs: DeltaInputs, decays: Decays, state_BHVK: jax.Array
) -> tuple[_Trial, jax.Array | None]:
    """The errors and states, and whether the factors of the clip have not been found."""
    k, clip = inputs.k, plan.clip
    lower = delta_algebra.key_products(inputs, decays)

    def solve(factors: jax.Array) -> _Trial:
        maps = _chunk_maps(inputs, decays, lower, (inputs.beta * factors)[..., None])
        last_BHVK, states = _states(maps.M, maps.b, state_BHVK)
        e = maps.e0 - dot(maps.W, states.mT)
        return _Trial(factors, maps.inverse, states, e, last_BHVK)

    factors = jnp.ones_like(inputs.beta)
    if clip is None:
        return solve(factors), None

    def unfinished(carry: Any) -> jax.Array:
        _, unsolved, count, _ = carry
        return unsolved & (count < ROUNDS)

    def next_round(carry: Any) -> Any:
        factors, _, count, _ = carry
        trial = solve(factors)
        new = clip / jnp.sqrt(jnp.maximum(_size2(trial.e, k), clip**2))
        # Not `any(>)`: with factors that are too large, the states may have overflowed to NaN.
        # Writing nothing where they did leads on.
        unsolved = ~jnp.all(jnp.abs(new - factors) <= TOLERANCE * new)
        return jnp.where(jnp.isnan(new), 0.0, new), unsolved, count + 1, trial

    def initial(x: Any) -> jax.Array:
        return vary_like(jnp.zeros(x.shape, x.dtype), k)

    unsolved, count = vary_like(jnp.ones((), bool), k), vary_like(jnp.zeros((), jnp.int32), k)
    # Not a first solve before the loop: it would be a second copy of the program.
    carry = factors, unsolved, count, jax.tree.map(initial, jax.eval_shape(solve, factors))
    _, unsolved, _, trial = jax.lax.while_loop(unfinished, next_round, carry)
    return trial, unsolved


def _size2(e: jax.Array, k: jax.Array) -> jax.Array:
    """(|e||k|)^2 of each token."""
    return jnp.sum(e**2, -1) * jnp.sum(k**2, -1)


# ---- backward


def _chunks_backward(
    inputs: DeltaInputs, residuals: Residuals, do: jax.Array, dstate_BHVK: jax.Array
) -> tuple[DeltaInputs, jax.Array]:
    """The cotangents of the inputs and of the initial state, writing dx for that of x.

    With S' the state after a chunk, and without clipped writes, from the last chunk to the first:

        dS = dS' M^T + (a do)^T q - (A^T do)^T rho W,
        du = A^T do + z k dS'^T,    dr = P^T (rho du).

    A clipped write is as long as the clip allows, so the component y . e/|e| of its cotangent
    y = du - L^T dr changes nothing. `_clipped_states` finds these components phi; they are removed
    from du in the formula of dr, and add phi e/|e| to A^T do in that of dS.
    """
    _, factors, inverse, states, e, clipped, _ = residuals
    k, rate = inputs.k, (inputs.beta * factors)[..., None]
    decays = delta_algebra.gate_products(inputs)
    solved = Solved(decays, delta_algebra.key_products(inputs, decays), inverse, states, e)
    reads = delta_algebra.read_cotangents(inputs, decays, do)
    rate_W = rate * dot(inverse, decays.since * k)
    M_transposed = decays.whole * _eye(k) - dot(k.mT, decays.until * rate_W)
    offsets = reads.dstate - dot(reads.du.mT, rate_W)
    plain = functools.partial(_states, M_transposed, offsets, dstate_BHVK, reverse=True)
    if clipped is None:
        (dstate_BHVK, dstates), along_e = plain(), jnp.zeros((), e.dtype)
    else:
        unit_e = jnp.where(clipped[..., None], e / _norm(e), 0.0)

        def with_clips() -> tuple[_Pair, jax.Array]:
            M_and_W = jnp.concatenate([M_transposed, rate_W], -2)
            du_of = reads.du, decays.until * k
            return _clipped_states(solved, rate, unit_e, du_of, M_and_W, offsets, dstate_BHVK)

        (dstate_BHVK, dstates), along_e = jax.lax.cond(
            jnp.any(clipped), with_clips, lambda: (plain(), jnp.zeros_like(e))
        )
    du = reads.du + decays.until * dot(k, dstates.mT)
    dr = dot(inverse.mT, rate * (du - along_e))
    dinputs = delta_algebra.input_cotangents(inputs, solved, reads, rate * e, du, dr, dstates)
    if clipped is not None:
        # The factor clip / |e||k| in the rate: |e| is accounted for, |k| is not.
        scale = jnp.where(clipped, rate[..., 0] * dinputs.beta / jnp.sum(k**2, -1), 0.0)
        dinputs = dinputs._replace(k=dinputs.k - scale[..., None] * k, beta=factors * dinputs.beta)
    return dinputs, dstate_BHVK


def _clipped_states(
    solved: Solved,
    rate: jax.Array,
    unit_e: jax.Array,
    du: _Pair,
    M_and_W: jax.Array,
    offsets: jax.Array,
    dstate_BHVK: jax.Array,
) -> tuple[_Pair, jax.Array]:
    """The states' cotangents as `_states` returns them, and phi e/|e|, with clipped writes.

    Let F = L^T P^T rho. Then y = (I - F) du + F phi e/|e|, and so, with X = F * (e/|e|) (e/|e|)^T,

        phi = (I - X)^-1 (e/|e| . (I - F) du).

    Args:
      solved, rate, offsets, dstate_BHVK: as in `_chunks_backward`.
      unit_e: e/|e| of clipped writes, zero for others.
      du: x and y, of which x + y dS'^T is du.
      M_and_W: [G, B, H, K + T, K], M^T above rho W.
    """
    F = dot(solved.lower.mT, solved.inverse.mT * rate.mT)
    X = F * dot(unit_e, unit_e.mT)
    inverse = unit_lower_inverse(-X.mT).mT
    x, y = (z - dot(F, z) for z in du)

    def step(dstate: jax.Array, chunk: Any) -> tuple[jax.Array, _Pair]:
        M_and_W, offset, phi, y, unit_e, inverse = chunk
        phi += dot(inverse, jnp.sum(unit_e * dot(y, dstate.mT), -1, keepdims=True))
        along = phi * unit_e
        return dot(jnp.concatenate([dstate, along.mT], -1), M_and_W) + offset, (dstate, along)

    phi = dot(inverse, jnp.sum(unit_e * x, -1, keepdims=True))
    chunks = M_and_W, offsets, phi, y, unit_e, inverse
    dstate_BHVK, (dstates, along) = jax.lax.scan(step, dstate_BHVK, chunks, reverse=True)
    return (dstate_BHVK, dstates), along


def _eye(k: jax.Array) -> jax.Array:
    """The identity [1, 1, 1, K, K] of the keys."""
    return jnp.eye(k.shape[-1], dtype=k.dtype)[None, None, None]


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x**2, -1, keepdims=True))


def _split(x_BNH: jax.Array, chunk: int) -> jax.Array:
    """[B, N, H, ...] -> [G, B, H, T, ...]."""
    return jnp.moveaxis(split(x_BNH, chunk), 1, 0)


def _join(x_GBHT: jax.Array) -> jax.Array:
    """[G, B, H, T, ...] -> [B, N, H, ...]."""
    return join(jnp.moveaxis(x_GBHT, 0, 1))
