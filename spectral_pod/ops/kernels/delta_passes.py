"""What the kernels of the delta rule do with a chunk (`delta.py`), forward and backward.

The names of matrices are those of docs/math.md, 4. The tiles of a grid cell take turns: see
`head_tiles.interleave`. Letters here: X = 128 lanes, of a tile. The others are in `shapes.py`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spectral_pod.ops.kernels import head_tiles
from spectral_pod.ops.kernels.head_tiles import Steps

_X = head_tiles.LANES

# Rows of `scalars`. Logs of a are sums of two terms, and only the second has a cotangent.
BETA, LOG, REMAINDER = range(3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a call."""

    tokens: int  # of a chunk, T
    tiles: int  # of one sequence in a grid cell, X lanes each
    sequences: int  # of a grid cell
    clip: float | None
    gated: bool
    interpret: bool


class _Decays(NamedTuple):
    """Products of gates, or numbers 1 without gates."""

    between: Any  # [T, X], G(s, t) in row t and column s
    since: Any  # [T, X], a in all columns of a head
    until: Any  # [T, X], z
    since_row: Any  # [1, X], a at the columns of the tokens
    until_row: Any  # [1, X], z
    whole: Any  # [1, X], gamma in all columns of a head


class _Forward(NamedTuple):
    """Memory of the forward kernel: blocks of its arguments and results, and its own."""

    q: Any
    k: Any
    v: Any
    scalars: Any
    first: Any  # state
    o: Any
    e: Any
    inverse: Any
    states: Any  # before each chunk
    state: Any
    clipped: Any
    errors: Any  # per tile, of a chunk with clipped writes
    lower: Any
    rates: Any
    sizes: Any


class _Solvable(NamedTuple):
    """What the errors of a chunk follow from, and then its reads."""

    decays: _Decays
    keys: jax.Array  # K K^T
    lower: jax.Array  # L
    residual: jax.Array  # R
    attention: jax.Array  # A
    read: jax.Array  # a Q S^T


def forward(*refs: Any, plan: Plan) -> None:
    ref, clip, fits = _Forward(*refs), plan.clip, []

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        ref.state[...] = ref.first[...]
        ref.clipped[...] = jnp.zeros(ref.clipped.shape, jnp.float32)

    ref.states[...] = ref.state[...]

    def compute(at: Any) -> Steps:
        chunk = yield from _solvable(ref, at, plan)
        beta = _scalars(ref.scalars, at)[BETA]
        inverse = yield from head_tiles.inverse(chunk.lower * beta)
        e = yield from head_tiles.product(inverse, chunk.residual, terms=3)
        ref.inverse[at] = inverse
        yield from _write(ref, at, chunk, e, beta)
        if clip is not None:
            fits.append(_fits(e, chunk.keys, clip))

    head_tiles.interleave(map(compute, _tiles(plan)))
    if clip is not None:
        pl.when(~jnp.all(functools.reduce(jnp.logical_and, fits)))(
            lambda: _forward_clipped(ref, plan)
        )


def _forward_clipped(ref: _Forward, plan: Plan) -> None:
    """Computes the chunk again, with clips: each token's write is taken off the later errors."""
    for i, at in enumerate(_tiles(plan)):
        (chunk,) = head_tiles.interleave([_solvable(ref, at, plan)])
        ref.errors[i], ref.lower[i] = chunk.residual, chunk.lower
        ref.rates[i] = head_tiles.column(_scalars(ref.scalars, at)[BETA], plan.tokens)
        ref.sizes[i] = _squared(ref.k[at], plan)

    def token(t: jax.Array, carry: None) -> None:
        row = pl.ds(t, 1)
        for i in range(len(_tiles(plan))):
            e = ref.errors[i, row]
            factor, _ = _clipped(_squared(e, plan) * ref.sizes[i, row], plan)
            update = ref.rates[i, row] * factor * e
            ref.errors[i] -= head_tiles.column_at(ref.lower[i], t) * update

    jax.lax.fori_loop(0, plan.tokens, token, None)
    for i, at in enumerate(_tiles(plan)):
        e = ref.errors[i]
        factor, clipped = _clipped(_squared(e, plan) * ref.sizes[i], plan)
        ref.clipped[at] += jnp.sum(clipped.astype(jnp.float32), 0, keepdims=True)
        (chunk,) = head_tiles.interleave([_solvable(ref, at, plan)])
        rate = head_tiles.diagonal(ref.rates[i] * factor)
        head_tiles.interleave([_write(ref, at, chunk, e, rate)])


def _solvable(ref: _Forward, at: Any, plan: Plan) -> Steps:
    T, q, k = plan.tokens, ref.q[at], ref.k[at]
    decays = _decays(_scalars(ref.scalars, at), plan)
    products = yield from head_tiles.product(jnp.concatenate([k, q]), k, transposed=True)
    lower = head_tiles.lower_triangle(products[:T] * decays.between, strict=True)
    attention = head_tiles.lower_triangle(products[T:] * decays.between)
    states = yield from head_tiles.product(jnp.concatenate([k, q]), ref.states[at])
    residual = ref.v[at] - decays.since * states[:T]
    return _Solvable(decays, products[:T], lower, residual, attention, decays.since * states[T:])


def _write(ref: _Forward, at: Any, chunk: _Solvable, e: jax.Array, rate: jax.Array) -> Steps:
    """The chunk's results; `rate` is the row of beta c."""
    T, decays = e.shape[0], chunk.decays
    writes = head_tiles.transposed(ref.k[at]) * (decays.until_row * rate)
    left = jnp.concatenate([chunk.attention * rate, writes])
    sums = yield from head_tiles.product(left, e, terms=3)
    ref.o[at] = chunk.read + sums[:T]
    ref.e[at] = e
    ref.state[at] = decays.whole * ref.states[at] + sums[T:]


class _Backward(NamedTuple):
    """Memory of the backward kernel."""

    q: Any
    k: Any
    scalars: Any
    e: Any
    inverse: Any
    states: Any
    do: Any
    last: Any  # cotangent of the last state
    dq: Any
    dk: Any
    dv: Any
    dscalars: Any
    dstate: Any  # of the state before the chunk, and here after it
    after: Any
    y: Any  # per tile, of a chunk with clipped writes
    upper: Any
    rates: Any
    hats: Any


class _Readable(NamedTuple):
    """What the cotangents of a chunk's residuals follow from."""

    decays: _Decays
    keys: jax.Array  # K K^T
    lower: jax.Array  # L
    attention: jax.Array  # A
    du: jax.Array
    dstate: jax.Array  # (a dO)^T Q, transposed


def backward(*refs: Any, plan: Plan) -> None:
    ref, clip, fits = _Backward(*refs), plan.clip, []

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        ref.dstate[...] = ref.last[...]

    ref.after[...] = ref.dstate[...]

    def compute(at: Any) -> Steps:
        beta = _scalars(ref.scalars, at)[BETA]
        chunk = yield from _readable(ref, at, plan)
        left = head_tiles.transposed(ref.inverse[at]) * beta
        dr = yield from head_tiles.product(left, chunk.du, terms=3)
        dbeta = yield from _pull_back(ref, at, chunk, dr, beta, plan)
        _put(ref.dscalars, at, BETA, dbeta)
        if clip is not None:
            fits.append(_fits(ref.e[at], chunk.keys, clip))

    head_tiles.interleave(map(compute, _tiles(plan)))
    if clip is not None:
        pl.when(~jnp.all(functools.reduce(jnp.logical_and, fits)))(
            lambda: _backward_clipped(ref, plan)
        )


def _backward_clipped(ref: _Backward, plan: Plan) -> None:
    """Computes the chunk again, with clips, by docs/math.md, 5.2: a clipped write does not
    depend on the length of e."""
    for i, at in enumerate(_tiles(plan)):
        (chunk,) = head_tiles.interleave([_readable(ref, at, plan)])
        e, size2 = ref.e[at], _squared(ref.e[at], plan)
        factor, clipped = _clipped(size2 * _squared(ref.k[at], plan), plan)
        ref.y[i], ref.upper[i] = chunk.du, head_tiles.transposed(chunk.lower)
        ref.rates[i] = head_tiles.column(_scalars(ref.scalars, at)[BETA], plan.tokens) * factor
        ref.hats[i] = jnp.where(clipped, e * jax.lax.rsqrt(jnp.where(clipped, size2, 1.0)), 0.0)

    def unwritten(y: jax.Array, rate: jax.Array, hat: jax.Array) -> jax.Array:
        return rate * (y - hat * head_tiles.head_sums(hat * y, plan.tokens))

    def token(n: jax.Array, carry: None) -> None:
        t = plan.tokens - 1 - n
        row = pl.ds(t, 1)
        for i in range(len(_tiles(plan))):
            dr = unwritten(ref.y[i, row], ref.rates[i, row], ref.hats[i, row])
            ref.y[i] -= head_tiles.column_at(ref.upper[i], t) * dr

    jax.lax.fori_loop(0, plan.tokens, token, None)
    for i, at in enumerate(_tiles(plan)):
        rate, e, k = ref.rates[i], ref.e[at], ref.k[at]
        dr = unwritten(ref.y[i], rate, ref.hats[i])
        (chunk,) = head_tiles.interleave([_readable(ref, at, plan)])
        pull_back = _pull_back(ref, at, chunk, dr, head_tiles.diagonal(rate), plan)
        (dgamma,) = head_tiles.interleave([pull_back])
        size2 = _squared(k, plan)
        factor, clipped = _clipped(_squared(e, plan) * size2, plan)
        _put(ref.dscalars, at, BETA, head_tiles.diagonal(factor) * dgamma)
        # The length of a clipped write is inverse to that of k.
        scale = rate * head_tiles.column(dgamma, plan.tokens) / jnp.where(clipped, size2, 1.0)
        ref.dk[at] -= jnp.where(clipped, scale, 0.0) * k


def _readable(ref: _Backward, at: Any, plan: Plan) -> Steps:
    T, q, k = plan.tokens, ref.q[at], ref.k[at]
    decays = _decays(_scalars(ref.scalars, at), plan)
    products = yield from head_tiles.product(jnp.concatenate([k, q]), k, transposed=True)
    lower = head_tiles.lower_triangle(products[:T] * decays.between, strict=True)
    attention = head_tiles.lower_triangle(products[T:] * decays.between)
    du = yield from head_tiles.product(k, ref.after[at], terms=3)
    read, reads = head_tiles.transposed(attention), head_tiles.transposed(q) * decays.since_row
    yield
    du = decays.until * du + (yield from head_tiles.product(read, ref.do[at], terms=3))
    dstate = yield from head_tiles.product(reads, ref.do[at])
    return _Readable(decays, products[:T], lower, attention, du, dstate)


def _pull_back(
    ref: _Backward, at: Any, chunk: _Readable, dr: jax.Array, rate: jax.Array, plan: Plan
) -> Steps:
    """Writes all cotangents but that of beta, and returns that of `rate`, which is a row."""
    T, decays, q, k = plan.tokens, chunk.decays, ref.q[at], ref.k[at]
    e, state, dstate = ref.e[at], ref.states[at], ref.after[at]
    both = jnp.concatenate([ref.do[at], dr])
    keys = head_tiles.transposed(k) * decays.since_row
    do_e = yield from head_tiles.product(ref.do[at], e, terms=3, transposed=True)
    dr_e = yield from head_tiles.product(dr, e, transposed=True)
    dattention = head_tiles.lower_triangle(do_e * rate)
    dlower = -head_tiles.lower_triangle(dr_e * rate, strict=True)
    dqk, dkk = dattention * decays.between, dlower * decays.between
    dstate_predicted = yield from head_tiles.product(keys, dr)
    ref.dstate[at] = decays.whole * dstate + chunk.dstate - dstate_predicted
    # e_t . (du - L^T dr)_t
    drate = head_tiles.row_sums(e * chunk.du, terms=2)
    drate -= jnp.sum(chunk.lower * dr_e, 0, keepdims=True)
    dkk, dkq = dkk + head_tiles.transposed(dkk), head_tiles.transposed(dqk)
    read = yield from head_tiles.product(both, state, transposed=True)
    dq_read, dk_read = decays.since * read[:T], -decays.since * read[T:]
    dk_write = yield from head_tiles.product(e, dstate, transposed=True)
    dk_write *= head_tiles.column(rate * decays.until_row, T)
    ref.dq[at] = dq_read + (yield from head_tiles.product(dqk, k, terms=3))
    dk = dk_read + dk_write + (yield from head_tiles.product(dkk, k))
    ref.dk[at] = dk + (yield from head_tiles.product(dkq, q))
    ref.dv[at] = dr
    if plan.gated:
        # Of log a: G, a and z are quotients, and gamma is that of the last token.
        dbetween = dattention * chunk.attention + dlower * chunk.lower
        by_token = dbetween + dq_read * q + dk_read * k - dk_write * k
        last = jnp.sum(dk_write * k + decays.whole * dstate * state, 0, keepdims=True)
        dlog = head_tiles.row_sums(by_token, terms=3) - jnp.sum(dbetween, 0, keepdims=True)
        is_last = head_tiles.column_index((1, _X), T) == T - 1
        dlog += jnp.where(is_last, head_tiles.head_sums(last, T), 0.0)
        _put(ref.dscalars, at, LOG, jnp.zeros_like(dlog))
        _put(ref.dscalars, at, REMAINDER, dlog)
    return drate


def _tiles(plan: Plan) -> list[Any]:
    """Where the tiles of a grid cell are."""
    return [
        (b, slice(None), slice(j * _X, (j + 1) * _X))
        for b in range(plan.sequences)
        for j in range(plan.tiles)
    ]


def _scalars(ref: Any, at: Any) -> list[jax.Array]:
    b, _, lanes = at
    return [ref[b, 0, i : i + 1, lanes] for i in range(ref.shape[2])]


def _put(ref: Any, at: Any, i: int, row: jax.Array) -> None:
    b, _, lanes = at
    ref[b, 0, i : i + 1, lanes] = row


def _decays(scalars: list[jax.Array], plan: Plan) -> _Decays:
    if not plan.gated:
        return _Decays(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    rows = scalars[LOG], scalars[REMAINDER]
    columns = [head_tiles.column(row, plan.tokens) for row in rows]
    last = [column[plan.tokens - 1 :] for column in columns]
    start = 0.0, 0.0

    def quotient(later: Sequence[Any], earlier: Sequence[Any]) -> jax.Array:
        log = (later[0] - earlier[0]) + (later[1] - earlier[1])
        return jnp.exp(jnp.minimum(log, 0.0))  # columns s > t of G are not used, but not infinite

    return _Decays(
        between=quotient(columns, rows),
        since=quotient(columns, start),
        until=quotient(last, columns),
        since_row=quotient(rows, start),
        until_row=quotient(last, rows),
        whole=quotient(last, start),
    )


def _fits(e: jax.Array, keys: jax.Array, clip: float) -> jax.Array:
    """Whether each token's write is certainly below the clip: |e|^2 is summed in bfloat16. False
    where it has overflowed."""
    size2 = head_tiles.row_sums(e * e, terms=1) * head_tiles.diagonal(keys)
    return size2 <= (1 - 2.0**-6) * clip**2


def _squared(x: jax.Array, plan: Plan) -> jax.Array:
    """The squared length of each row of each head, in all its columns."""
    return head_tiles.head_sums(x * x, plan.tokens)


def _clipped(size2: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The factors c of writes with these |e|^2 |k|^2, and whether they are below 1."""
    assert plan.clip is not None
    limit = plan.clip**2
    return plan.clip * jax.lax.rsqrt(jnp.maximum(size2, limit)), size2 > limit
