"""Matrices of several heads side by side in the 128 lanes of a TPU's registers, inside kernels.

A head's matrices are [T, T], for T = 64 or 128, and X = 128 lanes hold those of X / T heads, in a
tile [T, X]. In the right operand of a product they become the blocks of a block-diagonal [X, X]
matrix,

    [X1 | X2] diag(Y1, Y2) = [X1 Y1 | X2 Y2].

The matrix unit multiplies bfloat16 with float32 sums. A float32 factor is a sum of two such terms,
with an error of 2^-18, in three products, or of three, which are exact, in six.

A function that takes long is a generator, which yields where its results are not there yet: see
`interleave`.

Letters here: X lanes; R rows of any number; P terms of a sum. The others are in `shapes.py`.
"""

import functools
from collections.abc import Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from spectral_pod.ops.kernels import body

LANES = 128  # lanes of a vector register
_BLOCK = 8  # its sublanes; tokens of the smallest triangular matrices that are inverted


Steps = Generator[None, None, Any]


def interleave(programs: Iterable[Steps]) -> list[Any]:
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


def product(x_RX: jax.Array, y_TX: jax.Array, terms: int = 2, transposed: bool = False) -> Steps:
    """X Y or X Y^T of each head, without products below the precision of either.

    The terms of X are stacked, as they share a right operand.
    """
    R = x_RX.shape[0]
    x_P, y_P = body.terms(x_RX, terms), body.terms(y_TX, terms)
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
    if T == LANES:
        return x_TX
    first, zero = _lane_index(x_TX.shape) < T, jnp.zeros((), x_TX.dtype)
    return jnp.concatenate([jnp.where(first, x_TX, zero), jnp.where(first, zero, x_TX)])


def transposed(x_TX: jax.Array) -> jax.Array:
    """The transposes of the heads' matrices."""
    T = x_TX.shape[0]
    x_XX = _block_diagonal(x_TX).T
    return x_XX if T == LANES else x_XX[:T] + x_XX[T:]


def inverse(lower_TX: jax.Array) -> Steps:
    """(I + lower)^-1 of strictly lower triangular matrices.

    The diagonal blocks of 8 are inverted by forward substitution, all at once: they fit into one
    register. Then [[P, 0], [C, Q]]^-1 = [[P^-1, 0], [-Q^-1 C P^-1, Q^-1]], from blocks of 8 to T.
    """
    T = lower_TX.shape[0]
    column, row = column_index((T, LANES), T), _row_index((T, LANES))
    blocks = jnp.where(row // _BLOCK == column // _BLOCK, lower_TX, 0.0)
    found = yield from _substituted(blocks)
    size = _BLOCK
    while size < T:
        corners = _odd(jnp.where(column // size == row // size - 1, lower_TX, 0.0), size)
        products = yield from product(corners, found, terms=3)
        changes = yield from product(_odd(found, size), _placed(products, size), terms=3)
        found -= _placed(changes, size)
        size *= 2
    return found


def _odd(x_TX: jax.Array, size: int) -> jax.Array:
    """Every other block of rows, from the second one on."""
    starts = range(size, x_TX.shape[0], 2 * size)
    return jnp.concatenate([x_TX[i : i + size] for i in starts])


def _placed(x_RX: jax.Array, size: int) -> jax.Array:
    """The rows that `_odd` took, in their places, and zeros in the others."""
    blocks = [x_RX[i : i + size] for i in range(0, x_RX.shape[0], size)]
    return jnp.concatenate([part for x in blocks for part in (jnp.zeros_like(x), x)])


def _substituted(blocks_TX: jax.Array) -> Steps:
    """(I + L)^-1 for diagonal blocks of 8: row t of all of them is one row of a register."""
    T = blocks_TX.shape[0]
    at = [slice(start, start + _BLOCK) for start in range(0, T, _BLOCK)]
    lower = functools.reduce(jnp.add, [blocks_TX[rows] for rows in at])
    lane = _lane_index((_BLOCK, LANES))
    inverse = jnp.where(lane % _BLOCK == _row_index((_BLOCK, LANES)), 1.0, 0.0)
    for s in range(_BLOCK - 1):
        spread = pltpu.roll(jnp.where(lane % _BLOCK == s, lower, 0.0), (-s) % LANES, 1)
        for shift in (1, 2, 4):
            spread += pltpu.roll(spread, shift, 1)
        inverse -= spread * inverse[s : s + 1]
        yield
    block = column_index((_BLOCK, LANES), T) // _BLOCK
    return jnp.concatenate([jnp.where(block == i, inverse, 0.0) for i in range(len(at))])


def lower_triangle(x_TX: jax.Array, strict: bool = False) -> jax.Array:
    row, column = _row_index(x_TX.shape), column_index(x_TX.shape, x_TX.shape[0])
    return jnp.where(row > column if strict else row >= column, x_TX, 0.0)


def _lane_index(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _row_index(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def column_index(shape: tuple[int, ...], T: int) -> jax.Array:
    return _lane_index(shape) % T


def row_sums(x_TX: jax.Array, terms: int) -> jax.Array:
    """The sum of each row of each head as a row [1, X], by a product with ones."""
    ones = jnp.ones((2 * _BLOCK, LANES), jnp.bfloat16)
    sums = [_dot(ones, _block_diagonal(x), transposed=True)[:1] for x in body.terms(x_TX, terms)]
    return functools.reduce(jnp.add, reversed(sums))


def head_sums(x_RX: jax.Array, T: int) -> jax.Array:
    """The sum of each row of each head in all its lanes."""
    if T == LANES:
        return jnp.broadcast_to(jnp.sum(x_RX, 1, keepdims=True), x_RX.shape)
    first = _lane_index(x_RX.shape) < T
    sum_R1 = jnp.sum(jnp.where(first, x_RX, 0.0), 1, keepdims=True)
    return jnp.where(first, sum_R1, jnp.sum(jnp.where(first, 0.0, x_RX), 1, keepdims=True))


def column(row_1X: jax.Array, T: int) -> jax.Array:
    """[T, X] with the entry of token t in row t, in all lanes of its head."""
    return head_sums(jnp.where(_diagonal(T), row_1X, 0.0), T)


def diagonal(x_TX: jax.Array) -> jax.Array:
    """The diagonal of each head's matrix as a row [1, X]: the inverse of `column`."""
    return jnp.sum(jnp.where(_diagonal(x_TX.shape[0]), x_TX, 0.0), 0, keepdims=True)


def _diagonal(T: int) -> jax.Array:
    return _row_index((T, LANES)) == column_index((T, LANES), T)


def column_at(x_TX: jax.Array, t: jax.Array) -> jax.Array:
    """Column t of each head's matrix in all its lanes."""
    T = x_TX.shape[0]
    return head_sums(jnp.where(column_index(x_TX.shape, T) == t, x_TX, 0.0), T)
