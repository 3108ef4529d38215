"""Linear convolution without zero padding: right-angle convolution (Krot and Minervina 1992).

With w_t = e^{i pi t / 2M}, the M-point product

    z = conj(w) IFFT(FFT(w x) FFT(w h))

is multiplication modulo X^M = i: the terms that a circular convolution wraps around are multiplied
by i. For real x and h of up to M points, Re z is therefore the first M points of their linear
convolution and Im z the M points after them, from complex FFTs of M points where the usual method
needs real ones of 2M points, half of them zeros. Hence

- a causal filter is Re z with the filter's spectrum FFT(w h);
- a sequence longer than the filter is split into blocks of M points, and the Im z of each is added
  to the next: overlap-add, again without zero padding;
- a two-sided kernel with lags -M < t < M is the causal filter h - i a, where a_{M+t} holds lag
  t < 0: the wrap-around of the imaginary part supplies the negative lags.

On CPUs the work is divided into groups of channels that stay in the cache from the first FFT to the
last. The backward pass stores the two inputs only and recomputes the spectra. XLA on CPUs would
convert all of an array of bfloat16 to float32 before the loop over groups, and an output again for
every group; the loops read and write such arrays as integers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_GROUP_POINTS = 2**14  # points per sequence in a group of channels: 128 KiB as complex64


def spectrum(taps_DT: jax.Array, num_points: int) -> jax.Array:
    """FFT(w h), complex64 [D, M], of real or complex taps [D, T] with T <= M = `num_points`."""
    w_T = jnp.asarray(_twiddle(num_points)[: taps_DT.shape[1]])
    return jnp.fft.fft(taps_DT.astype(jnp.complex64) * w_T[None], num_points)


def two_sided_spectrum(w_FD: jax.Array, num_points: int) -> jax.Array:
    """The spectrum [D, M] of the kernel whose real DFT of 2 (F - 1) points is `w_FD`."""
    num_lags = w_FD.shape[0] - 1
    kernel_DT = jnp.fft.irfft(w_FD.T, 2 * num_lags)
    ahead_DT = jnp.pad(kernel_DT[:, num_lags:], ((0, 0), (num_points - num_lags, 0)))
    behind_DT = jnp.pad(kernel_DT[:, :num_lags], ((0, 0), (0, num_points - num_lags)))
    return spectrum(jax.lax.complex(behind_DT, -ahead_DT), num_points)


@jax.custom_vjp
def convolve(x_BDN: jax.Array, s_DM: jax.Array) -> jax.Array:
    """The causal convolution of every channel with the filter whose spectrum is `s_DM`.

    Args:
      x_BDN: real, any float dtype; computed in float32.
      s_DM: complex64, from `spectrum`, or, if N <= M, from `two_sided_spectrum`.

    Returns:
      [B, D, N] in the dtype of x.
    """
    channels, groups = _channel_groups(*s_DM.shape)

    def one(i: jax.Array, y_BDN: jax.Array) -> jax.Array:
        x_BCN, s_CM = _get(words_BDN, i, channels, dtype), _get(s_DM, i, channels)
        y_BCN = _from_spectra(_spectra(x_BCN, s_CM.shape[1]) * s_CM[None, :, None], x_BCN.shape[2])
        return _put(y_BDN, y_BCN, i, dtype)

    dtype, words_BDN = x_BDN.dtype, _words(x_BDN)
    y_BDN = jax.lax.fori_loop(0, groups, one, jnp.zeros_like(words_BDN))
    return _from_words(y_BDN, dtype)


def _convolve_forward(
    x_BDN: jax.Array, s_DM: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x_BDN, s_DM), (x_BDN, s_DM)


def _convolve_backward(
    residuals: tuple[jax.Array, jax.Array], dy_BDN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """With G = FFT(w dy): dx = Re(conj(w) IFFT(G conj(S))) and dS = sum_b conj(G) X / M."""
    # Without the barrier XLA would store x as the forward loop reads it.
    x_BDN, s_DM = jax.lax.optimization_barrier(residuals)
    channels, groups = _channel_groups(*s_DM.shape)

    def one(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx_BDN, ds_DM = carry
        x_BCN, dy_BCN = (_get(words, i, channels, dtype) for words in (x_words_BDN, dy_words_BDN))
        s_CM = _get(s_DM, i, channels)
        num_points = s_CM.shape[1]
        g_BCGM = _cotangent_spectra(dy_BCN, num_points)
        dx_BCN = _from_cotangent_spectra(g_BCGM * s_CM.conj()[None, :, None], x_BCN.shape[2])
        ds_CM = jnp.sum(g_BCGM.conj() * _spectra(x_BCN, num_points), (0, 2)) / num_points
        return _put(dx_BDN, dx_BCN, i, dtype), _put(ds_DM, ds_CM, i)

    dtype, x_words_BDN, dy_words_BDN = x_BDN.dtype, _words(x_BDN), _words(dy_BDN)
    zeros = jnp.zeros_like(x_words_BDN), jnp.zeros_like(s_DM)
    dx_BDN, ds_DM = jax.lax.fori_loop(0, groups, one, zeros)
    return _from_words(dx_BDN, dtype), ds_DM


convolve.defvjp(_convolve_forward, _convolve_backward)


def _spectra(x_BCN: jax.Array, num_points: int) -> jax.Array:
    """FFT(w x) of the blocks of every sequence, complex [B, C, G, M]."""
    x_BCGM = _split_blocks(x_BCN, num_points)
    w_M = _twiddle(num_points)[None, None, None]
    return jnp.fft.fft(jax.lax.complex(x_BCGM * w_M.real, x_BCGM * w_M.imag))


def _from_spectra(z_BCGM: jax.Array, length: int) -> jax.Array:
    """Re(conj(w) IFFT(z)) of every block, plus the imaginary part of the block before."""
    w_M = _twiddle(z_BCGM.shape[3])[None, None, None]
    z_BCGM = jnp.fft.ifft(z_BCGM)
    y_BCGM = z_BCGM.real * w_M.real + z_BCGM.imag * w_M.imag
    if z_BCGM.shape[2] > 1:
        after_BCGM = z_BCGM.imag * w_M.real - z_BCGM.real * w_M.imag
        y_BCGM += jnp.pad(after_BCGM[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    return y_BCGM.reshape(*y_BCGM.shape[:2], -1)[..., :length]


def _cotangent_spectra(dy_BCN: jax.Array, num_points: int) -> jax.Array:
    """FFT(w (dy + i dy')), where dy' is the cotangent of the next block and so of Im z."""
    dy_BCGM = _split_blocks(dy_BCN, num_points)
    if dy_BCGM.shape[2] == 1:
        return _spectra(dy_BCN, num_points)
    after_BCGM = jnp.pad(dy_BCGM[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
    w_M = _twiddle(num_points)[None, None, None]
    return jnp.fft.fft(jax.lax.complex(dy_BCGM, after_BCGM) * w_M)


def _from_cotangent_spectra(z_BCGM: jax.Array, length: int) -> jax.Array:
    w_M = _twiddle(z_BCGM.shape[3])[None, None, None]
    z_BCGM = jnp.fft.ifft(z_BCGM)
    x_BCGM = z_BCGM.real * w_M.real + z_BCGM.imag * w_M.imag
    return x_BCGM.reshape(*x_BCGM.shape[:2], -1)[..., :length]


def _split_blocks(x_BCN: jax.Array, num_points: int) -> jax.Array:
    """[B, C, N] as float32 [B, C, G, M], zero-padded at the end."""
    B, C, N = x_BCN.shape
    padded = jnp.pad(x_BCN.astype(jnp.float32), ((0, 0), (0, 0), (0, -N % num_points)))
    return padded.reshape(B, C, -1, num_points)


def _twiddle(num_points: int) -> np.ndarray:
    return np.exp(0.5j * np.pi * np.arange(num_points) / num_points).astype(np.complex64)


def _channel_groups(num_channels: int, num_points: int) -> tuple[int, int]:
    """Channels of a group, a power of two that divides them all, and the number of groups."""
    most = 2 ** max(0, int(math.log2(_GROUP_POINTS / num_points)))
    channels = math.gcd(num_channels, most)
    return channels, num_channels // channels


def _words(x: jax.Array) -> jax.Array:
    """x, or the same bits as integers where it has 16 of them."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _from_words(words: jax.Array, dtype: DTypeLike) -> jax.Array:
    return words if words.dtype == dtype else jax.lax.bitcast_convert_type(words, dtype)


def _get(
    words: jax.Array, i: jax.Array, channels: int, dtype: DTypeLike | None = None
) -> jax.Array:
    group = jax.lax.dynamic_slice_in_dim(words, i * channels, channels, words.ndim - 2)
    return _from_words(group, dtype or words.dtype)


def _put(
    words: jax.Array, group: jax.Array, i: jax.Array, dtype: DTypeLike | None = None
) -> jax.Array:
    group, start = _words(group.astype(dtype or words.dtype)), i * group.shape[-2]
    return jax.lax.dynamic_update_slice_in_dim(words, group, start, words.ndim - 2)
