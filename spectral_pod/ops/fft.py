"""Filtering along the sequence in the frequency domain, with real FFTs.

For real x the real part of a full complex FFT filter `Re(IFFT(W . FFT(x)))` equals the real FFT
filter with the Hermitian part of W, `(W[k] + conj W[-k]) / 2`: the same functions at half the
parameters and half the work (`reference.spectral_filter_complex` is the independent form).
"""

import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import shard_op
from spectral_pod.shapes import Positions, Spectrum


def spectral_filter(x_BND: Positions, w_FD: Spectrum, fft_length: int) -> Positions:
    """`irfft(rfft(x, n) * W, n)[:N]` with n = `fft_length`, per channel, in float32.

    With n >= 2N the ends of the sequence do not wrap into each other (a linear convolution with a
    kernel of lags -N < t < N); with n = N the convolution is circular.

    Args:
      x_BND: real, any float dtype; masked positions must already be zero. N <= n.
      w_FD: complex64 transfer function, F = n // 2 + 1.
      fft_length: n.

    Returns:
      [B, N, D] in the dtype of `x_BND`.

    Raises:
      ValueError: the sequence is longer than the filter, or F does not fit n.
    """
    if x_BND.shape[1] > fft_length or w_FD.shape[0] != fft_length // 2 + 1:
        raise ValueError(
            f"a filter of {w_FD.shape[0]} bins and an FFT of {fft_length} points cannot serve "
            f"{x_BND.shape[1]} positions"
        )

    def filter_block(x_BND: jax.Array, w_FD: jax.Array) -> jax.Array:
        x_BDN = jnp.swapaxes(x_BND.astype(jnp.float32), 1, 2)  # FFTs are fastest along rows
        y_BDF = jnp.fft.rfft(x_BDN, fft_length) * w_FD.T[None]
        y_BDN = jnp.fft.irfft(y_BDF, fft_length)[..., : x_BND.shape[1]]
        return jnp.swapaxes(y_BDN, 1, 2).astype(x_BND.dtype)

    activation = ("batch", None, "channel")
    return shard_op(filter_block, (activation, (None, "channel")), activation)(x_BND, w_FD)
