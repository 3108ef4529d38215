"""Long convolutions as products with Toeplitz blocks that are made on chip: kernels for GPUs.

    y[n] = sum_x h[x] u[n - x - first],  per channel,

where `first` is the lag of the first tap: 0 for a causal filter, negative for one that sees later
positions. Sequences are cut into blocks of T positions. Block i of the result is the sum of
H_j u_{i-j} over lags j, with matrices H_j[t, s] = h[j T + t - s - first], which a program gathers
from the taps. A program has one channel and G blocks of all sequences, which share its matrices.
The gradient of the input is the convolution of dy with the reversed filter. That of the filter is
the sum of the diagonals of C_j = sum dy_{i+j} u_i^T, a product over the blocks of all sequences.
The sums are in one order, so results are reproducible, and products of a causal filter reach from
no later position to an earlier one. Sequences are read from [B, D, N] as they are.

Precision is that of `toeplitz.py`: the products are of bfloat16 with float32 sums. Inputs in
bfloat16 are exact operands, and the taps are sums of two such terms, so the result is exact to its
own rounding. Inputs in float32 are sums of two terms as well, in three products; the error is at
most 2e-5 of the largest result. The gradient of the filter is summed in float32.

The kernels are written in Pallas for its Triton back end. Letters here: G blocks of a program, X
taps, W blocks that are summed at once, 1 the channel of a program. The others are in `shapes.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from spectral_pod.ops.kernels import body
from spectral_pod.parallel.sharding import platform

_T = 64
_MIN_ROWS, _MAX_ROWS = 16, 128  # blocks of a program: what tensor cores need, and registers hold
_LAGS = 2  # blocks of lags that a program of the filter's gradient has

# The work grows with the square of the length: for much longer ones FFTs are faster by any count.
_MAX_LENGTH = 8192


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one convolution."""

    batch: int
    length: int
    taps: int
    first: int  # the lag of the first tap
    terms: int  # of the activations
    interpret: bool

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.length, _T)

    @property
    def lags(self) -> tuple[int, int]:
        """The first block of lags j for which H_j has taps, and the one after the last."""
        last = self.first + self.taps - 1
        begin, end = -((_T - 1 - self.first) // _T), (last + _T - 1) // _T + 1
        return max(begin, 1 - self.blocks), min(end, self.blocks)

    def reversed(self) -> "_Plan":
        return dataclasses.replace(self, first=1 - self.first - self.taps)


def unserved(length: int, num_taps: int, dtype: DTypeLike) -> str | None:
    """Why the kernels cannot compute these sizes on the current mesh; None if they can."""
    del num_taps, dtype
    if platform() != "gpu":
        return f"it is a kernel for GPUs, and this is a {platform()}"
    if length > _MAX_LENGTH:
        return f"it serves up to {_MAX_LENGTH} positions, and not {length}"
    return None


def causal_conv(u_BDN: jax.Array, h_DX: jax.Array, *, interpret: bool = False) -> jax.Array:
    """y_n = sum_{t <= n} h_t u_{n-t} per channel.

    Args:
      u_BDN: bfloat16 or float32; any sizes.
      h_DX: float32 taps.
      interpret: runs the kernels as ordinary JAX operations, on any platform.

    Returns:
      [B, D, N] in the dtype of u.

    Raises:
      ValueError: `unserved` gives a reason.
    """
    return _checked("a causal convolution", u_BDN, h_DX[:, : u_BDN.shape[2]], 0, interpret)


def spectral_filter(
    x_BDN: jax.Array, w_FD: jax.Array, fft_length: int, *, interpret: bool = False
) -> jax.Array:
    """`irfft(rfft(x, n) * W, n)[:N]` with n = `fft_length` >= N per channel, by the filter's taps.

    Args:
      x_BDN: bfloat16 or float32; any sizes.
      w_FD: complex64, F = n // 2 + 1.
      fft_length: n.
      interpret: runs the kernels as ordinary JAX operations, on any platform.

    Returns:
      [B, D, N] in the dtype of x.

    Raises:
      ValueError: `unserved` gives a reason.
    """
    N = x_BDN.shape[2]
    h_DT = jnp.fft.irfft(w_FD.T, fft_length)  # a period, of which lag t and t - n are the same
    h_DX = jnp.concatenate([h_DT[:, fft_length - N + 1 :], h_DT[:, :N]], axis=1)
    return _checked("a spectral filter", x_BDN, h_DX, 1 - N, interpret)


def channels_last(x_BDN: jax.Array) -> jax.Array:
    """The array, on GPUs with [B, N, D] as its order in memory before it or after it.

    For callers whose arrays are [B, N, D]: around a kernel XLA would otherwise give the order of
    [B, D, N] to their elementwise operations too, and transpose at every product there.
    """
    return with_layout_constraint(x_BDN, Layout((0, 2, 1))) if platform() == "gpu" else x_BDN


def _checked(
    what: str, u_BDN: jax.Array, h_DX: jax.Array, first: int, interpret: bool
) -> jax.Array:
    (B, _, N), num_taps = u_BDN.shape, h_DX.shape[1]
    if not interpret and (reason := unserved(N, num_taps, u_BDN.dtype)):
        raise ValueError(f"{what} cannot use method 'toeplitz': {reason}")
    terms = 1 if u_BDN.dtype == jnp.bfloat16 else 2
    return _convolve(u_BDN, h_DX, _Plan(B, N, num_taps, first, terms, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(u_BDN: jax.Array, h_DX: jax.Array, plan: _Plan) -> jax.Array:
    rows = plan.blocks * plan.batch
    group = min(max(pl.next_power_of_2(rows), _MIN_ROWS), _MAX_ROWS)
    kernel = functools.partial(_filter, plan=plan, group=group)
    grid = u_BDN.shape[1], pl.cdiv(rows, group)
    return _call(kernel, "toeplitz", plan, grid, [u_BDN, _windows(h_DX, plan)], [u_BDN])[0]


def _convolve_forward(
    u_BDN: jax.Array, h_DX: jax.Array, plan: _Plan
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(u_BDN, h_DX, plan), (u_BDN, h_DX)


def _convolve_backward(
    plan: _Plan, residuals: tuple[jax.Array, jax.Array], dy_BDN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    u_BDN, h_DX = residuals
    du_BDN = _convolve(dy_BDN, h_DX[:, ::-1], plan.reversed())
    return du_BDN, _filter_gradient(u_BDN, dy_BDN, plan)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _windows(h_DX: jax.Array, plan: _Plan) -> jax.Array:
    """For every block of lags j the taps of H_j, in order, and one more: uint32 [D, J, 2T].

    A number has two terms of a tap in bfloat16, which a program takes apart by bits.
    """
    begin, end = plan.lags
    shift = begin * _T - (_T - 1) - plan.first  # the first tap of them
    h_DX = jnp.pad(h_DX, ((0, 0), (max(-shift, 0), 0)))[:, max(shift, 0) :]
    length = (end - begin + 1) * _T
    h_DX = jnp.pad(h_DX[:, :length], ((0, 0), (0, max(length - h_DX.shape[1], 0))))
    first, second = (
        lax.bitcast_convert_type(term, jnp.uint16).astype(jnp.uint32)
        for term in body.terms(h_DX, 2)
    )
    blocks_DJT = (first << 16 | second).reshape(len(h_DX), -1, _T)
    return jnp.concatenate([blocks_DJT[:, :-1], blocks_DJT[:, 1:]], axis=2)


def _filter(u_B1N: Any, h_1JX: Any, y_B1N: Any, *, plan: _Plan, group: int) -> None:
    """The convolution for blocks in the order (block, sequence)."""
    first_row = pl.program_id(1) * group
    block_G, b_G = _block_and_sequence(first_row + lax.iota(jnp.int32, group), plan)
    t_T = lax.iota(jnp.int32, _T)
    tap_TT = t_T[:, None] - t_T[None, :] + (_T - 1)

    def add(j: jax.Array, y_TG: jax.Array) -> jax.Array:
        h_TT = plgpu.load(h_1JX.at[0, j - plan.lags[0], tap_TT])
        n_TG = (block_G - j)[None] * _T + t_T[:, None]
        u_TG = _read(u_B1N, b_G[None], n_TG, plan)
        terms = [
            lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
            for bits in (h_TT >> 16, h_TT)
        ]
        return _add_product(y_TG, terms, body.terms(u_TG, plan.terms))

    first_block, _ = _block_and_sequence(first_row, plan)
    last_block, _ = _block_and_sequence(first_row + group - 1, plan)
    begin = jnp.maximum(first_block - (plan.blocks - 1), plan.lags[0])
    end = jnp.minimum(last_block + 1, plan.lags[1])
    y_TG = lax.fori_loop(begin, end, add, jnp.zeros((_T, group), jnp.float32))
    n_TG = block_G[None] * _T + t_T[:, None]
    y_TG = y_TG.astype(y_B1N.dtype)
    plgpu.store(y_B1N.at[b_G[None], 0, n_TG], y_TG, mask=_within(n_TG, plan.length))


def _filter_gradient(u_BDN: jax.Array, dy_BDN: jax.Array, plan: _Plan) -> jax.Array:
    """dh[x] = sum over sequences and n of dy[n] u[n - x - first], float32 [D, X]."""
    begin, end = plan.lags
    parts = pl.cdiv(end - begin, _LAGS)
    D, width = u_BDN.shape[1], (_LAGS + 1) * _T
    sums = jax.ShapeDtypeStruct((D, parts, width), jnp.float32)
    products = jax.ShapeDtypeStruct((D, parts, _LAGS * _T, _T), jnp.float32)
    kernel = functools.partial(_correlate, plan=plan)
    inputs = [u_BDN, dy_BDN]
    sums_DGX, _ = _call(kernel, "toeplitz_filter", plan, (D, parts), inputs, [sums, products])
    # A part has lags from T - 1 before its first block on. The last T reach into the next part.
    own_DGX, next_DX = sums_DGX[:, :, : _LAGS * _T], sums_DGX[:, :, _LAGS * _T :]
    own_DX = own_DGX.at[:, 1:, :_T].add(next_DX[:, :-1]).reshape(D, -1)
    lags_DX = jnp.concatenate([own_DX, next_DX[:, -1]], axis=1)
    lags_DX = jnp.pad(lags_DX, ((0, 0), (plan.taps, plan.taps)))
    start = plan.taps + plan.first - (begin * _T - (_T - 1))
    return lags_DX[:, start : start + plan.taps]


def _correlate(u_B1N: Any, dy_B1N: Any, sums_11X: Any, products_11XT: Any, *, plan: _Plan) -> None:
    """Sums over lags j T + t - s of C_j[t, s], for `_LAGS` of j; the products are a buffer."""
    j = plan.lags[0] + pl.program_id(1) * _LAGS
    t_X, s_T = lax.iota(jnp.int32, _LAGS * _T), lax.iota(jnp.int32, _T)
    row_W = lax.iota(jnp.int32, _T)

    def add(k: jax.Array, c_XT: jax.Array) -> jax.Array:
        block_W, b_W = _block_and_sequence(k * _T + row_W, plan)
        n_XW = (block_W + j)[None] * _T + t_X[:, None]
        dy_XW = _read(dy_B1N, b_W[None], n_XW, plan)
        u_WT = _read(u_B1N, b_W[:, None], block_W[:, None] * _T + s_T[None], plan)
        return _add_product(c_XT, body.terms(dy_XW, plan.terms), body.terms(u_WT, plan.terms))

    # The blocks of u that have a block of dy j later.
    begin = lax.div(jnp.maximum(0, -(j + _LAGS - 1)) * plan.batch, _T)
    end = pl.cdiv(jnp.minimum(plan.blocks, plan.blocks - j) * plan.batch, _T)
    c_XT = lax.fori_loop(begin, end, add, jnp.zeros((_LAGS * _T, _T), jnp.float32))
    products_11XT[0, 0] = c_XT
    if not plan.interpret:
        plgpu.debug_barrier()  # a thread reads what others have written

    def diagonals(g: jax.Array, _: None) -> None:
        lag_T = g * _T + s_T - (_T - 1)
        row_TT = lag_T[:, None] + s_T[None]
        c_TT = plgpu.load(
            products_11XT.at[0, 0, row_TT, s_T[None]],
            mask=_within(row_TT, _LAGS * _T),
            other=0.0,
        )
        plgpu.store(sums_11X.at[0, 0, g * _T + s_T], jnp.sum(c_TT, 1))

    lax.fori_loop(0, _LAGS + 1, diagonals, None)


def _block_and_sequence(row: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Rows in the order (block, sequence). Those after the last have blocks after the last."""
    return lax.div(row, plan.batch), lax.rem(row, plan.batch)


def _read(x_B1N: Any, b: jax.Array, n: jax.Array, plan: _Plan) -> jax.Array:
    return plgpu.load(x_B1N.at[b, 0, n], mask=_within(n, plan.length), other=0.0)


def _within(index: jax.Array, size: int) -> jax.Array:
    return (index >= 0) & (index < size)


def _add_product(sums: jax.Array, a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """sums + a b in float32, by products of terms without those below their precision."""
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            if i + j < max(len(a), len(b)):
                sums += jnp.dot(x, y, preferred_element_type=jnp.float32)
    return sums


def _call(
    kernel: Callable[..., None],
    name: str,
    plan: _Plan,
    grid: tuple[int, int],
    inputs: Sequence[jax.Array],
    outputs: Sequence[Any],
) -> Sequence[jax.Array]:
    """Runs a kernel on every channel D of its arrays and every group G.

    A program has all of [B, D, N] and of inputs [D, ...] that is its channel's, and its own group
    of outputs [D, G, ...].
    """

    def spec(x: Any) -> pl.BlockSpec:
        if x.shape == inputs[0].shape:
            return pl.BlockSpec((x.shape[0], 1, x.shape[2]), lambda d, g: (0, d, 0))
        if any(x is one for one in inputs):
            return pl.BlockSpec((1, *x.shape[1:]), lambda d, g: (d,) + (0,) * (x.ndim - 1))
        return pl.BlockSpec((1, 1, *x.shape[2:]), lambda d, g: (d, g) + (0,) * (x.ndim - 2))

    varying = jax.typeof(inputs[0]).manual_axis_type
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[*map(spec, inputs)],
        out_specs=[*map(spec, outputs)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in outputs
        ],
        interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
    )(*inputs)
