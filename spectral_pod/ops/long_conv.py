"""Causal long convolution, y_n = sum_{t <= n} h_t u_{n - t} per channel: dispatch to a method.

The filter h is a layer's parameter or another sequence of the batch. Channels come before positions
here, [B, D, N], as in safari and FlashFFTConv: transforms run along rows, and a projection can
write this order at no cost.
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
from spectral_pod.ops.kernels import toeplitz, toeplitz_gpu
from spectral_pod.parallel.sharding import num_shards, platform, shard_op, vary_like

METHODS = ("right_angle", "real", "matmul")  # on any platform; a kernel is "toeplitz"
KERNELS: dict[str, types.ModuleType] = {"tpu": toeplitz, "gpu": toeplitz_gpu}

_MIN_BLOCK = 256  # points; shorter transforms cost more in overhead than they save
# Positions from which the kernel for TPUs is known to take fewer cycles than "matmul", and up to
# which that for GPUs should beat cuFFT, by a count; measured at 512 (docs/results.md).
_MIN_ON_TPUS, _MAX_ON_GPUS = 512, 4096


def choose(platform: str, length: int, num_taps: int, dtype: DTypeLike) -> Choice:
    """The fastest method: by measurement on CPUs, by compiled cost on TPUs, by a count on GPUs.

    "toeplitz" is a kernel, on TPUs for sequences that fit on the chip.
    """
    if platform == "cpu":
        return Choice("right_angle", "measured fastest on CPUs")
    if platform == "tpu":
        other, enough = "matmul", length >= _MIN_ON_TPUS
        rule = f"fewer cycles than 'matmul' from {_MIN_ON_TPUS:,} positions, as compiled"
    else:
        other, enough = "real", length <= _MAX_ON_GPUS
        rule = f"cheaper than cuFFT up to {_MAX_ON_GPUS:,} positions, by a count"
    reason = KERNELS[platform].unserved(length, num_taps, dtype) if enough else rule
    return Choice(other, f"not 'toeplitz': {reason}") if reason else Choice("toeplitz", rule)


def choose_product(platform: str) -> Choice:
    """As `choose`, for `causal_product`: a kernel serves several sequences with each filter, and
    here each has its own."""
    method = {"tpu": "matmul", "cpu": "right_angle"}.get(platform, "real")
    return Choice(method, "every sequence has a filter of its own, which no kernel serves")


def resolve(method: str, length: int, num_taps: int, dtype: DTypeLike) -> Choice:
    """The method itself, or that of `choose` on the mesh that is set: for "auto", and, with a
    warning, for a kernel that the device or the sizes rule out."""
    if method not in ("auto", "toeplitz"):
        return configured(method)
    chosen = choose(platform(), length, num_taps, dtype)
    if method == "auto":
        return chosen
    reason = kernels.unserved(KERNELS, length, num_taps, dtype)
    return kernels.instead_of(method, reason, chosen) if reason else configured(method)


def resolve_product(method: str) -> Choice:
    """As `resolve`, for `causal_product`."""
    return configured(method) if method in METHODS else choose_product(platform())


def causal_conv(u_BDN: jax.Array, h_DT: jax.Array, method: str = "auto") -> jax.Array:
    """Convolves every channel's sequence with that channel's filter, in float32.

    A sequence longer than twice the filter is processed in overlapping blocks, so the cost grows
    with N log T.

    Args:
      u_BDN: real, any float dtype; any N >= 1.
      h_DT: float32 taps from lag 0 on; any T >= 1. Taps of lags >= N have no effect.
      method: one of `METHODS`, "toeplitz", or "auto" to let `choose` decide. For tests,
        "toeplitz_interpreted" runs the kernel without a TPU, slowly.

    Returns:
      [B, D, N] in the dtype of u.

    Raises:
      ValueError: positions are split over devices and the sizes fit neither way of splitting the
        work (see `sequence_fft.py`).
    """
    length, h_DT = u_BDN.shape[2], h_DT[:, : u_BDN.shape[2]]
    num_points = block_length(length, h_DT.shape[1])
    convolve = _method(resolve(method, length, h_DT.shape[1], u_BDN.dtype).method)
    shards = num_shards("position")
    channels = u_BDN.shape[1] // num_shards("channel")
    if channels % shards:
        return sequence_fft.four_step(u_BDN, jnp.fft.rfft(h_DT, 2 * length).T)

    def on_device(u_BDN: jax.Array, h_DT: jax.Array) -> jax.Array:
        h_DT = vary_like(h_DT, u_BDN)
        if shards == 1:
            return convolve(u_BDN, h_DT, num_points)
        return sequence_fft.exchange(lambda u_BDN: convolve(u_BDN, h_DT, num_points), u_BDN)

    activation = ("batch", "channel", "position")
    channel = "channel" if shards == 1 else "exchanged_channel"
    return shard_op(on_device, (activation, (channel, None)), activation)(u_BDN, h_DT)


def causal_product(
    q_BDN: jax.Array, k_BDN: jax.Array, start_B: jax.Array, method: str = "auto"
) -> jax.Array:
    """The convolution of two sequences, y_n = sum_{t <= n} q_t k_{n - t} per channel, in float32.

    Here n and t count from `start_B`: if both sequences are delayed by d, so is their product. A
    plain convolution would delay it by 2 d. Every sequence of k acts as a filter, B D in all.

    Args:
      q_BDN, k_BDN: real, any float dtype; any N >= 1.
      start_B: first position of each sequence; all entries before it must be zero.
      method: as in `causal_conv`.

    Returns:
      [B, D, N] in the dtype of q.

    Raises:
      ValueError: positions are split and a device's channels are not a multiple of their shards.
    """
    convolve = _method(resolve_product(method).method)
    shards, channels = num_shards("position"), q_BDN.shape[1] // num_shards("channel")
    if channels % shards:
        raise ValueError(
            f"{channels} channels of a device cannot be exchanged for positions over {shards} "
            "devices: channels must be a multiple of the devices that share a sequence"
        )

    def whole(q_BDN: jax.Array, k_BDN: jax.Array, start_B: jax.Array) -> jax.Array:
        B, D, N = q_BDN.shape
        q_BDN = jax.vmap(lambda q_DN, start: jnp.roll(q_DN, -start, axis=1))(q_BDN, start_B)
        filters = k_BDN.reshape(B * D, N).astype(jnp.float32)
        return convolve(q_BDN.reshape(1, B * D, N), filters, block_length(N, N)).reshape(B, D, N)

    def on_device(q_BDN: jax.Array, k_BDN: jax.Array, start_B: jax.Array) -> jax.Array:
        if shards == 1:
            return whole(q_BDN, k_BDN, start_B)
        B, pair = len(q_BDN), jnp.concatenate([q_BDN, k_BDN.astype(q_BDN.dtype)])
        return sequence_fft.exchange(lambda pair: whole(pair[:B], pair[B:], start_B), pair)

    activation = ("batch", "channel", "position")
    run = shard_op(on_device, (activation, activation, ("batch",)), activation)
    return run(q_BDN, k_BDN, start_B)


def circular_product(q_BDN: jax.Array, k_BDN: jax.Array) -> jax.Array:
    """`irfft(rfft(q) rfft(k))` at N points, which wraps around: every position sees later ones.

    Published spectral language models compute this in place of `causal_product`; it is here to
    demonstrate the leak.

    Returns:
      float32 [B, D, N].
    """

    def op(q_BDN: jax.Array, k_BDN: jax.Array) -> jax.Array:
        q_BDF, k_BDF = (jnp.fft.rfft(x.astype(jnp.float32)) for x in (q_BDN, k_BDN))
        return jnp.fft.irfft(q_BDF * k_BDF, q_BDN.shape[2])

    activation = ("batch", "channel", None)
    return shard_op(op, (activation, activation), activation)(q_BDN, k_BDN)


def block_length(length: int, num_taps: int) -> int:
    """Points convolved at once: the whole sequence, or about as many as a short filter has."""
    at_least = max(num_taps, _MIN_BLOCK)
    return next_fast_len(length if 2 * at_least >= length else at_least)


def _method(name: str) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    methods: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
        "right_angle": _right_angle,
        "real": _real,
        "matmul": _matmul,
        "toeplitz": _toeplitz,
        "toeplitz_interpreted": functools.partial(_toeplitz, interpret=True),
    }
    return methods[name]


def _toeplitz(
    u_BDN: jax.Array, h_DT: jax.Array, num_points: int, interpret: bool = False
) -> jax.Array:
    del num_points
    if platform() != "gpu":
        return toeplitz.causal_conv(u_BDN, h_DT, interpret=interpret)
    u_BDN = toeplitz_gpu.channels_last(u_BDN)
    return toeplitz_gpu.channels_last(toeplitz_gpu.causal_conv(u_BDN, h_DT))


def _right_angle(u_BDN: jax.Array, h_DT: jax.Array, num_points: int) -> jax.Array:
    return right_angle.convolve(u_BDN, right_angle.spectrum(h_DT, num_points))


def _real(u_BDN: jax.Array, h_DT: jax.Array, num_points: int) -> jax.Array:
    h_DF = jnp.fft.rfft(h_DT, 2 * num_points)

    def circular(x_BDT: jax.Array) -> jax.Array:
        y_BDF = jnp.fft.rfft(x_BDT.astype(jnp.float32), 2 * num_points) * h_DF[None]
        y_BDT = jnp.fft.irfft(y_BDF, 2 * num_points)[..., : x_BDT.shape[2]]
        return y_BDT.astype(x_BDT.dtype)

    return _overlap_save(circular, u_BDN, num_points)


def _matmul(u_BDN: jax.Array, h_DT: jax.Array, num_points: int) -> jax.Array:
    factors = matmul_dft.factors(2 * num_points)
    if factors is None:  # the transform has fewer than four points
        return _real(u_BDN, h_DT, num_points)
    s_DCZQ = matmul_dft.spectrum(h_DT, factors)
    return _overlap_save(
        lambda x_BDT: matmul_dft.filter_real(x_BDT, s_DCZQ, factors), u_BDN, num_points
    )


def _overlap_save(
    circular: Callable[[jax.Array], jax.Array], u_BDN: jax.Array, num_points: int
) -> jax.Array:
    """The causal convolution by circular ones of 2M points, with M = `num_points` >= the taps.

    Every block of M points is convolved together with the block before it, whose own results
    are incomplete and are dropped.
    """
    B, D, N = u_BDN.shape
    if num_points >= N:
        return circular(u_BDN)
    u_BDGM = jnp.pad(u_BDN, ((0, 0), (0, 0), (0, -N % num_points))).reshape(B, D, -1, num_points)
    before_BDGM = jnp.pad(u_BDGM[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    pairs_BGDT = jnp.swapaxes(jnp.concatenate([before_BDGM, u_BDGM], 3), 1, 2)
    y_BGDT = circular(pairs_BGDT.reshape(-1, D, 2 * num_points)).reshape(pairs_BGDT.shape)
    return jnp.swapaxes(y_BGDT[..., num_points:], 1, 2).reshape(B, D, -1)[..., :N]
