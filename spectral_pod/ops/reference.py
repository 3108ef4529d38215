"""Slow numpy float64 references of the operations: the independent truth the tests compare with."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def delta_rule(
    q_BNHK: ArrayLike,
    k_BNHK: ArrayLike,
    v_BNHV: ArrayLike,
    beta_BNH: ArrayLike,
    state_BHVK: ArrayLike | None = None,
    mask_BN: ArrayLike | None = None,
    clip: float | None = 10.0,
) -> tuple[Float64, Float64]:
    """The delta rule with clipped writes, one token after another.

    Each token reads its error e = v - S k, writes S += beta min(1, clip / |e||k|) e k^T, and then
    reads o = S q. A masked token writes nothing and reads 0. `clip=None` writes unclipped.

    Returns:
      The reads o_BNHV and the final state_BHVK.
    """
    q, k, v, beta = (np.asarray(x, np.float64) for x in (q_BNHK, k_BNHK, v_BNHV, beta_BNH))
    B, N, H, K = k.shape
    V = v.shape[-1]
    mask = np.ones((B, N), bool) if mask_BN is None else np.asarray(mask_BN)
    state = np.zeros((B, H, V, K)) if state_BHVK is None else np.array(state_BHVK, np.float64)
    o = np.zeros((B, N, H, V))
    for b, t, h in np.ndindex(B, N, H):
        if not mask[b, t]:
            continue
        key, memory = k[b, t, h], state[b, h]
        error = v[b, t, h] - memory @ key
        size = np.linalg.norm(error) * np.linalg.norm(key)
        rate = beta[b, t, h]
        if clip is not None and size > clip:
            rate *= clip / size
        memory += rate * np.outer(error, key)
        o[b, t, h] = memory @ q[b, t, h]
    return o, state


def spectral_filter(x_BND: np.ndarray, w_FD: np.ndarray, fft_length: int) -> np.ndarray:
    """The filter as a direct circular convolution of `fft_length` points, tap by tap.

    The kernel is the inverse DFT of the Hermitian extension of W, summed term by term.

    Args:
      x_BND: real [B, N, D], N <= fft_length.
      w_FD: complex [fft_length // 2 + 1, D].

    Returns:
      float64 [B, N, D].
    """
    B, N, D = x_BND.shape
    bins = np.arange(w_FD.shape[0])
    # DC and, at even lengths, the Nyquist bin stand alone; every other bin has a mirror image.
    alone = (bins == 0) | (2 * bins == fft_length)
    kernel_TD = np.zeros((fft_length, D))
    for t in range(fft_length):
        phase_F = np.exp(2j * np.pi * bins * t / fft_length) * np.where(alone, 1.0, 2.0)
        kernel_TD[t] = (phase_F[:, None] * w_FD).real.sum(axis=0) / fft_length
    y_BND = np.zeros((B, N, D))
    for n in range(N):
        for m in range(N):
            y_BND[:, n] += kernel_TD[(n - m) % fft_length] * x_BND[:, m]
    return y_BND
