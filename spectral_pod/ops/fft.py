"""Filtering along the sequence in the frequency domain: dispatch to one of several methods.

For real x, the real part of a full complex FFT filter, `Re(IFFT(W . FFT(x)))`, equals the real FFT
filter with the Hermitian part of W, `(W[k] + conj W[-k]) / 2`: the same functions with half the
parameters and half the work.

All methods compute the same function:

- "right_angle": complex FFTs without zero padding, in blocks that fit a CPU's cache;
- "real": real FFTs of the padded sequences;
- "matmul": matrix products on an accelerator's matrix unit;
- "butterfly": a kernel for TPUs, which keeps a sequence on the chip from its first butterfly to its
  last; for FFT lengths that are powers of two. Its error is that of rounding bfloat16, or 2e-5;
- "toeplitz": a kernel for GPUs, which multiplies by blocks of the filter's Toeplitz matrix; for
  sequences of up to 8,192 positions. Its error is that of rounding bfloat16 once, or 2e-5;
- "plain": the formula itself, partitioned by XLA, which gathers the batch on every mesh; a baseline
  for measurements.
"""

import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from scipy.fft import next_fast_len

from spectral_pod.ops import kernels, matmul_dft, right_angle, sequence_fft
from spectral_pod.ops.choice import Choice, configured
from spectral_pod.ops.kernels import butterfly, toeplitz_gpu
from spectral_pod.parallel.sharding import num_shards, platform, shard_op, vary_like
from spectral_pod.shapes import Positions, Spectrum

METHODS = ("right_angle", "real", "matmul", "plain")  # on any platform
KERNELS: dict[str, types.ModuleType] = {"butterfly": butterfly, "toeplitz": toeplitz_gpu}

# Where "butterfly" is known to take fewer cycles than "matmul" (docs/results.md); a device's
# channels fill 128 lanes, or these are idle.
_MIN_BUTTERFLY = 128  # positions
_MIN_CHANNELS = 64
# Positions up to which "toeplitz" should beat cuFFT, by a count; measured at 512 (docs/results.md).
_MAX_TOEPLITZ = 1024


def choose(platform: str, length: int, fft_length: int, dtype: DTypeLike, channels: int) -> Choice:
    """The fastest method for whole sequences: by measurement on CPUs, by compiled cost on TPUs, and
    by a count on GPUs.

    "butterfly" is for FFT lengths that are powers of two, for sequences that fit on the chip, and
    for at least 64 `channels` of a device.
    """
    if platform == "cpu":
        if 2 * length <= fft_length and fft_length % 2 == 0:
            return Choice("right_angle", "measured fastest on CPUs")
        return Choice("real", f"an FFT of {fft_length:,} points wraps around or is odd")
    if platform == "tpu":
        other = "matmul" if matmul_dft.factors(fft_length) else "real"
        kernel, enough = "butterfly", length >= _MIN_BUTTERFLY and channels >= _MIN_CHANNELS
        rule = (
            f"fewer cycles than 'matmul' from {_MIN_BUTTERFLY} positions and {_MIN_CHANNELS} "
            "channels of a device, as compiled"
        )
    else:
        other, kernel, enough = "real", "toeplitz", length <= _MAX_TOEPLITZ
        rule = f"cheaper than cuFFT up to {_MAX_TOEPLITZ:,} positions, by a count"
    reason = KERNELS[kernel].unserved(length, fft_length, dtype) if enough else rule
    return Choice(other, f"not {kernel!r}: {reason}") if reason else Choice(kernel, rule)


def resolve(method: str, length: int, fft_length: int, dtype: DTypeLike, channels: int) -> Choice:
    """The method itself, or that of `choose` on the mesh that is set: for "auto", and, with a
    warning, for a kernel that the device or the sizes rule out.

    Args:
      channels: of all devices.
    """
    if method != "auto" and method not in KERNELS:
        return configured(method)
    channels //= num_shards("channel") * num_shards("position")
    chosen = choose(platform(), length, fft_length, dtype, channels)
    if method == "auto":
        return chosen
    reason = KERNELS[method].unserved(length, fft_length, dtype)
    return kernels.instead_of(method, reason, chosen) if reason else configured(method)


def spectral_filter(
    x_BND: Positions, w_FD: Spectrum, fft_length: int, method: str = "auto"
) -> Positions:
    """`irfft(rfft(x, n) * W, n)[:N]` with n = `fft_length`, per channel.

    With n >= 2N the sequence does not wrap around (a linear convolution with a kernel of lags
    -n/2 < t < n/2); with n = N the convolution is circular.

    Args:
      x_BND: real, any float dtype; masked positions must already be zero. N <= n.
      w_FD: complex64 transfer function, F = n // 2 + 1.
      fft_length: n.
      method: one of `METHODS` or `KERNELS`, or "auto" to let `choose` decide. For tests,
        "butterfly_interpreted" and "toeplitz_interpreted" run the kernels on any platform, slowly.

    Returns:
      [B, N, D] in the dtype of `x_BND`.

    Raises:
      ValueError: the sequence is longer than n, F does not fit n, or the method does not support
        these sizes.
    """
    length = x_BND.shape[1]
    if length > fft_length or w_FD.shape[0] != fft_length // 2 + 1:
        raise ValueError(
            f"a filter of {w_FD.shape[0]} bins and an FFT of {fft_length} points cannot serve "
            f"{length} positions"
        )
    method = resolve(method, length, fft_length, x_BND.dtype, x_BND.shape[2]).method
    if method == "plain":
        y_BFD = jnp.fft.rfft(x_BND.astype(jnp.float32), fft_length, axis=1) * w_FD[None]
        return jnp.fft.irfft(y_BFD, fft_length, axis=1)[:, :length].astype(x_BND.dtype)
    filter_whole = _METHODS[method](length, fft_length)
    shards = num_shards("position")
    channels = x_BND.shape[2] // num_shards("channel")
    channels_last = method in _CHANNELS_LAST

    def on_device(x_BND: jax.Array, w_FD: jax.Array) -> jax.Array:
        x, w_FD = x_BND if channels_last else jnp.swapaxes(x_BND, 1, 2), vary_like(w_FD, x_BND)
        if shards == 1:
            y = filter_whole(x, w_FD)
        else:
            y = sequence_fft.exchange(lambda x: filter_whole(x, w_FD), x, channels_last)
        return y if channels_last else jnp.swapaxes(y, 1, 2)

    if channels % shards:
        return jnp.swapaxes(sequence_fft.four_step(jnp.swapaxes(x_BND, 1, 2), w_FD), 1, 2)
    activation = ("batch", "position", "channel")
    channel = "channel" if shards == 1 else "exchanged_channel"
    return shard_op(on_device, (activation, (None, channel)), activation)(x_BND, w_FD)


def _right_angle(length: int, fft_length: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    if 2 * length > fft_length or fft_length % 2:
        raise ValueError(
            f"method 'right_angle' filters linearly: {length} positions need an even FFT length of "
            f"at least {2 * length}, not {fft_length}; use 'real'"
        )
    num_points = next_fast_len(fft_length // 2)
    return lambda x_BDN, w_FD: right_angle.convolve(
        x_BDN, right_angle.two_sided_spectrum(w_FD, num_points)
    )


def _real(length: int, fft_length: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def filter_whole(x_BDN: jax.Array, w_FD: jax.Array) -> jax.Array:
        y_BDF = jnp.fft.rfft(x_BDN.astype(jnp.float32), fft_length) * w_FD.T[None]
        return jnp.fft.irfft(y_BDF, fft_length)[..., :length].astype(x_BDN.dtype)

    return filter_whole


def _matmul(length: int, fft_length: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    factors = matmul_dft.factors(fft_length)
    if factors is None:
        raise ValueError(
            f"method 'matmul' needs an FFT length of small factors, and {fft_length} has none; use "
            "'real'"
        )
    return lambda x_BDN, w_FD: matmul_dft.filter_real(
        x_BDN, matmul_dft.ordered_spectrum(w_FD, factors), factors
    )


def _butterfly(
    length: int, fft_length: int, interpret: bool = False
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    del length
    return functools.partial(butterfly.spectral_filter, fft_length=fft_length, interpret=interpret)


def _toeplitz(
    length: int, fft_length: int, interpret: bool = False
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    del length

    def filter_whole(x_BDN: jax.Array, w_FD: jax.Array) -> jax.Array:
        x_BDN = toeplitz_gpu.channels_last(x_BDN)
        y_BDN = toeplitz_gpu.spectral_filter(x_BDN, w_FD, fft_length, interpret=interpret)
        return toeplitz_gpu.channels_last(y_BDN)

    return filter_whole


_Method = Callable[[int, int], Callable[[jax.Array, jax.Array], jax.Array]]  # of N and n
_CHANNELS_LAST: dict[str, _Method] = {
    "butterfly": _butterfly,
    "butterfly_interpreted": functools.partial(_butterfly, interpret=True),
}  # which filter [B, N, D]; the others filter [B, D, N]
_METHODS: dict[str, _Method] = {
    "right_angle": _right_angle,
    "real": _real,
    "matmul": _matmul,
    "toeplitz": _toeplitz,
    "toeplitz_interpreted": functools.partial(_toeplitz, interpret=True),
    **_CHANNELS_LAST,
}
