"""Slow float64 references of the operations in numpy, which the tests compare with."""

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
    log_gate_BNH: ArrayLike | None = None,
) -> tuple[Float64, Float64]:
    """The delta rule with clipped writes, one token at a time.

    Each token decays the state, S *= g, computes the prediction error e = v - S k, writes
    S += beta min(1, clip / |e||k|) e k^T, and then reads o = S q. A masked token leaves the state
    unchanged and its output is 0. `clip=None` disables clipping; without `log_gate_BNH` g is 1.

    Returns:
      The outputs o_BNHV and the final state_BHVK.
    """
    q, k, v, beta = (np.asarray(x, np.float64) for x in (q_BNHK, k_BNHK, v_BNHV, beta_BNH))
    B, N, H, K = k.shape
    V = v.shape[-1]
    log_gate = np.zeros((B, N, H)) if log_gate_BNH is None else np.asarray(log_gate_BNH, np.float64)
    mask = np.ones((B, N), bool) if mask_BN is None else np.asarray(mask_BN)
    state = np.zeros((B, H, V, K)) if state_BHVK is None else np.array(state_BHVK, np.float64)
    o = np.zeros((B, N, H, V))
    for b, t, h in np.ndindex(B, N, H):
        if not mask[b, t]:
            continue
        key, memory = k[b, t, h], state[b, h]
        memory *= np.exp(log_gate[b, t, h])
        error = v[b, t, h] - memory @ key
        size = np.linalg.norm(error) * np.linalg.norm(key)
        rate = beta[b, t, h]
        if clip is not None and size > clip:
            rate *= clip / size
        memory += rate * np.outer(error, key)
        o[b, t, h] = memory @ q[b, t, h]
    return o, state


def spectral_filter(x_BND: np.ndarray, w_FD: np.ndarray, fft_length: int) -> np.ndarray:
    """The frequency-domain filter as a direct circular convolution of `fft_length` points.

    The kernel is the inverse DFT of the Hermitian extension of W, summed term by term.

    Args:
      x_BND: real [B, N, D], N <= fft_length.
      w_FD: complex [fft_length // 2 + 1, D].

    Returns:
      float64 [B, N, D].
    """
    B, N, D = x_BND.shape
    bins = np.arange(w_FD.shape[0])
    # DC and, for even lengths, the Nyquist bin occur once; every other bin has a mirror image.
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


def causal_wavedec(
    x_BND: ArrayLike, low: ArrayLike, levels: int, high: ArrayLike | None = None
) -> tuple[Float64, ...]:
    """The causal undecimated wavelet transform, tap by tap.

    a_{j+1}[t] = sum_n low[n] a_j[t - 2^j n] with zeros before the sequence. d_j is a_j - a_{j+1},
    or, if given, the same sum with `high`.

    Returns:
      (a_J, d_{J-1}, ..., d_0), float64 [B, N, D] each.
    """

    def causal_filter(x_BND: Float64, taps: Float64, dilation: int) -> Float64:
        y_BND = np.zeros_like(x_BND)
        for t in range(x_BND.shape[1]):
            for n, tap in enumerate(taps):
                if t - dilation * n >= 0:
                    y_BND[:, t] += tap * x_BND[:, t - dilation * n]
        return y_BND

    a_BND, details = np.asarray(x_BND, np.float64), []
    for level in range(levels):
        smooth_BND = causal_filter(a_BND, np.asarray(low, np.float64), 2**level)
        if high is None:
            details.append(a_BND - smooth_BND)
        else:
            details.append(causal_filter(a_BND, np.asarray(high, np.float64), 2**level))
        a_BND = smooth_BND
    return (a_BND, *reversed(details))


def causal_convolution(x_ND: ArrayLike, h_ND: ArrayLike) -> Float64:
    """y_t = sum_{s <= t} h_{t-s} x_s per channel, along the last axis but one, term by term.

    Args:
      x_ND, h_ND: [..., N, D]; the leading axes broadcast.

    Returns:
      float64 [..., N, D].
    """
    x, h = (np.asarray(a, np.float64) for a in (x_ND, h_ND))
    y = np.zeros(np.broadcast_shapes(x.shape, h.shape))
    for s in range(x.shape[-2]):
        y[..., s:, :] += x[..., s : s + 1, :] * h[..., : x.shape[-2] - s, :]
    return y
