"""The delta rule in two kernels for TPUs, forward and backward; the state never leaves the chip.

The form is that of `delta_chunks.py`, and README.md has its derivation; here in one pass over the
chunks of a sequence, from the first to the last and back. HBM sees the inputs, the outputs, and what
the backward pass reads again: the errors E, the matrices P, and the state before every chunk.

A chunk has T tokens and a head T keys and T values, so that all matrices of a head are [T, T]. A
register has X = 128 lanes: for T = 64 the matrices of two heads lie side by side in it. In the right
operand of a product they become the blocks of a block-diagonal [X, X] matrix,

    [X1 | X2] diag(Y1, Y2) = [X1 Y1 | X2 Y2].

For T = 128 there is one head. The state is kept as its transpose, [K, V].

The matrix unit multiplies bfloat16 with float32 sums. A float32 factor is the sum of two such terms
with 17 bits, or of three, which are exact. Two are enough, in three products, except in P: a chunk
that repeats one key adds up the errors of 64 of its entries, so P is computed from three terms, in
six products.

A chunk is first computed as if no write was clipped. If an upper bound on |e||k| then exceeds the
clip, it is computed again, token by token: the recursion is exact whatever the keys are, and costs
its time only where writes are clipped.

Letters here: X lanes; R rows of any number. The others are in `shapes.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spectral_pod.ops.delta_recurrence import DeltaInputs, DeltaResult, pad_tokens
from spectral_pod.ops.kernels.cost import with_cost
from spectral_pod.parallel.sharding import platform

_X = 128  # lanes of a vector register
_BLOCK = 8  # its sublanes; tokens of the smallest triangular matrices that are inverted
_TILES = 8  # of a grid cell: their products fill each other's latencies

# Log gates are sums of multiples of this and a remainder, so that sums of the former are exact.
_GATE_STEP = 2.0**-10
_LOWEST_LOG_GATE = -128.0  # its exponential is zero

_BETA, _LOG, _REMAINDER = range(3)  # rows of what tokens have one number of


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of a call."""

    tokens: int  # of a chunk, T
    tiles: int  # of one sequence in a grid cell, X lanes each
    sequences: int  # of a grid cell
    clip: float | None
    gated: bool
    interpret: bool


def unserved(key_width: int, value_width: int) -> str | None:
    """Why the kernels cannot compute these sizes on the current mesh; None if they can."""
    if platform() != "tpu":
        return f"it is a kernel for TPUs, and this is a {platform()}"
    if max(key_width, value_width) > _X:
        return f"keys and values have at most {_X} entries, and not {key_width} and {value_width}"
    return None


def delta_rule(
    inputs: DeltaInputs, state_BHVK: jax.Array, clip: float | None, *, interpret: bool = False
) -> DeltaResult:
    """The same function as `delta_rule_recurrent`, in float32.

    Args:
      inputs, state_BHVK, clip: as in `delta_rule_recurrent`, float32; any sizes up to K, V = 128.
        Keys and values are padded to 64 or 128 entries, tokens to a multiple of that, and heads of
        up to 64 entries to an even number.
      interpret: runs the kernels as ordinary JAX operations, on any platform.

    Raises:
      ValueError: `unserved` gives a reason.
    """
    B, N, H, K = inputs.k.shape
    V = inputs.v.shape[-1]
    if not interpret and (reason := unserved(K, V)):
        raise ValueError(f"the delta rule cannot use method 'fused': {reason}")
    T = _X // 2 if max(K, V) <= _X // 2 else _X
    heads = H + -H % (_X // T)
    tiles = heads * T // _X
    in_cell = _largest_divisor(tiles, _TILES)
    plan = _Plan(
        T, in_cell, _largest_divisor(B, _TILES // in_cell), clip, inputs.log_gate is not None,
        interpret,
    )  # fmt: skip
    inputs = jax.tree.map(lambda x: pad_tokens(x, N + -N % T), inputs)

    def lanes(x_BNHK: jax.Array) -> jax.Array:
        pads = [(0, 0), (0, 0), (0, heads - H), (0, T - x_BNHK.shape[-1])]
        return jnp.pad(x_BNHK, pads).reshape(*x_BNHK.shape[:2], heads * T)

    def rows(x_BNH: jax.Array) -> jax.Array:
        x_BNH = jnp.pad(x_BNH, [(0, 0), (0, 0), (0, heads - H)])
        return x_BNH.reshape(B, -1, T, heads).swapaxes(2, 3).reshape(B, -1, heads * T)

    scalars = [rows(inputs.beta)]
    if inputs.log_gate is not None:
        log_gate_BNH = jnp.maximum(inputs.log_gate, _LOWEST_LOG_GATE)
        step_BNH = jax.lax.stop_gradient(jnp.round(log_gate_BNH / _GATE_STEP) * _GATE_STEP)
        for part_BNH in (step_BNH, log_gate_BNH - step_BNH):
            since = jnp.cumsum(part_BNH.reshape(B, -1, T, H), 2)
            scalars.append(rows(since.reshape(part_BNH.shape)))
    q, k, v = (lanes(x) for x in inputs[:3])
    state = lanes(jnp.moveaxis(state_BHVK, 3, 1))
    o, state, clipped = _delta(q, k, v, jnp.stack(scalars, 2), state, plan)

    def narrow(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, T)[:, :, :H, :V]

    state_BHVK = jnp.moveaxis(narrow(state)[:, :K], 1, 3)
    clipped_BH = clipped.reshape(B, heads, T)[:, :H, 0]
    return DeltaResult(narrow(o)[:, :N], state_BHVK, clipped_BH)


def _largest_divisor(n: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if n % d == 0)


_Triple = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _delta(
    q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, state: jax.Array, plan: _Plan
) -> _Triple:
    return _delta_forward(q, k, v, scalars, state, plan)[0]


def _delta_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, state: jax.Array, plan: _Plan
) -> tuple[_Triple, Any]:
    B, _, width = q.shape
    count = jax.ShapeDtypeStruct((B, 1, width), jnp.float32)
    o, e, inverse, states, state, clipped = _call(
        _forward, "delta_forward", plan, [q, k, v, scalars, state], [q, q, q, q], [state, count]
    )
    return (o, state, clipped), (q, k, scalars, e, inverse, states)


def _delta_backward(plan: _Plan, residuals: Any, cotangents: _Triple) -> tuple[jax.Array, ...]:
    do, dstate, _ = cotangents
    q, _, scalars, *_ = residuals
    inputs, outputs = [*residuals, do, dstate], [q, q, q, scalars]
    return tuple(_call(_backward, "delta_backward", plan, inputs, outputs, [dstate]))


_delta.defvjp(_delta_forward, _delta_backward)


# ---- the kernels


_Steps = Generator[None, None, Any]


def _interleave(programs: Iterable[_Steps]) -> list[Any]:
    """Runs programs in turns, each up to its next `yield`, and returns their results.

    The compiler keeps much of the order in which operations are written. Alternating between
    independent tiles lets the products of one fill the latencies of the other.
    """
    running = dict(enumerate(programs))
    results: dict[int, Any] = {}
    while running:
        for i, program in list(running.items()):
            try:
                next(program)
            except StopIteration as done:
                results[i] = done.value
                del running[i]
    return [results[i] for i in sorted(results)]


class _Decays(NamedTuple):
    """Products of gates: numbers 1 without gates."""

    between: Any  # [T, X], G(s, t) in row t and column s
    since: Any  # [T, X], a in all columns of a head
    until: Any  # [T, X], z
    since_row: Any  # [1, X], a at the lanes of the tokens
    until_row: Any  # [1, X], z
    whole: Any  # [1, X], gamma in all lanes of a head


def _forward(
    q_ref: Any, k_ref: Any, v_ref: Any, scalars_ref: Any, first_ref: Any,
    o_ref: Any, e_ref: Any, inverse_ref: Any, states_ref: Any, state_ref: Any, clipped_ref: Any,
    error_ref: Any, lower_ref: Any, rate_ref: Any, size_ref: Any, *, plan: _Plan,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state_ref[...] = first_ref[...]
        clipped_ref[...] = jnp.zeros(clipped_ref.shape, jnp.float32)

    states_ref[...] = state_ref[...]
    clip, fits = plan.clip, []

    def prepared(at: Any) -> _Steps:
        q, k, state = q_ref[at], k_ref[at], states_ref[at]
        decays = _decays(_scalars(scalars_ref, at), plan)
        products = yield from _product(jnp.concatenate([k, q]), k, transposed=True)
        kk, qk = products[: plan.tokens], products[plan.tokens :]
        lower = _lower(kk * decays.between, strict=True)
        predicted = yield from _product(jnp.concatenate([k, q]), state)
        residual = v_ref[at] - decays.since * predicted[: plan.tokens]
        read = decays.since * predicted[plan.tokens :]
        return k, state, decays, kk, lower, residual, _lower(qk * decays.between), read

    def finish(at: Any, e: jax.Array, rate: jax.Array, parts: tuple[Any, ...]) -> _Steps:
        """`rate` is a row."""
        k, state, decays, _, _, _, attention, read = parts
        writes = _transposed(k) * (decays.until_row * rate)
        sums = yield from _product(jnp.concatenate([attention * rate, writes]), e)
        o_ref[at] = read + sums[: plan.tokens]
        e_ref[at] = e
        state_ref[at] = decays.whole * state + sums[plan.tokens :]

    def unclipped(at: Any) -> _Steps:
        parts = yield from prepared(at)
        beta = _scalars(scalars_ref, at)[_BETA]
        inverse = yield from _inverse(parts[4] * beta)
        inverse_ref[at] = inverse
        e = yield from _product(inverse, parts[5])
        yield from finish(at, e, beta, parts)
        if clip is not None:
            fits.append(_fits(e, parts[3], clip))

    _interleave(map(unclipped, _tiles(plan)))
    if clip is None:
        return

    @pl.when(~jnp.all(functools.reduce(jnp.logical_and, fits)))
    def _() -> None:
        for i, at in enumerate(_tiles(plan)):
            k, *_, lower, residual, _, _ = _interleave([prepared(at)])[0]
            error_ref[i], lower_ref[i], size_ref[i] = (
                residual,
                lower,
                _head_sums(k * k, plan.tokens),
            )
            rate_ref[i] = _column(_scalars(scalars_ref, at)[_BETA], plan.tokens)

        def token(t: jax.Array, carry: None) -> None:
            for i, _ in enumerate(_tiles(plan)):
                e = error_ref[i, pl.ds(t, 1)]
                factor, _ = _clipped(e, size_ref[i, pl.ds(t, 1)], plan)
                update = rate_ref[i, pl.ds(t, 1)] * factor * e
                error_ref[i] -= _lane(lower_ref[i], t) * update

        jax.lax.fori_loop(0, plan.tokens, token, None)
        for i, at in enumerate(_tiles(plan)):
            e = error_ref[i]
            factor, clipped = _clipped(e, size_ref[i], plan)
            clipped_ref[at] += jnp.sum(clipped.astype(jnp.float32), 0, keepdims=True)
            (parts,) = _interleave([prepared(at)])
            _interleave([finish(at, e, _row(rate_ref[i] * factor), parts)])


def _backward(
    q_ref: Any, k_ref: Any, scalars_ref: Any, e_ref: Any, inverse_ref: Any, states_ref: Any,
    do_ref: Any, last_ref: Any, dq_ref: Any, dk_ref: Any, dv_ref: Any, dscalars_ref: Any,
    dstate_ref: Any, before_ref: Any, y_ref: Any, upper_ref: Any, rate_ref: Any, hat_ref: Any,
    *, plan: _Plan,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        dstate_ref[...] = last_ref[...]

    clip, fits, T = plan.clip, [], plan.tokens
    before_ref[...] = dstate_ref[...]

    def prepared(at: Any) -> _Steps:
        """What does not depend on the rates."""
        q, k = q_ref[at], k_ref[at]
        decays = _decays(_scalars(scalars_ref, at), plan)
        products = yield from _product(jnp.concatenate([k, q]), k, transposed=True)
        lower = _lower(products[:T] * decays.between, strict=True)
        attention = _lower(products[T:] * decays.between)
        du = yield from _product(k, before_ref[at])
        reads = _transposed(q) * decays.since_row
        left = jnp.concatenate([_transposed(attention), reads])
        yield
        sums = yield from _product(left, do_ref[at])
        return decays, products[:T], lower, attention, sums[:T] + decays.until * du, sums[T:]

    def finish(at: Any, dr: jax.Array, rate: jax.Array, parts: tuple[Any, ...]) -> _Steps:
        """Writes all cotangents but those of beta, and returns e and y; `rate` is a row."""
        decays, _, lower, attention, du, dread = parts
        q, k, e, state = q_ref[at], k_ref[at], e_ref[at], states_ref[at]
        do, dstate = do_ref[at], before_ref[at]
        both = jnp.concatenate([do, dr])
        left = jnp.concatenate([_transposed(lower), _transposed(k) * decays.since_row])
        products = yield from _product(both, e, transposed=True)
        dattention = _lower(products[:T] * rate)
        dlower = -_lower(products[T:] * rate, strict=True)
        dqk, dkk = dattention * decays.between, dlower * decays.between
        sums = yield from _product(left, dr)
        dstate_ref[at] = decays.whole * dstate + dread - sums[T:]
        y = du - sums[:T]
        left = jnp.concatenate([dqk, dkk + _transposed(dkk)])
        through_state = yield from _product(both, state, transposed=True)
        dq_read, dk_read = decays.since * through_state[:T], -decays.since * through_state[T:]
        left_q = _transposed(dqk)
        dk_write = yield from _product(e, dstate, transposed=True)
        dk_write *= _column(rate * decays.until_row, plan.tokens)
        sums = yield from _product(left, k)
        dq_ref[at] = dq_read + sums[:T]
        dk = dk_read + dk_write + sums[T:]
        dk_ref[at] = dk + (yield from _product(left_q, q))
        dv_ref[at] = dr
        if plan.gated:
            dbetween = dattention * attention + dlower * lower
            by_token = dbetween + dq_read * q + dk_read * k - dk_write * k
            last = jnp.sum(dk_write * k + decays.whole * dstate * state, 0, keepdims=True)
            dlog = _row_sums(by_token, terms=3) - jnp.sum(dbetween, 0, keepdims=True)
            dlog += jnp.where(_column_of_lane((1, _X), T) == T - 1, _head_sums(last, T), 0.0)
            _put(dscalars_ref, at, _REMAINDER, dlog)
            _put(dscalars_ref, at, _LOG, jnp.zeros_like(dlog))
        return e, y

    def unclipped(at: Any) -> _Steps:
        beta = _scalars(scalars_ref, at)[_BETA]
        parts = yield from prepared(at)
        left = _transposed(inverse_ref[at]) * beta
        dr = yield from _product(left, parts[4])
        e, y = yield from finish(at, dr, beta, parts)
        _put(dscalars_ref, at, _BETA, _row_sums(e * y, terms=2))
        if clip is not None:
            fits.append(_fits(e, parts[1], clip))

    _interleave(map(unclipped, _tiles(plan)))
    if clip is None:
        return

    @pl.when(~jnp.all(functools.reduce(jnp.logical_and, fits)))
    def _() -> None:
        for i, at in enumerate(_tiles(plan)):
            ((_, _, lower, _, du, _),) = _interleave([prepared(at)])
            k, e = k_ref[at], e_ref[at]
            factor, clipped = _clipped(e, _head_sums(k * k, plan.tokens), plan)
            y_ref[i], upper_ref[i] = du, _transposed(lower)
            rate_ref[i] = _column(_scalars(scalars_ref, at)[_BETA], plan.tokens) * factor
            size2 = jnp.where(clipped, _head_sums(e * e, plan.tokens), 1.0)
            hat_ref[i] = jnp.where(clipped, e * jax.lax.rsqrt(size2), 0.0)

        def token(n: jax.Array, carry: None) -> None:
            t = plan.tokens - 1 - n
            for i, _ in enumerate(_tiles(plan)):
                row = pl.ds(t, 1)
                y_ref[i] -= _lane(upper_ref[i], t) * _unwritten(
                    y_ref[i, row], rate_ref[i, row], hat_ref[i, row], plan.tokens
                )

        jax.lax.fori_loop(0, plan.tokens, token, None)
        for i, at in enumerate(_tiles(plan)):
            rate, k = rate_ref[i], k_ref[at]
            dr = _unwritten(y_ref[i], rate, hat_ref[i], plan.tokens)
            (parts,) = _interleave([prepared(at)])
            ((e, y),) = _interleave([finish(at, dr, _row(rate), parts)])
            size2 = _head_sums(k * k, plan.tokens)
            factor, clipped = _clipped(e, size2, plan)
            _put(dscalars_ref, at, _BETA, _row_sums(factor * e * y, terms=2))
            scale = jnp.where(
                clipped, _head_sums(rate * e * y, plan.tokens) / jnp.where(clipped, size2, 1.0), 0.0
            )
            dk_ref[at] -= scale * k


def _tiles(plan: _Plan) -> list[Any]:
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


def _decays(scalars: list[jax.Array], plan: _Plan) -> _Decays:
    if not plan.gated:
        return _Decays(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    T = plan.tokens
    rows = scalars[_LOG], scalars[_REMAINDER]
    columns = [_column(row, plan.tokens) for row in rows]
    last = [column[T - 1 :] for column in columns]

    def power(later: Sequence[Any], earlier: Sequence[Any]) -> jax.Array:
        return jnp.exp((later[0] - earlier[0]) + (later[1] - earlier[1]))

    between = jnp.exp(jnp.minimum((columns[0] - rows[0]) + (columns[1] - rows[1]), 0.0))
    return _Decays(
        between, power(columns, (0.0, 0.0)), power(last, columns),
        power(rows, (0.0, 0.0)), power(last, rows), power(last, (0.0, 0.0)),
    )  # fmt: skip


# ---- clips


def _fits(e: jax.Array, kk: jax.Array, clip: float) -> jax.Array:
    """Whether each token's write is below the clip for certain: |e|^2 is summed in bfloat16."""
    return _row_sums(e * e, terms=1) * _row(kk) <= (1 - 2.0**-6) * clip**2


def _clipped(e_RX: jax.Array, key2_RX: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """The factors c, and whether they are below 1, in all lanes of a head; `key2_RX` is |k|^2."""
    assert plan.clip is not None
    size2_RX = _head_sums(e_RX * e_RX, plan.tokens) * key2_RX
    limit = plan.clip**2
    return plan.clip * jax.lax.rsqrt(jnp.maximum(size2_RX, limit)), size2_RX > limit


def _unwritten(y: jax.Array, rate: jax.Array, hat: jax.Array, T: int) -> jax.Array:
    """The cotangent of r, given that of u: a clipped write does not depend on the length of e."""
    return rate * (y - hat * _head_sums(hat * y, T))


# ---- matrices of the heads of a tile, side by side: [T, X] for T = 64 or 128


def _terms(x: jax.Array, count: int) -> list[jax.Array]:
    """bfloat16 terms whose sum is x, the largest first."""
    terms = []
    for _ in range(count):
        terms.append(x.astype(jnp.bfloat16))
        x = x - terms[-1].astype(x.dtype)
    return terms


def _product(x_RX: jax.Array, y_TX: jax.Array, terms: int = 2, transposed: bool = False) -> _Steps:
    """X Y or X Y^T of each head, without products below the precision of either.

    The terms of X are stacked, as they share a right operand.
    """
    R = x_RX.shape[0]
    x_P, y_P = _terms(x_RX, terms), _terms(y_TX, terms)
    products = [
        _dot(jnp.concatenate(x_P[: terms - p]), _block_diagonal(y), transposed)
        for p, y in enumerate(y_P)
    ]
    yield
    smallest_first = [
        products[p][i * R : (i + 1) * R]
        for order in reversed(range(terms))
        for p in range(order + 1)
        for i in [order - p]
    ]
    return functools.reduce(jnp.add, smallest_first)


def _dot(x: jax.Array, y: jax.Array, transposed: bool = False) -> jax.Array:
    contracted = ((1,), (int(transposed),))
    return jax.lax.dot_general(x, y, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _block_diagonal(x_TX: jax.Array) -> jax.Array:
    """[X, X], with the matrices of the heads as its blocks."""
    T = x_TX.shape[0]
    if T == _X:
        return x_TX
    first, zero = _lane_index(x_TX.shape) < T, jnp.zeros((), x_TX.dtype)
    return jnp.concatenate([jnp.where(first, x_TX, zero), jnp.where(first, zero, x_TX)])


def _transposed(x_TX: jax.Array) -> jax.Array:
    """The transposes of the heads' matrices."""
    T = x_TX.shape[0]
    x_XX = _block_diagonal(x_TX).T
    return x_XX if T == _X else x_XX[:T] + x_XX[T:]


def _inverse(lower_TX: jax.Array) -> _Steps:
    """(I + lower)^-1 of strictly lower triangular matrices.

    The diagonal blocks of 8 are inverted by forward substitution, all at once: they fit into one
    register. Then [[P, 0], [C, Q]]^-1 = [[P^-1, 0], [-Q^-1 C P^-1, Q^-1]], from blocks of 8 to T.
    """
    T = lower_TX.shape[0]
    column, row = _column_of_lane((T, _X), T), _row_index((T, _X))
    blocks = jnp.where(row // _BLOCK == column // _BLOCK, lower_TX, 0.0)
    inverse = yield from _substituted(blocks)
    size = _BLOCK
    while size < T:
        corners = _odd(jnp.where(column // size == row // size - 1, lower_TX, 0.0), size)
        products = yield from _product(corners, inverse, terms=3)
        changes = yield from _product(_odd(inverse, size), _placed(products, size), terms=3)
        inverse -= _placed(changes, size)
        size *= 2
    return inverse


def _odd(x_TX: jax.Array, size: int) -> jax.Array:
    """Every other block of rows, from the second one on."""
    T = x_TX.shape[0]
    return jnp.concatenate([x_TX[i : i + size] for i in range(size, T, 2 * size)])


def _placed(x_RX: jax.Array, size: int) -> jax.Array:
    """Zeros besides `_odd`."""
    blocks = [x_RX[i : i + size] for i in range(0, x_RX.shape[0], size)]
    return jnp.concatenate([part for x in blocks for part in (jnp.zeros_like(x), x)])


def _substituted(blocks_TX: jax.Array) -> _Steps:
    """(I + L)^-1 for diagonal blocks of 8: row t of all of them is one row of a register."""
    T = blocks_TX.shape[0]
    at = [slice(start, start + _BLOCK) for start in range(0, T, _BLOCK)]
    lower = functools.reduce(jnp.add, [blocks_TX[rows] for rows in at])
    lane = _lane_index((_BLOCK, _X))
    inverse = jnp.where(lane % _BLOCK == _row_index((_BLOCK, _X)), 1.0, 0.0)
    for s in range(_BLOCK - 1):
        spread = pltpu.roll(jnp.where(lane % _BLOCK == s, lower, 0.0), (-s) % _X, 1)
        for shift in (1, 2, 4):
            spread += pltpu.roll(spread, shift, 1)
        inverse -= spread * inverse[s : s + 1]
        yield
    block = _column_of_lane((_BLOCK, _X), T) // _BLOCK
    return jnp.concatenate([jnp.where(block == i, inverse, 0.0) for i in range(len(at))])


def _lower(x_TX: jax.Array, strict: bool = False) -> jax.Array:
    row, column = _row_index(x_TX.shape), _column_of_lane(x_TX.shape, x_TX.shape[0])
    return jnp.where(row > column if strict else row >= column, x_TX, 0.0)


def _lane_index(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _row_index(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def _column_of_lane(shape: tuple[int, ...], T: int) -> jax.Array:
    return _lane_index(shape) % T


def _row_sums(x_TX: jax.Array, terms: int) -> jax.Array:
    """The sum of each row of each head as a row [1, X], by a product with ones."""
    ones = jnp.ones((2 * _BLOCK, _X), jnp.bfloat16)
    sums = [_dot(ones, _block_diagonal(x), transposed=True)[:1] for x in _terms(x_TX, terms)]
    return functools.reduce(jnp.add, reversed(sums))


def _head_sums(x_RX: jax.Array, T: int) -> jax.Array:
    """The sum of each row of each head in all its lanes."""
    if T == _X:
        return jnp.broadcast_to(jnp.sum(x_RX, 1, keepdims=True), x_RX.shape)
    first = _lane_index(x_RX.shape) < T
    halves = jnp.where(first, x_RX, 0.0), jnp.where(first, 0.0, x_RX)
    return jnp.where(first, *(jnp.sum(half, 1, keepdims=True) for half in halves))


def _column(row_1X: jax.Array, T: int) -> jax.Array:
    """[T, X] with the entry of token t in row t, in all lanes of its head."""
    return _head_sums(jnp.where(_diagonal(T), row_1X, 0.0), T)


def _row(column_TX: jax.Array) -> jax.Array:
    """The inverse of `_column`; of any other matrix, its diagonal."""
    return jnp.sum(jnp.where(_diagonal(column_TX.shape[0]), column_TX, 0.0), 0, keepdims=True)


def _diagonal(T: int) -> jax.Array:
    return _row_index((T, _X)) == _column_of_lane((T, _X), T)


def _lane(x_TX: jax.Array, t: jax.Array) -> jax.Array:
    """Column t of each head's matrix in all its lanes."""
    T = x_TX.shape[0]
    return _head_sums(jnp.where(_column_of_lane(x_TX.shape, T) == t, x_TX, 0.0), T)


def _call(
    kernel: Callable[..., None],
    name: str,
    plan: _Plan,
    inputs: Sequence[jax.Array],
    outputs: Sequence[Any],
    totals: Sequence[Any],
) -> Sequence[jax.Array]:
    """Runs a kernel over groups of sequences, of tiles, and innermost over chunks.

    The last input and `totals`, which are outputs as well, belong to a whole sequence.
    """
    B, N, width = inputs[0].shape
    T, lanes = plan.tokens, plan.tiles * _X
    chunks = N // T
    tile = pltpu.VMEM((plan.sequences * plan.tiles, T, _X), jnp.float32)
    scratch = [tile] * 4
    if kernel is _backward:
        scratch = [pltpu.VMEM((plan.sequences, T, lanes), jnp.float32), *scratch]
    varying = jax.typeof(inputs[0]).manual_axis_type

    def build(cost: pl.CostEstimate | None) -> Callable[..., Any]:
        # The cost is that of a pass in which no write is clipped, and the same in either direction.
        counted = cost is None
        reverse = kernel is _backward and not counted
        run = dataclasses.replace(plan, clip=None) if counted else plan

        def of_chunk(x: Any) -> pl.BlockSpec:
            def index(b: Any, j: Any, g: Any) -> tuple[Any, ...]:
                g = chunks - 1 - g if reverse else g
                return (b, g, 0, j) if x.ndim == 4 else (b, g, j)

            shape = (1, x.shape[2]) if x.ndim == 4 else (T,)
            return pl.BlockSpec((plan.sequences, *shape, lanes), index)

        def of_sequence(x: Any) -> pl.BlockSpec:
            return pl.BlockSpec((plan.sequences, x.shape[1], lanes), lambda b, j, g: (b, 0, j))

        return pl.pallas_call(
            functools.partial(kernel, plan=run),
            name=name,
            grid=(B // plan.sequences, width // lanes, chunks),
            in_specs=[*map(of_chunk, inputs[:-1]), of_sequence(inputs[-1])],
            out_specs=[*map(of_chunk, outputs), *map(of_sequence, totals)],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
                for x in (*outputs, *totals)
            ],
            scratch_shapes=scratch,
            interpret=plan.interpret,
            cost_estimate=cost,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
        )

    return with_cost(build, inputs)
