"""The spectral filter as butterflies and small DFTs that stay on the chip: a kernel for TPUs.

Positions are cut into blocks of T, m = T a + b, and a period of n points has Q = n / T of them. The
bins k of one residue d modulo Q need only T numbers of the sequence,

    X_k = sum_b e^{-2 pi i k b / n} z_d[b],   z_d[b] = sum_a e^{-2 pi i a d / Q} x[T a + b],

which are a DFT across the blocks, the same for every b: its butterflies are sums and differences of
vector registers. What remains is one matrix product for each residue. As x is real, z_{Q-d} is the
conjugate of z_d, so that d = 0, ..., Q/2 are enough and z_0 and z_{Q/2} are real; blocks of zero
padding cost nothing. Let R be this transform with row k multiplied by sqrt(2 / n), for k = 0 and
n/2 by sqrt(1 / n). Then the filter is y = R^T (W R x), the gradient of x is R^T (conj(W) R dy), and
that of W is conj(R x) (R dy), summed over the batch: both matrices serve all of them. Bins stay in
the order of their residues, in which XLA puts W before the call and its gradient back after it. HBM
sees x, W, y and the matrices, and nothing else; channels lie on lanes as they do in HBM.

The matrix unit multiplies bfloat16 with float32 sums. For inputs in bfloat16 the blocks z, the
matrices, the filtered bins and the result are rounded, which together is 4e-3 (root mean square);
the result alone would be 1.7e-3. Inputs in float32 are sums of two such terms, as are the matrices,
in three products, and the error is at most 2e-5 of the largest result. The gradient of W has the
same errors. A rounded value reaches all positions, earlier ones too, so this is no way to compute a
causal filter; the spectral filter is two-sided.

Letters here: A blocks of a sequence; S sequences of a grid cell, X channels of a grid cell, Y all
its lanes (S X); C = Q/2 residues, where residue 0 holds z_0 and z_{Q/2}; J = 2T real numbers of a
residue; Z real and imaginary parts; M = n/2 bins, where the imaginary part of bin 0 is the real bin
n/2, and H = M / Q of them with the same k modulo Q; P terms of a sum; I rows of a register. The
others are in `shapes.py`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from spectral_pod.ops.kernels import body
from spectral_pod.ops.kernels.cost import with_cost
from spectral_pod.parallel.sharding import platform, vary_like

_LANES = 128
_SUBLANES = 8  # I
_TILE = 16  # rows of a register of bfloat16
_MAX_PERIOD = 64  # Q: more have no room in the registers; then T is larger, but at most 128
_MAX_SEQUENCES = 4  # of a grid cell, and points of all of them
_MAX_POINTS = 2048
_POINTS_OF_A_TRIP = 512  # T for each residue: their products overlap
_VMEM_SHARE = 0.85  # of on-chip memory, for what is counted here; the rest is the compiler's

Part = jax.Array | None  # None is zero
Complex = tuple[Part, Part]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one filter."""

    num_points: int  # n
    points: int  # T
    blocks: int  # of a sequence
    sequences: int  # of a grid cell
    terms: int  # of activations and matrices
    interpret: bool = False

    @property
    def period(self) -> int:
        """Q."""
        return self.num_points // self.points

    @property
    def residues(self) -> int:
        return self.period // 2


def unserved(length: int, fft_length: int, dtype: DTypeLike) -> str | None:
    """Why the kernels cannot compute these sizes on the current mesh; None if they can."""
    if platform() != "tpu":
        return f"it is a kernel for TPUs, and this is a {platform()}"
    if reason := _unfit(fft_length, dtype):
        return reason
    needed = _vmem(_plan(length, fft_length, 1, dtype), dtype)
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    if needed <= _VMEM_SHARE * capacity:
        return None
    return (
        f"{length} positions and FFTs of {fft_length} points need {needed / 2**20:.1f} MiB of "
        f"on-chip memory, and {_VMEM_SHARE:.0%} of {capacity / 2**20:.0f} MiB can be used"
    )


def _unfit(fft_length: int, dtype: DTypeLike) -> str | None:
    """Why no device can compute this; None if some can."""
    if fft_length < 2 * _TILE or fft_length & (fft_length - 1):
        return f"its FFT lengths are powers of two from {2 * _TILE}, and {fft_length} is none"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 and float32, not in {jnp.dtype(dtype)}"
    return None


def spectral_filter(
    x_BND: jax.Array, w_FD: jax.Array, fft_length: int, *, interpret: bool = False
) -> jax.Array:
    """`irfft(rfft(x, n) * W, n)[:N]` with n = `fft_length` >= N, a power of two, per channel.

    Args:
      x_BND: bfloat16 or float32.
      w_FD: complex64, F = n // 2 + 1.
      fft_length: n.
      interpret: runs the kernels as ordinary JAX operations, on any platform.

    Returns:
      [B, N, D] in the dtype of x.

    Raises:
      ValueError: `unserved` gives a reason.
    """
    (B, N, _), dtype = x_BND.shape, x_BND.dtype
    if reason := _unfit(fft_length, dtype) if interpret else unserved(N, fft_length, dtype):
        raise ValueError(f"a spectral filter cannot use method 'butterfly': {reason}")
    plan = dataclasses.replace(_plan(N, fft_length, B, dtype), interpret=interpret)
    x_BND = jnp.pad(x_BND, ((0, 0), (0, -N % plan.points), (0, 0)))
    return _filter(x_BND, w_FD.real, w_FD.imag, plan)[:, :N]


def _plan(length: int, fft_length: int, batch: int, dtype: DTypeLike) -> _Plan:
    points = min(64 if fft_length <= 64 * _MAX_PERIOD else 128, fft_length // 2)
    terms = 1 if jnp.dtype(dtype) == jnp.bfloat16 else 2
    plan = _Plan(fft_length, points, -(-length // points), 1, terms)
    most = min(_MAX_SEQUENCES, max(1, _MAX_POINTS // fft_length))
    return dataclasses.replace(plan, sequences=math.gcd(batch, most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _filter(x_BND: jax.Array, re_FD: jax.Array, im_FD: jax.Array, plan: _Plan) -> jax.Array:
    inputs = [_grouped(re_FD, im_FD, plan), x_BND]
    (y_BND,) = _call(_forward, "butterfly_forward", plan, inputs, [x_BND])
    return y_BND


def _filter_forward(
    x_BND: jax.Array, re_FD: jax.Array, im_FD: jax.Array, plan: _Plan
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _filter(x_BND, re_FD, im_FD, plan), (x_BND, re_FD, im_FD)


def _filter_backward(
    plan: _Plan, residuals: tuple[jax.Array, ...], dy_BND: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_BND, re_FD, im_FD = residuals
    inputs = [_grouped(re_FD, im_FD, plan), x_BND, dy_BND]
    outputs = [x_BND, inputs[0]]
    dx_BND, dw_QZHD = _call(_backward, "butterfly_backward", plan, inputs, outputs)
    return dx_BND, *_ungrouped(dw_QZHD)


_filter.defvjp(_filter_forward, _filter_backward)


def _grouped(re_FD: jax.Array, im_FD: jax.Array, plan: _Plan) -> jax.Array:
    """[Q, Z, H, D]: bins with the same k modulo Q together. The imaginary part of bin 0 has no
    effect, and bin n/2, which is real, is stored there."""
    M = plan.num_points // 2
    im_MD = jnp.where(jnp.arange(M)[:, None] == 0, re_FD[M:], im_FD[:M])
    w_ZMD = jnp.stack([re_FD[:M], im_MD])
    return jnp.transpose(w_ZMD.reshape(2, -1, plan.period, w_ZMD.shape[2]), (2, 0, 1, 3))


def _ungrouped(w_QZHD: jax.Array) -> tuple[jax.Array, jax.Array]:
    re_MD, im_MD = jnp.transpose(w_QZHD, (1, 2, 0, 3)).reshape(2, -1, w_QZHD.shape[3])
    own_MD = jnp.where(jnp.arange(len(im_MD))[:, None] == 0, 0.0, im_MD)
    return jnp.concatenate([re_MD, im_MD[:1]]), jnp.pad(own_MD, ((0, 1), (0, 0)))


def _forward(
    to_PCJJ: Any, from_PCJJ: Any, w_QZHX: Any, x_SNX: Any, y_SNX: Any, z_PCJY: Any, v_CJY: Any,
    *, plan: _Plan,
) -> None:  # fmt: skip
    _to_residues([(x_SNX, z_PCJY)], plan)

    def residue(c: jax.Array) -> None:
        x_ZTY = _transform(to_PCJJ, z_PCJY, c)
        y_ZTY = _times(_filter_bins(w_QZHX, c, plan), x_ZTY, c)
        v_CJY[c] = _product(from_PCJJ, c, body.terms(jnp.concatenate(y_ZTY), plan.terms))

    _each_residue(residue, plan)
    _from_residues(v_CJY, y_SNX, plan)


def _backward(
    to_PCJJ: Any, from_PCJJ: Any, w_QZHX: Any, x_SNX: Any, dy_SNX: Any, dx_SNX: Any, dw_QZHX: Any,
    z_PCJY: Any, dz_PCJY: Any, v_CJY: Any, *, plan: _Plan,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dw_QZHX[...] = jnp.zeros(dw_QZHX.shape, jnp.float32)

    _to_residues([(x_SNX, z_PCJY), (dy_SNX, dz_PCJY)], plan)

    def residue(c: jax.Array) -> None:
        x_ZTY, dy_ZTY = (_transform(to_PCJJ, z, c) for z in (z_PCJY, dz_PCJY))
        dw_ZTY = _times(x_ZTY, dy_ZTY, c, conjugate=True)
        _add_to_filter(dw_QZHX, c, dw_ZTY, plan)
        dx_ZTY = _times(_filter_bins(w_QZHX, c, plan), dy_ZTY, c, conjugate=True)
        v_CJY[c] = _product(from_PCJJ, c, body.terms(jnp.concatenate(dx_ZTY), plan.terms))

    _each_residue(residue, plan)
    _from_residues(v_CJY, dx_SNX, plan)


def _to_residues(pairs: Sequence[tuple[Any, Any]], plan: _Plan) -> None:
    """Transforms across the blocks, some positions b of all blocks at a time."""

    def tile(i: jax.Array) -> None:
        for (x_SNX, z_PCJY), s in itertools.product(pairs, range(plan.sequences)):
            x_A2I = [
                jnp.split(x_SNX[s, _tile(i, a * plan.points)].astype(jnp.float32), 2)
                for a in range(plan.blocks)
            ]
            for half in range(2):
                z_C = _packed(_residues([x_2I[half] for x_2I in x_A2I], plan.period))
                for c, z in enumerate(z_C):
                    for p, term in enumerate(body.terms(jnp.concatenate(z), plan.terms)):
                        z_PCJY[p, c, _tile(2 * i + half), _lanes(s)] = term

    body.each(plan.points // _TILE, tile)


def _from_residues(v_CJY: Any, y_SNX: Any, plan: _Plan) -> None:
    """The transpose of `_to_residues`."""

    def tile(i: jax.Array) -> None:
        for s in range(plan.sequences):
            halves = []
            for half in range(2):
                v_C = [v_CJY[c, _tile(2 * i + half), _lanes(s)] for c in range(plan.residues)]
                halves.append(_blocks(_unpacked([jnp.split(v, 2) for v in v_C]), plan.blocks))
            for a, y_2I in enumerate(zip(*halves, strict=True)):
                y_SNX[s, _tile(i, a * plan.points)] = jnp.concatenate(y_2I).astype(y_SNX.dtype)

    body.each(plan.points // _TILE, tile)


def _residues(x_A: list[jax.Array], period: int) -> list[Complex]:
    """z_d = sum_a e^{-2 pi i a d / Q} x_a for d = 0, ..., Q/2; missing x are zero.

    A fast Fourier transform of real numbers by decimation in time: with the transforms E and O of
    even and odd a, and t = e^{-2 pi i d / Q} O_d, both z_d = E_d + t and z_{Q/2-d} = conj(E_d - t).
    """
    if period == 1:
        return [(x_A[0], None)]
    even = _residues(x_A[::2], period // 2)
    odd = _residues(x_A[1::2], period // 2) if x_A[1::2] else [(None, None)] * len(even)
    z: list[Complex] = [(None, None)] * (period // 2 + 1)
    for d, (e, o) in enumerate(zip(even, odd, strict=True)):
        t = _rotated(o, -d, period)
        (re, mirrored_re), (im, mirrored_im) = map(_sum_and_difference, e, t)
        z[d] = re, im
        if 4 * d < period:
            z[period // 2 - d] = mirrored_re, _scaled(mirrored_im, -1.0)
    return z


def _blocks(z: list[Complex], blocks: int) -> list[jax.Array]:
    """The transpose of `_residues`, for the first x: sum_d Re(e^{2 pi i a d / Q} z_d)."""
    period = 2 * (len(z) - 1)
    if blocks == 0:
        return []
    if period == 0:
        ((re, _),) = z
        assert re is not None
        return [re]
    even: list[Complex] = []
    odd: list[Complex] = []
    for d in range(period // 4 + 1):
        re, im = z[d]
        t: Complex = None, im
        if 4 * d < period:
            mirrored_re, mirrored_im = z[period // 2 - d]
            re, t_re = _sum_and_difference(re, mirrored_re)
            t_im, im = _sum_and_difference(im, mirrored_im)
            t = t_re, t_im
        else:  # E and O are real here
            im = None
        even.append((re, im))
        odd.append(_rotated(t, d, period))
    y: list[Any] = [None] * blocks
    y[::2], y[1::2] = _blocks(even, (blocks + 1) // 2), _blocks(odd, blocks // 2)
    return y


def _rotated(z: Complex, steps: int, period: int) -> Complex:
    """e^{2 pi i steps / Q} z."""
    angle = 2 * math.pi * steps / period
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    re, minus_re = _scaled(z[0], cos), _scaled(z[1], sin)
    im, plus_im = _scaled(z[1], cos), _scaled(z[0], sin)
    return _sum_and_difference(re, minus_re)[1], _sum_and_difference(im, plus_im)[0]


def _scaled(x: Part, factor: float) -> Part:
    if x is None or factor == 0.0:
        return None
    return x if factor == 1.0 else -x if factor == -1.0 else x * factor


def _sum_and_difference(x: Part, y: Part) -> tuple[Part, Part]:
    if x is None or y is None:
        return x if y is None else y, x if y is None else -y
    return x + y, x - y


def _packed(z: list[Complex]) -> list[list[jax.Array]]:
    """The parts of each residue; z_0 and z_{Q/2} are the parts of residue 0."""
    z = [(z[0][0], z[-1][0]), *z[1:-1]]
    zero = jnp.zeros((_SUBLANES, _LANES), jnp.float32)
    return [[zero if part is None else part for part in parts] for parts in z]


def _unpacked(z_C2I: list[list[jax.Array]]) -> list[Complex]:
    (first, last), *others = z_C2I
    return [(first, None), *((re, im) for re, im in others), (last, None)]


def _transform(to_PCJJ: Any, z_PCJY: Any, c: jax.Array) -> list[jax.Array]:
    """The bins of a residue: real and imaginary parts, [T, Y] each."""
    z_P = [z_PCJY[p, c] for p in range(z_PCJY.shape[0])]
    return jnp.split(_product(to_PCJJ, c, z_P), 2)


def _product(m_PCJJ: Any, c: jax.Array, x_P: Sequence[jax.Array]) -> jax.Array:
    """M_c X, of sums of terms, without the product of the smallest."""
    products = [
        jnp.dot(m_PCJJ[p, c], x, preferred_element_type=jnp.float32)
        for q, x in enumerate(x_P)
        for p in range(len(x_P) - q)
    ]
    return functools.reduce(jnp.add, products)


def _times(
    a_ZTY: Sequence[jax.Array], b_ZTY: Sequence[jax.Array], c: jax.Array, conjugate: bool = False
) -> list[jax.Array]:
    """a b, or conj(a) b, where the parts of the first bin of residue 0 are two real bins."""
    (a_re, a_im), (b_re, b_im) = a_ZTY, b_ZTY
    re, im = a_re * b_re, a_im * b_im
    row = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, re.shape[1]), 0)
    real = (row == 0) & (c == 0)
    if conjugate:
        both = re + im, a_re * b_im - a_im * b_re
    else:
        both = re - im, a_re * b_im + a_im * b_re
    top, rest = slice(_SUBLANES), slice(_SUBLANES, None)
    return [
        jnp.concatenate([jnp.where(real, alone[top], product[top]), product[rest]])
        for alone, product in zip((re, im), both, strict=True)
    ]


def _mirrored(c: jax.Array, plan: _Plan) -> jax.Array:
    """Residue of the second half of the bins: of the conjugate, or, for residue 0, of z_{Q/2}."""
    return jnp.where(c == 0, plan.residues, plan.period - c)


def _filter_bins(w_QZHX: Any, c: jax.Array, plan: _Plan) -> list[jax.Array]:
    """[T, Y] of each part, the same for all sequences."""
    groups = c, _mirrored(c, plan)
    parts = [jnp.concatenate([w_QZHX[q, z] for q in groups]) for z in range(2)]
    return [jnp.concatenate([part_TX] * plan.sequences, axis=1) for part_TX in parts]


def _add_to_filter(dw_QZHX: Any, c: jax.Array, dw_ZTY: Sequence[jax.Array], plan: _Plan) -> None:
    for z, dw_TY in enumerate(dw_ZTY):
        dw_TX = functools.reduce(jnp.add, jnp.split(dw_TY, plan.sequences, axis=1))
        for q, dw_HX in zip((c, _mirrored(c, plan)), jnp.split(dw_TX, 2), strict=True):
            dw_QZHX[q, z] += dw_HX


def _each_residue(residue: Callable[[jax.Array], None], plan: _Plan) -> None:
    """Several in a trip, so that the matrix unit need not wait for any."""
    together = min(plan.residues, _POINTS_OF_A_TRIP // plan.points)

    def some(i: jax.Array) -> None:
        for k in range(together):
            residue(i * together + k)

    body.each(plan.residues // together, some)


def _tile(i: jax.Array, start: int = 0) -> Any:
    return pl.ds(pl.multiple_of(start + i * _TILE, _TILE), _TILE)


def _lanes(s: int) -> slice:
    return slice(s * _LANES, (s + 1) * _LANES)


@functools.lru_cache(maxsize=8)
def _matrices(num_points: int, points: int, terms: int) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 [P, C, J, J]: for each residue the matrix from z to bins, and its transpose.

    z comes in tiles of eight real parts and the eight imaginary parts of the same b.
    """
    period, half, b_T = num_points // points, points // 2, np.arange(points)
    residues = np.arange(period // 2)[:, None]
    mirrored = np.where(residues == 0, period // 2, period - residues)
    k_CT = np.concatenate([start + period * np.arange(half) for start in (residues, mirrored)], 1)
    angle_CTT = 2 * np.pi / num_points * (k_CT[:, :, None] * b_T % num_points)
    cos, sin = np.cos(angle_CTT), np.sin(angle_CTT)
    is_first_T1 = (b_T < half)[:, None]  # the other half of the bins are those of conj(z)
    sign_T1 = np.where(is_first_T1, 1.0, -1.0)
    to_CJJ = np.block([[cos, sign_T1 * sin], [-sin, sign_T1 * cos]])
    parts = is_first_T1, ~is_first_T1  # z_0 and z_{Q/2}
    to_CJJ[0] = np.block([[trig * is_own for is_own in parts] for trig in (cos[0], -sin[0])])
    to_CJJ[0, points, :points] = (-1.0) ** b_T  # bin n/2
    to_CJJ[0, ::points] *= math.sqrt(0.5)
    order_J = np.arange(2 * points).reshape(2, -1, _SUBLANES).swapaxes(0, 1).ravel()
    to_CJJ = math.sqrt(2 / num_points) * to_CJJ[:, :, order_J]
    to_PCJJ = []
    for _ in range(terms):
        to_PCJJ.append(to_CJJ.astype(jnp.bfloat16))
        to_CJJ = to_CJJ - to_PCJJ[-1].astype(np.float64)
    return np.stack(to_PCJJ), np.stack(to_PCJJ).swapaxes(2, 3)


def _call(
    kernel: Callable[..., None],
    name: str,
    plan: _Plan,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.Array],
) -> Sequence[jax.Array]:
    """Runs a kernel over groups of channels and, innermost, groups of sequences."""
    w_QZHD, *activations = inputs
    B, N, D = activations[0].shape
    matrices = [
        vary_like(jnp.asarray(m_PCJJ), activations[0])
        for m_PCJJ in _matrices(plan.num_points, plan.points, plan.terms)
    ]
    _, C, J, _ = matrices[0].shape
    once, lanes = pl.Buffered(1), plan.sequences * _LANES
    matrix = pl.BlockSpec(matrices[0].shape, lambda d, b: (0, 0, 0, 0), pipeline_mode=once)
    bins = pl.BlockSpec((*w_QZHD.shape[:3], _LANES), lambda d, b: (0, 0, 0, d), pipeline_mode=once)
    activation = pl.BlockSpec((plan.sequences, N, _LANES), lambda d, b: (b, 0, d))
    z_PCJY = pltpu.VMEM((plan.terms, C, J, lanes), jnp.bfloat16)
    varying = jax.typeof(activations[0]).manual_axis_type
    limit = None if plan.interpret else int(0.95 * pltpu.get_tpu_info().vmem_capacity_bytes)

    def build(cost: pl.CostEstimate | None) -> Callable[..., Any]:
        return pl.pallas_call(
            functools.partial(kernel, plan=plan),
            name=name,
            grid=(pl.cdiv(D, _LANES), B // plan.sequences),
            in_specs=[matrix, matrix, bins, *[activation] * len(activations)],
            out_specs=[activation, bins][: len(outputs)],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in outputs
            ],
            scratch_shapes=[
                *[z_PCJY] * len(activations),
                pltpu.VMEM((C, J, lanes), jnp.float32),
            ],
            interpret=plan.interpret,
            cost_estimate=cost,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit
            ),
        )

    return with_cost(build, [*matrices, *inputs])


def _vmem(plan: _Plan, dtype: DTypeLike) -> int:
    """Bytes on chip of the backward pass, which needs more: activations are double-buffered."""
    lanes, J = plan.sequences * _LANES, 2 * plan.points
    activations = 2 * 3 * plan.blocks * plan.points * lanes * jnp.dtype(dtype).itemsize
    bins = 2 * plan.num_points * _LANES * 4
    matrices = 2 * plan.terms * plan.residues * J * J * 2
    scratch = plan.residues * J * lanes * (2 * plan.terms * 2 + 4)
    return activations + bins + matrices + scratch
