"""Causal convolution as products with Toeplitz blocks that are made on chip: a kernel for GPUs.

A sequence is cut into blocks of T positions. Block i of the result is y_i = sum_j u_{i-j} M_j with
matrices M_j[s, t] = h[j T + t - s], which a program gathers from the taps. It has one channel, and
G rows, which are blocks of all sequences, so that a matrix serves many of them. The gradients have
the same form: that of the input with later blocks of dy in place of earlier ones of u and with the
transposes of M_j, that of the filter with lags as positions, dy as the sequence, and blocks of u as
filters. The sums are in one order, so results are reproducible, and no product reaches from a later
position to an earlier one. Rows are read from [B, D, N] as they are.

Precision is that of `toeplitz.py`: the products are of bfloat16 with float32 sums. Inputs in
bfloat16 are exact operands, and the taps are sums of two such terms, so the result is exact to its
own rounding. Inputs in float32 are sums of two terms as well, in three products; the error is at
most 2e-5 of the largest result. The gradient of the filter is summed in float32.

The kernels are written in Pallas for its Triton back end. Letters here: G rows of a program, X
taps, 1 the channel of a program. The others are in `shapes.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from spectral_pod.ops.kernels import body
from spectral_pod.parallel.sharding import platform

_T = 64
_MIN_ROWS, _MAX_ROWS = 16, 64  # the least that tensor cores multiply, and most without spills

# The work grows with the square of the length. From here on cuFFT is expected to be faster: by the
# time of a transform on an H200 (docs/results.md) and half of its peak in products.
_MAX_LENGTH = 8192


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one convolution."""

    batch: int
    length: int
    taps: int
    terms: int  # of the activations
    interpret: bool

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.length, _T)

    @property
    def lags(self) -> int:
        """Blocks of lags: j = 0, ..., lags - 1."""
        return min(self.blocks, pl.cdiv(self.taps - 1, _T) + 1)


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
    B, _, N = u_BDN.shape
    h_DX = h_DX[:, :N]
    num_taps = h_DX.shape[1]
    if not interpret and (reason := unserved(N, num_taps, u_BDN.dtype)):
        raise ValueError(f"a causal convolution cannot use method 'toeplitz': {reason}")
    terms = 1 if u_BDN.dtype == jnp.bfloat16 else 2
    return _convolve(u_BDN, h_DX, _Plan(B, N, num_taps, terms, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(u_BDN: jax.Array, h_DX: jax.Array, plan: _Plan) -> jax.Array:
    return _call(_filter, "toeplitz_forward", plan, plan.blocks * plan.batch, [u_BDN, h_DX], u_BDN)


def _convolve_forward(
    u_BDN: jax.Array, h_DX: jax.Array, plan: _Plan
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(u_BDN, h_DX, plan), (u_BDN, h_DX)


def _convolve_backward(
    plan: _Plan, residuals: tuple[jax.Array, jax.Array], dy_BDN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    u_BDN, h_DX = residuals
    adjoint = functools.partial(_filter, adjoint=True)
    rows = plan.blocks * plan.batch
    du_BDN = _call(adjoint, "toeplitz_backward", plan, rows, [dy_BDN, h_DX], u_BDN)
    dh_DX = _call(_filter_gradient, "toeplitz_filter", plan, plan.lags, [u_BDN, dy_BDN], h_DX)
    return du_BDN, dh_DX


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _filter(x_B1N: Any, h_1X: Any, y_B1N: Any, *, plan: _Plan, adjoint: bool = False) -> None:
    """The convolution, or its adjoint, for rows in the order (block, sequence)."""
    row_G, first = _rows(plan.blocks * plan.batch)
    block_G, b_G = lax.div(row_G, plan.batch), lax.rem(row_G, plan.batch)
    s_T = lax.iota(jnp.int32, _T)
    lag_TT = s_T[None, :] - s_T[:, None]
    if adjoint:
        lag_TT = -lag_TT

    def add(j: jax.Array, y_GT: jax.Array) -> jax.Array:
        from_G = block_G + j if adjoint else block_G - j
        x_GT = _read(x_B1N, b_G[:, None], from_G[:, None] * _T + s_T[None], plan.length)
        tap_TT = j * _T + lag_TT
        h_TT = plgpu.load(h_1X.at[0, tap_TT], mask=_within(tap_TT, plan.taps), other=0.0)
        return y_GT + _product(x_GT, h_TT, plan.terms, 2)

    first_block = lax.div(first, plan.batch)
    last_block = lax.div(first + len(row_G) - 1, plan.batch)
    lags = jnp.minimum(plan.blocks - first_block if adjoint else last_block + 1, plan.lags)
    y_GT = lax.fori_loop(0, lags, add, jnp.zeros((len(row_G), _T), jnp.float32))
    n_GT = block_G[:, None] * _T + s_T[None]
    plgpu.store(
        y_B1N.at[b_G[:, None], 0, n_GT],
        y_GT.astype(y_B1N.dtype),
        mask=_within(n_GT, plan.length),
    )


def _filter_gradient(u_B1N: Any, dy_B1N: Any, dh_1X: Any, *, plan: _Plan) -> None:
    """dh[i T + t] = sum over b, c, s of dy_b[(i + c) T + s] u_b[c T + s - t], for rows i."""
    block_G, first = _rows(plan.lags)
    s_T = lax.iota(jnp.int32, _T)
    lag_TT = s_T[:, None] - s_T[None, :]

    def add(k: jax.Array, dh_GT: jax.Array) -> jax.Array:
        c, b = lax.div(k, plan.batch), lax.rem(k, plan.batch)
        dy_GT = _read(dy_B1N, b, (block_G + c)[:, None] * _T + s_T[None], plan.length)
        u_TT = _read(u_B1N, b, c * _T + lag_TT, plan.length)
        return dh_GT + _product(dy_GT, u_TT, plan.terms, plan.terms)

    products = (plan.blocks - first) * plan.batch
    dh_GT = lax.fori_loop(0, products, add, jnp.zeros((len(block_G), _T), jnp.float32))
    tap_GT = block_G[:, None] * _T + s_T[None]
    plgpu.store(dh_1X.at[0, tap_GT], dh_GT, mask=_within(tap_GT, plan.taps))


def _rows(count: int) -> tuple[jax.Array, jax.Array]:
    """The rows of a program, of `count` in all or beyond, and the first of them."""
    size = _group(count)
    first = pl.program_id(1) * size
    return first + lax.iota(jnp.int32, size), first


def _group(rows: int) -> int:
    return min(max(pl.next_power_of_2(rows), _MIN_ROWS), _MAX_ROWS)


def _read(x_B1N: Any, b: jax.Array, n: jax.Array, length: int) -> jax.Array:
    return plgpu.load(x_B1N.at[b, 0, n], mask=_within(n, length), other=0.0)


def _within(index: jax.Array, size: int) -> jax.Array:
    return (index >= 0) & (index < size)


def _product(x_GT: jax.Array, m_TT: jax.Array, x_terms: int, m_terms: int) -> jax.Array:
    """x m in float32, as products of bfloat16 terms without those below its precision."""
    smallest = max(x_terms, m_terms)
    products = [
        jnp.dot(x, m, preferred_element_type=jnp.float32)
        for i, x in enumerate(body.terms(x_GT, x_terms))
        for j, m in enumerate(body.terms(m_TT, m_terms))
        if i + j < smallest
    ]
    return functools.reduce(jnp.add, products)


def _call(
    kernel: Callable[..., None],
    name: str,
    plan: _Plan,
    rows: int,
    inputs: Sequence[jax.Array],
    output: jax.Array,
) -> jax.Array:
    """Runs a kernel on every channel of [B, D, N] or [D, X], and on its groups of rows."""

    def of_channel(x: jax.Array) -> pl.BlockSpec:
        if x.ndim == 2:
            return pl.BlockSpec((1, x.shape[1]), lambda d, g: (d, 0))
        return pl.BlockSpec((x.shape[0], 1, x.shape[2]), lambda d, g: (0, d, 0))

    varying = jax.typeof(inputs[0]).manual_axis_type
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        name=name,
        grid=(inputs[0].shape[1], pl.cdiv(rows, _group(rows))),
        in_specs=[*map(of_channel, inputs)],
        out_specs=of_channel(output),
        out_shape=jax.ShapeDtypeStruct(output.shape, output.dtype, manual_axis_type=varying),
        interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
    )(*inputs)
