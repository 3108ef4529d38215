"""Wavelet transforms along positions, per channel, with the published orthogonal filters.

`dwt`, `idwt`, `wavedec` and `waverec` are PyWavelets' decimated transform, with its boundary modes,
shapes and order of coefficients, for analysis and for bidirectional models. `causal_wavedec` is the
undecimated ("a trous") transform for causal models: its filters see only the past, and positions
before the sequence count as zero.

Filters are computed by shift-and-add. For a grouped convolution XLA would gather a sharded axis,
whereas shifts are cheap; and as the taps are constants, the backward pass stores no activations.
Coefficients come from PyWavelets: db1-db8, sym2-sym8, coif1-coif5 and its other orthogonal ones.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pywt

from spectral_pod.ops.halo import previous
from spectral_pod.parallel.sharding import num_shards, shard_op
from spectral_pod.shapes import Positions

Boundary = Literal[
    "zero",
    "constant",
    "symmetric",
    "periodic",
    "smooth",
    "periodization",
    "reflect",
    "antisymmetric",
    "antireflect",
]

_AXES = ("batch", None, "channel")  # positions are not split: a filter reads across all of them


def dwt(
    x_BND: Positions, wavelet: str, mode: Boundary = "symmetric"
) -> tuple[jax.Array, jax.Array]:
    """One level of the decimated transform, as `pywt.dwt(x, wavelet, mode, axis=1)`.

    Computed in float32, or in float64 for a float64 input.

    Args:
      x_BND: real, any N >= 1.
      wavelet: the name of an orthogonal wavelet of PyWavelets, with W taps, W even.
      mode: how the sequence is extended beyond its ends.

    Returns:
      Approximation and detail, [B, (N + W - 1) // 2, D] each or, for "periodization",
      [B, ceil(N / 2), D], in the dtype of `x_BND`.

    Raises:
      ValueError: the wavelet is unknown or not orthogonal, or N is 1 and `mode` reflects.
    """
    bank = _bank(wavelet)
    op = functools.partial(_dwt, bank=bank, mode=mode)
    return shard_op(op, (_AXES,), (_AXES, _AXES))(x_BND)


def idwt(
    approximation_BND: Positions,
    detail_BND: Positions,
    wavelet: str,
    mode: Boundary = "symmetric",
) -> jax.Array:
    """The inverse of `dwt`, as `pywt.idwt`; one position too long if the sequence's length was odd.

    Args:
      approximation_BND, detail_BND: N coefficients each.
      wavelet, mode: as in `dwt`.

    Returns:
      [B, 2 N - W + 2, D] or, for "periodization", [B, 2 N, D], in the dtype of `detail_BND`.

    Raises:
      ValueError: there are fewer coefficients than `dwt` ever returns, or the wavelet is unknown
        or not orthogonal.
    """
    bank = _bank(wavelet)
    coefficients = detail_BND.shape[1]
    if coefficients < (1 if mode == "periodization" else len(bank.low) // 2):
        raise ValueError(
            f"{coefficients} coefficients are fewer than {wavelet} with mode {mode!r} makes"
        )
    op = functools.partial(_idwt, bank=bank, mode=mode)
    return shard_op(op, (_AXES, _AXES), _AXES)(approximation_BND, detail_BND)


def wavedec(
    x_BND: Positions, wavelet: str, levels: int, mode: Boundary = "symmetric"
) -> tuple[jax.Array, ...]:
    """`dwt` applied `levels` times: (a_levels, d_levels, ..., d_1), from coarse to fine."""
    details: tuple[jax.Array, ...] = ()
    for _ in range(levels):
        x_BND, detail_BND = dwt(x_BND, wavelet, mode)
        details = (detail_BND, *details)
    return (x_BND, *details)


def waverec(
    coefficients: Sequence[jax.Array], wavelet: str, mode: Boundary = "symmetric"
) -> jax.Array:
    """The inverse of `wavedec`, as `pywt.waverec`; one position too long if N was odd."""
    x_BND, *details = coefficients
    for detail_BND in details:
        # The inverse of a level whose input had an odd length is one position too long.
        if x_BND.shape[1] == detail_BND.shape[1] + 1:
            x_BND = x_BND[:, :-1]
        x_BND = idwt(x_BND, detail_BND, wavelet, mode)
    return x_BND


def causal_wavedec(
    x_BND: Positions,
    wavelet: str,
    levels: int,
    detail: Literal["difference", "high_pass"] = "difference",
) -> tuple[Positions, ...]:
    """The causal undecimated transform: an output sees its own and earlier positions only.

    a_0 = x,    a_{j+1}[t] = sum_n h[n] a_j[t - 2^j n],    d_j = a_j - a_{j+1}   or
    d_j[t] = sum_n g[n] a_j[t - 2^j n],

    with zeros before the sequence. h is the scaling filter in its published order (`rec_lo` of
    PyWavelets, whose early taps are the largest, so that a_j lags least), divided by its sum: then
    sum(h) = 1 and constants are preserved. g[n] = (-1)^(n+1) h[W - 1 - n] is its quadrature mirror.
    These are the filters of the MODWT (Percival and Walden 2000, chapter 5); the difference is the
    a trous detail (Shensa 1992).

    Args:
      x_BND: real, any float dtype; masked positions must already be zero.
      wavelet: the name of an orthogonal wavelet of PyWavelets, with W taps.
      levels: J >= 1.
      detail: "difference", for which the outputs sum to x, or "high_pass", which uses g.

    Returns:
      (a_J, d_{J-1}, ..., d_0), from coarse to fine, each [B, N, D] in the dtype of `x_BND`,
      computed in float32 or, for a float64 input, in float64.

    Raises:
      ValueError: the wavelet is unknown or not orthogonal, or positions are split over devices and
        a shard has fewer than `reach(wavelet, levels)`.
    """
    bank = _bank(wavelet)
    low, high = (tuple(tap / sum(bank.low) for tap in taps) for taps in bank)
    before = reach(wavelet, levels) if num_shards("position") > 1 else 0

    def op(x_BND: jax.Array) -> tuple[jax.Array, ...]:
        a_BND = _upcast(jnp.concatenate([previous(x_BND, before), x_BND], 1))
        details: tuple[jax.Array, ...] = ()
        for level in range(levels):
            smooth_BND = _causal_filter(a_BND, low, 2**level)
            if detail == "difference":
                d_BND = a_BND - smooth_BND
            else:
                d_BND = _causal_filter(a_BND, high, 2**level)
            a_BND, details = smooth_BND, (d_BND, *details)
        return tuple(y_BND[:, before:].astype(x_BND.dtype) for y_BND in (a_BND, *details))

    axes = ("batch", "position", "channel")
    return shard_op(op, (axes,), (axes,) * (levels + 1))(x_BND)


def reach(wavelet: str, levels: int) -> int:
    """How many positions before its own an output of `causal_wavedec` depends on.

    To decode, transform the last `reach + 1` inputs and take the last output, which is exact.

    Raises:
      ValueError: the wavelet is unknown or not orthogonal.
    """
    return (len(_bank(wavelet).low) - 1) * (2**levels - 1)


class _Bank(NamedTuple):
    """Synthesis filters in their published order; analysis applies them in reverse."""

    low: tuple[float, ...]
    high: tuple[float, ...]


def _bank(wavelet: str) -> _Bank:
    filters = pywt.Wavelet(wavelet)
    if not filters.orthogonal:
        raise ValueError(f"wavelet {wavelet!r} is not orthogonal; try a db, sym or coif one")
    return _Bank(tuple(filters.rec_lo), tuple(filters.rec_hi))


def _upcast(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _causal_filter(x_BND: jax.Array, taps: tuple[float, ...], dilation: int) -> jax.Array:
    """y[t] = sum_n taps[n] x[t - dilation n], with zeros before the sequence.

    The transpose is the same sum with opposite shifts. It is written by hand because XLA's own
    writes every shifted copy to memory and takes 12 times as long (CPU, 8 taps, 3 levels).
    """
    padding = dilation * (len(taps) - 1)
    padded_BND = jnp.pad(x_BND, ((0, 0), (padding, 0), (0, 0)))
    return _shift_and_add(padded_BND, taps[::-1], dilation)


def _causal_filter_forward(
    x_BND: jax.Array, taps: tuple[float, ...], dilation: int
) -> tuple[jax.Array, None]:
    return _causal_filter(x_BND, taps, dilation), None


def _causal_filter_backward(
    taps: tuple[float, ...], dilation: int, _: None, dy_BND: jax.Array
) -> tuple[jax.Array]:
    padding = dilation * (len(taps) - 1)
    padded_BND = jnp.pad(dy_BND, ((0, 0), (0, padding), (0, 0)))
    return (_shift_and_add(padded_BND, taps, dilation),)


_causal_filter.defvjp(_causal_filter_forward, _causal_filter_backward)


def _shift_and_add(x_BND: jax.Array, taps: Sequence[float], dilation: int = 1) -> jax.Array:
    """y[m] = sum_i taps[i] x[m + dilation i], for those m for which all terms exist."""
    M = x_BND.shape[1] - dilation * (len(taps) - 1)
    return sum(  # type: ignore[return-value]
        tap * jax.lax.slice_in_dim(x_BND, dilation * i, dilation * i + M, axis=1)
        for i, tap in enumerate(taps)
    )


def _dwt(x_BND: jax.Array, bank: _Bank, mode: Boundary) -> tuple[jax.Array, jax.Array]:
    """c[o] = sum_i f[i] x[2 o + i - (W - 2)], in two halves by the parity of i.

    For "periodization" W - 2 is replaced by W / 2 - 1.
    """
    N, W = x_BND.shape[1], len(bank.low)
    y_BND = _upcast(x_BND)
    if mode == "periodization":
        y_BND = _extend(_extend(y_BND, 0, N % 2, "constant"), W // 2 - 1, W // 2 - 1, "periodic")
    else:
        y_BND = _extend(y_BND, W - 2, 2 * ((N + W - 1) // 2) - N, mode)
    B, _, D = y_BND.shape
    pairs_BNTD = y_BND.reshape(B, -1, 2, D)
    even_BND, odd_BND = pairs_BNTD[:, :, 0], pairs_BNTD[:, :, 1]

    def analyse(taps: tuple[float, ...]) -> jax.Array:
        y_BND = _shift_and_add(even_BND, taps[0::2]) + _shift_and_add(odd_BND, taps[1::2])
        return y_BND.astype(x_BND.dtype)

    return analyse(bank.low), analyse(bank.high)


def _idwt(a_BND: jax.Array, d_BND: jax.Array, bank: _Bank, mode: Boundary) -> jax.Array:
    """x[t] = sum_o low[t - 2 o + W - 2] a[o] + the same sum with `high` and d.

    For "periodization" W - 2 is replaced by W / 2 - 1.
    """
    B, N, D = d_BND.shape
    padding = len(bank.low) // 4 if mode == "periodization" else 0
    a, d = (_extend(_upcast(c_BND), padding, padding, "periodic") for c_BND in (a_BND, d_BND))
    low, high = bank.low[::-1], bank.high[::-1]
    even_odd = [
        _shift_and_add(a, low[1 - parity :: 2]) + _shift_and_add(d, high[1 - parity :: 2])
        for parity in (0, 1)
    ]
    x_BND = jnp.stack(even_odd, 2).reshape(B, -1, D)
    if mode == "periodization":
        start = 2 * padding - len(bank.low) // 2 + 1
        x_BND = x_BND[:, start : start + 2 * N]
    return x_BND.astype(d_BND.dtype)


def _extend(x_BND: jax.Array, before: int, after: int, mode: Boundary) -> jax.Array:
    """Extends the sequence by `before` and `after` positions, according to the boundary mode."""
    N = x_BND.shape[1]
    beyond = np.concatenate([np.arange(-before, 0), np.arange(N, N + after)])
    index, weight, first, last = _beyond(beyond, N, mode)

    def column(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values, x_BND.dtype)[None, :, None]

    ends_BND = column(weight) * x_BND[:, index]
    if mode in ("smooth", "antireflect"):
        ends_BND += column(first) * x_BND[:, :1] + column(last) * x_BND[:, -1:]
    return jnp.concatenate([ends_BND[:, :before], x_BND, ends_BND[:, before:]], 1)


def _beyond(
    t: np.ndarray, N: int, mode: Boundary
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x[t] for t < 0 or t >= N as weight * x[index] + first * x[0] + last * x[N - 1]."""
    one, zero = np.ones_like(t), np.zeros_like(t)
    if mode == "zero":
        return zero, zero, zero, zero
    if mode == "constant" or (mode == "smooth" and N == 1):
        return np.clip(t, 0, N - 1), one, zero, zero
    if mode == "periodic":
        return t % N, one, zero, zero
    if mode in ("symmetric", "antisymmetric"):  # reflected about the edges, -1/2 and N - 1/2
        phase = t % (2 * N)
        sign = one if mode == "symmetric" else np.where(phase < N, 1, -1)
        return np.minimum(phase, 2 * N - 1 - phase), sign, zero, zero
    if mode == "smooth":  # extrapolated linearly from the first or last two positions
        left, steps = t < 0, np.where(t < 0, -t, t - (N - 1))
        first, last = np.where(left, 1 + steps, 0), np.where(left, 0, 1 + steps)
        return np.where(left, 1, N - 2), -steps, first, last
    if mode in ("reflect", "antireflect"):  # reflected about the end positions, 0 and N - 1
        if N == 1:
            raise ValueError(f"mode {mode!r} cannot extend a sequence of one position")
        turns, phase = np.divmod(t, 2 * N - 2)
        index = np.minimum(phase, 2 * N - 2 - phase)
        if mode == "reflect":
            return index, one, zero, zero
        # Every period adds 2 (x[N - 1] - x[0]); its second half runs back from the far end.
        falling = phase >= N
        return index, np.where(falling, -1, 1), -2 * turns, 2 * (turns + falling)
    raise ValueError(f"unknown boundary mode {mode!r}")
