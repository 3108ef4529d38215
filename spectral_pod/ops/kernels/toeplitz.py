"""Causal convolution as products with Toeplitz blocks that are made on chip: a kernel for TPUs.

A sequence is cut into blocks of T = 128 positions, and every block is a row of U. Row i of the
result is Y_i = sum_j U_{i-j} M_j with matrices M_j[s, t] = h[j T + t - s]. HBM sees u, h and y,
and nothing else: the matrices are lane slices of one band, band[s, l] = row[T + l - s], that is the
row of taps rolled by s lanes. No product reaches from a later position to an earlier one, so
causality is exact.

The matrix unit multiplies bfloat16 with float32 sums. Inputs in bfloat16 are exact operands, and
the taps are sums of two such terms, so the result is exact to its own rounding. Inputs in float32
are sums of two terms as well, in three products; with 17 bits of each factor the error is at most
2e-5 of the largest result. The gradient of the filter is summed in float32.

A grid cell has 8 channels of [B, D, N], or where they fit on the chip 128 of [B, N, D], which it
transposes: what surrounds a convolution is best computed with a channel in each lane, and a
transpose by XLA moves as many bytes as the convolution.

Letters here: C channels of a grid cell; R rows, in the order (block, sequence), so that a shift by
j blocks is a slice; G rows of all channels, (block, sequence, channel); X lanes of the taps, and W
those of a row of taps, which has T zeros before them; P terms of a sum; S words of rows. The others
are in `shapes.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from spectral_pod.ops.kernels import body
from spectral_pod.ops.kernels.cost import with_cost
from spectral_pod.parallel.sharding import platform

_T = 128  # lanes of a vector register
_SUBLANES = 8
_MAX_SEQUENCES = 32  # of a grid cell: a band serves all of them

_VMEM_SHARE = 0.8  # of on-chip memory, for what is counted here; the rest is the compiler's


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one convolution. `lags` counts blocks of lags: j = 0, ..., lags - 1."""

    blocks: int  # of a sequence
    lags: int
    sequences: int  # of a grid cell
    channels: int  # of a grid cell, C
    terms: int  # of the activations
    interpret: bool

    @property
    def positions_first(self) -> bool:
        """Whether the kernels read [B, N, D], with a channel in each lane."""
        return self.channels == _T

    @property
    def rows(self) -> int:
        return self.blocks * self.sequences

    @property
    def padded_rows(self) -> int:
        """Enough for multiples of T rows from any lag's first row on."""
        starts = [j * self.sequences for j in range(self.lags)]
        return max(start + -(-(self.rows - start) // _T) * _T for start in starts)

    @property
    def width(self) -> int:
        """Lanes of a row of taps, W: the lags from -T to lags T - 1."""
        return (self.lags + 1) * _T


def unserved(length: int, num_taps: int, dtype: DTypeLike) -> str | None:
    """Why the kernels cannot compute these sizes on the current mesh; None if they can."""
    if platform() != "tpu":
        return f"it is a kernel for TPUs, and this is a {platform()}"
    needed = _vmem(_plan(length, num_taps, 1, 1, dtype, interpret=False), dtype)
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    if needed <= _VMEM_SHARE * capacity:
        return None
    return (
        f"{length} positions and {num_taps} taps need {needed / 2**20:.0f} MiB of on-chip memory, "
        f"and {_VMEM_SHARE:.0%} of {capacity / 2**20:.0f} MiB can be used"
    )


def causal_conv(u_BDN: jax.Array, h_DT: jax.Array, *, interpret: bool = False) -> jax.Array:
    """y_n = sum_{t <= n} h_t u_{n-t} per channel.

    Args:
      u_BDN: bfloat16 or float32; any sizes.
      h_DT: float32.
      interpret: runs the kernels as ordinary JAX operations, on any platform.

    Returns:
      [B, D, N] in the dtype of u.

    Raises:
      ValueError: `unserved` gives a reason.
    """
    B, D, N = u_BDN.shape
    h_DT = h_DT[:, :N]
    if not interpret and (reason := unserved(N, h_DT.shape[1], u_BDN.dtype)):
        raise ValueError(f"a causal convolution cannot use method 'toeplitz': {reason}")
    plan = _plan(N, h_DT.shape[1], B, D, u_BDN.dtype, interpret)
    pads = (-B % plan.sequences, -D % plan.channels, -N % _T)
    u_BDN = jnp.pad(u_BDN, [(0, pad) for pad in pads])
    h_DX = jnp.pad(h_DT, ((0, pads[1]), (0, plan.lags * _T - h_DT.shape[1])))
    if plan.positions_first:
        y_BDN = jnp.swapaxes(_convolve(jnp.swapaxes(u_BDN, 1, 2), h_DX, plan), 1, 2)
    else:
        y_BDN = _channels_last(_convolve(_channels_last(u_BDN, plan), h_DX, plan), plan)
    return y_BDN[:B, :D, :N]


def _channels_last(x_BDN: jax.Array, plan: _Plan) -> jax.Array:
    """Keeps XLA from computing what is around the kernel with a position in each lane."""
    return x_BDN if plan.interpret else with_layout_constraint(x_BDN, Layout((0, 2, 1)))


def _plan(
    length: int, num_taps: int, batch: int, channels: int, dtype: DTypeLike, interpret: bool
) -> _Plan:
    blocks = -(-length // _T)
    lags = min(blocks, (num_taps + _T - 2) // _T + 1)
    terms = 1 if jnp.dtype(dtype) == jnp.bfloat16 else 2
    plan = _Plan(blocks, lags, _SUBLANES, _SUBLANES, terms, interpret)
    capacity = math.inf
    if not interpret:
        capacity = _VMEM_SHARE * pltpu.get_tpu_info().vmem_capacity_bytes
        while plan.sequences < min(batch, _MAX_SEQUENCES):
            larger = dataclasses.replace(plan, sequences=2 * plan.sequences)
            if -batch % larger.sequences > -batch % plan.sequences:
                break
            if _vmem(larger, dtype) > capacity:
                break
            plan = larger
    wider = dataclasses.replace(plan, channels=_T)
    return wider if channels % _T == 0 and _vmem(wider, dtype) <= capacity else plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(u: jax.Array, h_DX: jax.Array, plan: _Plan) -> jax.Array:
    (y,) = _call(_forward, "toeplitz_forward", plan, [h_DX, u], [u])
    return y


def _convolve_forward(
    u: jax.Array, h_DX: jax.Array, plan: _Plan
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(u, h_DX, plan), (u, h_DX)


def _convolve_backward(
    plan: _Plan, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The adjoint's row i is sum_j dY_{i+j} M_j^T."""
    u, h_DX = residuals
    inputs, outputs = [h_DX, u, dy], [u, h_DX]
    du, dh_DX = _call(_backward, "toeplitz_backward", plan, inputs, outputs)
    return du, dh_DX


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _forward(
    h_CX: Any, u: Any, y: Any, words_PCW: Any, band_PSX: Any, sum_RT: Any, rows_GT: Any,
    *, plan: _Plan,
) -> None:  # fmt: skip
    _load(u, rows_GT, plan)
    _make_words(h_CX, words_PCW)

    def channel(c: jax.Array) -> None:
        _make_band(words_PCW, c, band_PSX)
        u_PRT = body.terms(rows_GT[_rows(c, plan)], plan.terms)
        sum_RT[...] = jnp.zeros(sum_RT.shape, jnp.float32)
        for j in range(plan.lags):
            shift = j * plan.sequences
            sum_RT[shift:] += _product([x[: plan.rows - shift] for x in u_PRT], _block(band_PSX, j))
        rows_GT[_rows(c, plan)] = sum_RT[...]

    body.each(plan.channels, channel)
    _store(rows_GT, y, plan)


def _backward(
    h_CX: Any, u: Any, dy: Any, du: Any, dh_CX: Any, words_PCW: Any, band_PSX: Any,
    sum_RT: Any, u_GT: Any, dy_GT: Any, late_PRT: Any, diagonals_8W: Any, *, plan: _Plan,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dh_CX[...] = jnp.zeros(dh_CX.shape, jnp.float32)

    _load(u, u_GT, plan)
    _load(dy, dy_GT, plan)
    _make_words(h_CX, words_PCW)
    late_PRT[...] = jnp.zeros(late_PRT.shape, late_PRT.dtype)

    def channel(c: jax.Array) -> None:
        _make_band(words_PCW, c, band_PSX)
        u_RT = jnp.pad(u_GT[_rows(c, plan)], ((0, -plan.rows % _T), (0, 0)))
        u_PTR = body.terms(u_RT.T, plan.terms)
        for p, dy_RT in enumerate(body.terms(dy_GT[_rows(c, plan)], plan.terms)):
            late_PRT[p, : plan.rows] = dy_RT
        sum_RT[...] = jnp.zeros(sum_RT.shape, jnp.float32)
        diagonals_8W[...] = jnp.zeros(diagonals_8W.shape, jnp.float32)
        for j in range(plan.lags):
            shift = j * plan.sequences
            count = plan.rows - shift
            padded = count + -count % _T
            dy_PRT = [late_PRT[p, shift : shift + padded] for p in range(plan.terms)]
            early_PRT = [dy_RT[:count] for dy_RT in dy_PRT]
            sum_RT[:count] += _product(early_PRT, _block(band_PSX, j), transposed=True)
            products_TT = _product([x[:, :padded] for x in u_PTR], dy_PRT)
            _add_diagonals(products_TT, diagonals_8W, j)
        dh_1W = jnp.sum(_skew(diagonals_8W[...], -1), axis=0, keepdims=True)
        dh_CX[pl.ds(c, 1)] += dh_1W[:, _T:]
        dy_GT[_rows(c, plan)] = sum_RT[...]

    body.each(plan.channels, channel)
    _store(dy_GT, du, plan)


def _load(x: Any, rows_GT: Any, plan: _Plan) -> None:
    """Lays out the rows (block, sequence, channel) in float32: a channel's rows have one stride.

    x is [B, N, C] or [B, C, N], as in the plan.
    """
    count = plan.sequences * plan.channels

    def block(i: jax.Array) -> None:
        positions = _at(i, _T)
        if plan.positions_first:
            for b in range(plan.sequences):
                x_TC = x[b, positions].astype(jnp.float32)
                rows_GT[_at(i * plan.sequences + b, plan.channels)] = x_TC.T
        else:
            x_BCT = x[:, :, positions].astype(jnp.float32)
            rows_GT[_at(i, count)] = x_BCT.reshape(count, _T)

    body.each(plan.blocks, block)


def _store(rows_GT: Any, x: Any, plan: _Plan) -> None:
    count = plan.sequences * plan.channels

    def block(i: jax.Array) -> None:
        positions = _at(i, _T)
        if plan.positions_first:
            for b in range(plan.sequences):
                rows_CT = rows_GT[_at(i * plan.sequences + b, plan.channels)]
                x[b, positions] = rows_CT.T.astype(x.dtype)
        else:
            x_BCT = rows_GT[_at(i, count)].reshape(plan.sequences, plan.channels, _T)
            x[:, :, positions] = x_BCT.astype(x.dtype)

    body.each(plan.blocks, block)


def _at(i: jax.Array, size: int) -> Any:
    """The i-th of parts of a size."""
    return pl.ds(pl.multiple_of(i * size, size), size)


def _rows(c: jax.Array, plan: _Plan) -> Any:
    """Where the rows (block, sequence) of a channel are."""
    return pl.ds(c, plan.rows, stride=plan.channels)


def _make_words(h_CX: Any, words_PCW: Any) -> None:
    """The two terms of each row of taps, from lane T on: tap l in the low half of a word, tap l - 1
    in the high half."""
    h_CW = jnp.concatenate([jnp.zeros((len(h_CX), _T), jnp.float32), h_CX[...]], axis=1)
    for p, term_CW in enumerate(body.terms(h_CW, 2)):
        high_CW = pltpu.bitcast(term_CW.astype(jnp.float32), jnp.int32)
        words_PCW[p] = jax.lax.shift_right_logical(high_CW, 16) | pltpu.roll(high_CW, 1, 1)


def _make_band(words_PCW: Any, c: jax.Array, band_PSX: Any) -> None:
    """Fills band[s, l] = row[T + l - s].

    A word holds two adjacent rows of the band, so that a roll moves both. Rolls by 0, 2, ..., 14
    make eight words of rows, and rolls of these by multiples of 16 the others.
    """
    width = words_PCW.shape[2]
    for p in range(band_PSX.shape[0]):
        row_1W = words_PCW[p, pl.ds(c, 1)]
        eight = _skew(jnp.broadcast_to(row_1W, (_SUBLANES, width)), 2)
        for g in range(_T // 2 // _SUBLANES):
            rolled = pltpu.roll(eight, 2 * _SUBLANES * g, 1) if g else eight
            band_PSX[p, _SUBLANES * g : _SUBLANES * (g + 1)] = rolled[:, _T:]


def _block(band_PSX: Any, k: int) -> list[jax.Array]:
    at = slice(k * _T, (k + 1) * _T)
    return [pltpu.bitcast(band_PSX[p, :, at], jnp.bfloat16) for p in range(band_PSX.shape[0])]


def _add_diagonals(x_TT: jax.Array, diagonals_8W: Any, j: int) -> None:
    """Adds the rows of a block to the row of lags, each group of eight rolled to its lags.

    x[s, t] belongs to lag j T + t - s, which is lane (j + 1) T + t - s. What remains is row s
    modulo 8 too far to the right.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, _T), 1)
    here, before = x_TT[:_SUBLANES], jnp.zeros((_SUBLANES, _T), jnp.float32)
    for s in range(_SUBLANES, _T, _SUBLANES):
        rolled = pltpu.roll(x_TT[s : s + _SUBLANES], _T - s, 1)
        here += jnp.where(lane < _T - s, rolled, 0.0)
        before += jnp.where(lane < _T - s, 0.0, rolled)
    diagonals_8W[:, (j + 1) * _T : (j + 2) * _T] = here
    diagonals_8W[:, j * _T : (j + 1) * _T] += before


def _skew(x_8W: jax.Array, lanes: int) -> jax.Array:
    """Rolls row s by `lanes * s`, in three steps that roll all rows and select: a rotation with a
    stride does not exist on v4."""
    row = jax.lax.broadcasted_iota(jnp.int32, x_8W.shape, 0)
    for bit in range(3):
        rolled = pltpu.roll(x_8W, (lanes << bit) % x_8W.shape[1], 1)
        x_8W = jnp.where((row >> bit) & 1 == 1, rolled, x_8W)
    return x_8W


def _product(
    x_P: Sequence[jax.Array], y_P: Sequence[jax.Array], transposed: bool = False
) -> jax.Array:
    """X Y or X Y^T, of sums of terms, without products below the precision of either."""
    kept, contracted = max(len(x_P), len(y_P)), ((1,), (int(transposed),))
    products = [
        jax.lax.dot_general(x, y, (contracted, ((), ())), preferred_element_type=jnp.float32)
        for p, x in enumerate(x_P)
        for y in y_P[: kept - p]
    ]
    return functools.reduce(jnp.add, products)


def _call(
    kernel: Callable[..., None],
    name: str,
    plan: _Plan,
    inputs: Sequence[jax.Array],
    outputs: Sequence[Any],
) -> Sequence[jax.Array]:
    """Runs a kernel over groups of channels and, innermost, groups of sequences."""
    B, (D, X) = len(inputs[1]), inputs[0].shape
    C, W, N = plan.channels, plan.width, plan.blocks * _T
    taps = pl.BlockSpec((C, X), lambda d, b: (d, 0))
    activation = pl.BlockSpec((plan.sequences, C, N), lambda d, b: (b, d, 0))
    if plan.positions_first:
        activation = pl.BlockSpec((plan.sequences, N, C), lambda d, b: (b, 0, d))
    rows = pltpu.VMEM((plan.rows * C, _T), jnp.float32)
    scratch = [
        pltpu.VMEM((2, C, W), jnp.int32),
        pltpu.VMEM((2, _T // 2, X), jnp.int32),
        pltpu.VMEM((plan.rows, _T), jnp.float32),
        *[rows] * (len(inputs) - 1),
    ]
    if len(outputs) == 2:
        scratch += [
            pltpu.VMEM((plan.terms, plan.padded_rows, _T), jnp.bfloat16),
            pltpu.VMEM((_SUBLANES, W), jnp.float32),
        ]
    varying = jax.typeof(inputs[1]).manual_axis_type
    limit = None if plan.interpret else int(0.95 * pltpu.get_tpu_info().vmem_capacity_bytes)

    def build(cost: pl.CostEstimate | None) -> Callable[..., Any]:
        return pl.pallas_call(
            functools.partial(kernel, plan=plan),
            name=name,
            grid=(D // C, B // plan.sequences),
            in_specs=[taps, *[activation] * (len(inputs) - 1)],
            out_specs=[activation, taps][: len(outputs)],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in outputs
            ],
            scratch_shapes=scratch,
            interpret=plan.interpret,
            cost_estimate=cost,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit
            ),
        )

    return with_cost(build, inputs)


def _vmem(plan: _Plan, dtype: DTypeLike) -> int:
    """Bytes on chip of the backward pass, which needs more: blocks are double-buffered."""
    block, taps = plan.channels * plan.rows * _T, plan.channels * plan.width
    buffers = 2 * (3 * block * jnp.dtype(dtype).itemsize + 2 * taps * 4)  # u, dy, du; h, dh
    scratch = 2 * taps + _T * plan.width + plan.rows * _T + 2 * block + _SUBLANES * plan.width
    values = plan.terms * (plan.padded_rows + 2 * plan.rows) * _T * 2
    return buffers + 4 * scratch + values
