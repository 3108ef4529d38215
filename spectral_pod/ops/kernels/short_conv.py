"""Causal convolution over a few positions: a kernel for TPUs.

    y_n = sum_{t < T} h_t x_{n-t} per channel.

XLA shifts bfloat16 positions within a vector register, which takes it six times as long as what it
computes with them. Here a window of positions is in memory on the chip, in float32, and a shifted
copy of it is read from another row. The cotangents of x and h need the same shifts of dy:

    dx_n = sum_t h_t dy_{n+t},    dh_t = sum_n x_n dy_{n+t}.

Letters here: C channels of a grid cell; W rows of a window, 8 more than the R that a chunk has. The
others are in `shapes.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from spectral_pod.ops.kernels import body
from spectral_pod.ops.kernels.cost import with_cost
from spectral_pod.parallel.sharding import platform

_LANES = 128
_MARGIN = 8  # rows of a vector register in float32, so that chunks are aligned
_ROWS = (128, 64, 32, 16)  # of a chunk; registers of bfloat16 have 16
_MAX_CHANNELS = 512  # of a grid cell
_VMEM_SHARE = 0.8  # of on-chip memory, for what is counted here; the rest is the compiler's


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one convolution."""

    rows: int  # of a chunk
    channels: int  # of a grid cell
    interpret: bool


def unserved(length: int, channels: int, num_taps: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot compute these sizes on the current mesh; None if it can."""
    if platform() != "tpu":
        return f"it is a kernel for TPUs, and this is a {platform()}"
    if num_taps > _MARGIN + 1:
        return f"{num_taps} taps are more than {_MARGIN + 1}"
    if length % _ROWS[-1] or channels % _LANES:
        return (
            f"{length} positions and {channels} channels of a device are not multiples of "
            f"{_ROWS[-1]} and {_LANES}"
        )
    needed, capacity = _vmem(length, _LANES, dtype), pltpu.get_tpu_info().vmem_capacity_bytes
    if needed <= _VMEM_SHARE * capacity:
        return None
    return (
        f"{length} positions need {needed / 2**20:.0f} MiB of on-chip memory, and "
        f"{_VMEM_SHARE:.0%} of {capacity / 2**20:.0f} MiB can be used"
    )


def short_conv(
    before_BSD: jax.Array, x_BND: jax.Array, h_TD: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """y_n = sum_t h_t x_{n-t} per channel, in float32.

    Args:
      before_BSD: the T - 1 positions before x.
      x_BND: bfloat16 or float32; N must be a multiple of 16 and D of 128.
      h_TD: T taps, at most 9.
      interpret: runs the kernel as ordinary JAX operations, on any platform.

    Returns:
      [B, N, D] in the dtype of x.
    """
    _, N, D = x_BND.shape
    pad = _MARGIN - before_BSD.shape[1]
    before_BSD = jnp.pad(before_BSD.astype(jnp.float32), ((0, 0), (pad, 0), (0, 0)))
    rows = next(rows for rows in _ROWS if N % rows == 0)
    plan = _Plan(rows, _channels(N, D, x_BND.dtype, interpret), interpret)
    return _convolve(before_BSD, x_BND, h_TD.astype(jnp.float32), plan)


def _channels(length: int, channels: int, dtype: DTypeLike, interpret: bool) -> int:
    """As many channels as fit in a grid cell: their rows are contiguous in memory."""
    sizes = range(_LANES, min(channels, _MAX_CHANNELS) + 1, _LANES)
    if interpret:
        return max(size for size in sizes if channels % size == 0)
    limit = _VMEM_SHARE * pltpu.get_tpu_info().vmem_capacity_bytes
    return max(
        size for size in sizes if channels % size == 0 and _vmem(length, size, dtype) <= limit
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(before_BSD: jax.Array, x_BND: jax.Array, h_TD: jax.Array, plan: _Plan) -> jax.Array:
    inputs = before_BSD, x_BND, h_TD
    (y_BND,) = _call(_forward, "short_conv_forward", plan, inputs, [(x_BND.shape, x_BND.dtype)])
    return y_BND


def _convolve_forward(
    before_BSD: jax.Array, x_BND: jax.Array, h_TD: jax.Array, plan: _Plan
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _convolve(before_BSD, x_BND, h_TD, plan), (before_BSD, x_BND, h_TD)


def _convolve_backward(
    plan: _Plan, inputs: tuple[jax.Array, jax.Array, jax.Array], dy_BND: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    before_BSD, x_BND, h_TD = inputs
    T, D = h_TD.shape
    outputs = [(before_BSD.shape, jnp.float32), (x_BND.shape, x_BND.dtype)]
    outputs.append(((T, _MARGIN, D), jnp.float32))
    dbefore_BSD, dx_BND, dh_TSD = _call(
        _backward, "short_conv_backward", plan, (*inputs, dy_BND), outputs
    )
    return dbefore_BSD, dx_BND, jnp.sum(dh_TSD, 1)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _forward(
    before_1SC: Any, x_1NC: Any, h_TC: Any, y_1NC: Any, window_WC: Any, *, plan: _Plan
) -> None:
    window_WC[:_MARGIN] = before_1SC[0]

    def chunk(g: jax.Array) -> None:
        at = _chunk(g, plan)
        window_WC[_MARGIN:] = x_1NC[0, at].astype(jnp.float32)
        shifted = [window_WC[_MARGIN - t : _MARGIN - t + plan.rows] for t in range(len(h_TC))]
        y_1NC[0, at] = _weighted(shifted, h_TC).astype(y_1NC.dtype)
        window_WC[:_MARGIN] = window_WC[plan.rows :]

    num_chunks = x_1NC.shape[1] // plan.rows
    body.each(num_chunks, chunk)


def _backward(
    before_1SC: Any, x_1NC: Any, h_TC: Any, dy_1NC: Any, dbefore_1SC: Any, dx_1NC: Any,
    dh_TSC: Any, window_WC: Any, *, plan: _Plan,
) -> None:  # fmt: skip
    """From the last chunk to the first; a window ends with the first rows of the chunk after it."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dh_TSC[...] = jnp.zeros(dh_TSC.shape, jnp.float32)

    def cotangents(x_RC: jax.Array) -> jax.Array:
        shifted = [window_WC[t : t + len(x_RC)] for t in range(len(h_TC))]
        for t, dy_RC in enumerate(shifted):
            products = (x_RC * dy_RC).reshape(-1, _MARGIN, x_RC.shape[1])
            dh_TSC[t] += jnp.sum(products, 0)
        return _weighted(shifted, h_TC)

    num_chunks = x_1NC.shape[1] // plan.rows
    window_WC[plan.rows :] = jnp.zeros((_MARGIN, window_WC.shape[1]), jnp.float32)

    def chunk(i: jax.Array) -> None:
        at = _chunk(num_chunks - 1 - i, plan)
        window_WC[: plan.rows] = dy_1NC[0, at].astype(jnp.float32)
        dx_1NC[0, at] = cotangents(x_1NC[0, at].astype(jnp.float32)).astype(dx_1NC.dtype)
        window_WC[plan.rows :] = window_WC[:_MARGIN]

    body.each(num_chunks, chunk)
    window_WC[_MARGIN : 2 * _MARGIN] = window_WC[:_MARGIN]
    window_WC[:_MARGIN] = jnp.zeros((_MARGIN, window_WC.shape[1]), jnp.float32)
    dbefore_1SC[0] = cotangents(before_1SC[0])


def _chunk(g: jax.Array, plan: _Plan) -> Any:
    return pl.ds(pl.multiple_of(g * plan.rows, plan.rows), plan.rows)


def _weighted(shifted: Sequence[jax.Array], h_TC: Any) -> jax.Array:
    return functools.reduce(jnp.add, [x_RC * h_TC[t : t + 1] for t, x_RC in enumerate(shifted)])


def _call(
    kernel: Callable[..., None],
    name: str,
    plan: _Plan,
    inputs: Sequence[jax.Array],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
) -> Sequence[jax.Array]:
    """Runs a kernel over groups of channels and, innermost, sequences."""
    B, N, D = inputs[1].shape
    C, T = plan.channels, len(inputs[2])
    before = pl.BlockSpec((1, _MARGIN, C), lambda d, b: (b, 0, d))
    activation = pl.BlockSpec((1, N, C), lambda d, b: (b, 0, d))
    taps = pl.BlockSpec((T, C), lambda d, b: (0, d))
    sums = pl.BlockSpec((T, _MARGIN, C), lambda d, b: (0, 0, d))
    varying = jax.typeof(inputs[1]).manual_axis_type
    limit = None if plan.interpret else int(0.95 * pltpu.get_tpu_info().vmem_capacity_bytes)

    def build(cost: pl.CostEstimate | None) -> Callable[..., Any]:
        return pl.pallas_call(
            functools.partial(kernel, plan=plan),
            name=name,
            grid=(D // C, B),
            in_specs=[before, activation, taps, activation][: len(inputs)],
            out_specs=[activation] if len(outputs) == 1 else [before, activation, sums],
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
                for shape, dtype in outputs
            ],
            scratch_shapes=[pltpu.VMEM((plan.rows + _MARGIN, C), jnp.float32)],
            interpret=plan.interpret,
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=limit, dimension_semantics=("parallel", "arbitrary")
            ),
            cost_estimate=cost,
        )

    return with_cost(build, inputs)


def _vmem(length: int, channels: int, dtype: DTypeLike) -> int:
    """Bytes on chip of the backward pass, which needs more: x, dy and dx, double-buffered."""
    return 2 * 3 * length * channels * jnp.dtype(dtype).itemsize
