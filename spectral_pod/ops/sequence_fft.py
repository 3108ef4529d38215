"""Frequency-domain filtering with positions split over devices; both methods use `shard_op`.

`exchange`: an all-to-all exchanges positions for channels, each device filters whole sequences of
its channels, and a second all-to-all restores the layout.

`four_step`: for fewer channels than devices, the DFT itself is distributed. With P devices,
j = p M + r, k = c + 2 P d, and a zero second half (p < 2 P, but the signal ends at P M),

    X[c + 2 P d] = sum_r u^(2 P r d) u^(r c) sum_p u^(M p c) x[p M + r],    u = e^(-2 pi i / 2 P M).

The inner sum needs every p for some r (all-to-all), the outer one every r for some c (all-to-all).
The filter applies to the bins where they are, with two values of c on each device. Pairs of real
sequences are combined into complex ones. It communicates three times the bytes of `exchange`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.parallel.sharding import SEQUENCE, num_shards, shard_op, vary_like


def exchange(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, channels_last: bool = False
) -> jax.Array:
    """Applies `fn` to whole sequences of a device's share of the channels, which must divide.

    Args:
      x: [B, D, N], or [B, N, D] if `channels_last`.
    """
    channel, position = (2, 1) if channels_last else (1, 2)

    def moved(x: jax.Array, split_axis: int, concat_axis: int) -> jax.Array:
        return jax.lax.all_to_all(x, SEQUENCE, split_axis, concat_axis, tiled=True)

    return moved(fn(moved(x, channel, position)), position, channel)


def four_step(x_BDN: jax.Array, w_FD: jax.Array) -> jax.Array:
    """The linear convolution with the filter of transfer function `w_FD`, F = N + 1 bins.

    Args:
      x_BDN: real, any float dtype.
      w_FD: complex64.

    Returns:
      [B, D, N] in the dtype of x.

    Raises:
      ValueError: F is not N + 1, or N is not a multiple of the square of the number of devices
        that share a sequence.
    """
    shards, (_, D, N) = num_shards("position"), x_BDN.shape
    if w_FD.shape[0] != N + 1 or N % shards**2:
        raise ValueError(
            f"{D} channels and {N} positions cannot be filtered over {shards} devices a sequence: "
            f"either a device's channels must be a multiple of {shards}, or the positions one of "
            f"{shards**2} and the filter made for exactly them, not for {w_FD.shape[0] - 1}"
        )
    ends = w_FD[:1].real.astype(w_FD.dtype), w_FD[-1:].real.astype(w_FD.dtype)  # as in irfft
    w_LD = jnp.concatenate([ends[0], w_FD[1:-1], ends[1], w_FD[1:-1][::-1].conj()])
    w_CDM = jnp.transpose(w_LD.reshape(N // shards, 2 * shards, D), (1, 2, 0))
    activation = ("batch", "channel", "position")
    run = shard_op(_four_step, (activation, ("position", "channel", None)), activation)
    return run(x_BDN, w_CDM)


def _four_step(x_BDM: jax.Array, w_CDM: jax.Array) -> jax.Array:
    B, _, M = x_BDM.shape
    shards = num_shards("position")
    x = jnp.pad(x_BDM.astype(jnp.float32), ((0, B % 2), (0, 0), (0, 0)))
    z_BDM = jax.lax.complex(x[0::2], x[1::2])
    # Between the exchanges, device i of P holds r = i M / P + (0 .. M / P - 1).
    pieces = z_BDM.reshape(*z_BDM.shape[:2], shards, M // shards)
    z_BDPR = jax.lax.all_to_all(pieces, SEQUENCE, split_axis=2, concat_axis=2, tiled=True)
    dft_PC, phase_CR = _constants(shards, M)
    z_BDCR = jnp.einsum("bdpr,pc->bdcr", z_BDPR, dft_PC, precision="highest") * phase_CR[None, None]
    z_BDCM = jax.lax.all_to_all(z_BDCR, SEQUENCE, split_axis=2, concat_axis=3, tiled=True)
    w_DCM = vary_like(jnp.swapaxes(w_CDM, 0, 1), x_BDM)
    z_BDCM = jnp.fft.ifft(jnp.fft.fft(z_BDCM) * w_DCM[None])
    z_BDCR = jax.lax.all_to_all(z_BDCM, SEQUENCE, split_axis=3, concat_axis=2, tiled=True)
    z_BDCR *= phase_CR.conj()[None, None] / (2 * shards)
    z_BDPR = jnp.einsum("bdcr,pc->bdpr", z_BDCR, dft_PC.conj(), precision="highest")
    pieces = jax.lax.all_to_all(z_BDPR, SEQUENCE, split_axis=2, concat_axis=2, tiled=True)
    z_BDM = pieces.reshape(z_BDM.shape)
    y_BDM = jnp.stack([z_BDM.real, z_BDM.imag], 1).reshape(x.shape)[:B]
    return y_BDM.astype(x_BDM.dtype)


def _constants(shards: int, length: int) -> tuple[jax.Array, jax.Array]:
    """The DFT matrix [P, C] over devices, and this device's twiddle factors [C, M / P]."""
    p_P, c_C = np.arange(shards), np.arange(2 * shards)
    dft_PC = np.exp(-2j * np.pi * np.outer(p_P, c_C) / (2 * shards))
    phase = np.exp(-2j * np.pi * np.outer(c_C, np.arange(length)) / (2 * shards * length))
    start = jax.lax.axis_index(SEQUENCE) * (length // shards)
    phase_CM = jnp.asarray(phase.astype(np.complex64))
    phase_CR = jax.lax.dynamic_slice_in_dim(phase_CM, start, length // shards, 1)
    return jnp.asarray(dft_PC.astype(np.complex64)), phase_CR
