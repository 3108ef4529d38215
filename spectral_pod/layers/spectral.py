"""The bidirectional spectral mixer: a learned filter per channel, and an energy gate."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.errors import ConfigError
from spectral_pod.fields import Fraction, NonNegativeFloat, PositiveFloat
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dropout import Dropout
from spectral_pod.layers.mixer import Mixer
from spectral_pod.layers.parameter import parameter
from spectral_pod.layers.probes import frequency_share, probe, response, valid_mean
from spectral_pod.ops import fft
from spectral_pod.ops.choice import Choice
from spectral_pod.parallel.sharding import constrain, filter_axis, shard_op


class SpectralLayer(Mixer):
    """`gate(u) * u` with `u = irfft(rfft(x_masked) . W)[:N]`.

    The filter covers `max_positions`; shorter sequences use its shorter lags.

    Attributes:
      padding: 'linear' uses FFTs of 2N points, so that the ends do not wrap around; 'circular' uses
        N points (the original design).
      parametrization: 'frequency' learns W itself, of whose frequencies some may be selected
        (`train/selection.py`); 'time' learns the kernel, to which soft thresholding and dropout are
        applied before its transform.
      method: how the filter is computed, see `ops/fft.py`.
      initial, tau_min, tau_max: the initial kernels, see `initial_kernels`.
      energy_gate: 'rms' is `sigmoid(a log rms(u) + b)` with a, b learned per channel; 'norm' is
        `sigmoid(|u|)` (the original design: at least 0.999999 for unit variance and D = 256);
        'none'.
      energy_bias: the initial b. At 0 a gate starts half open where the rms is 1, and nearly closed
        where it is small; at 3 it starts 95% open.
      kernel_dropout, kernel_threshold: of the parametrization 'time'.
    """

    padding: Literal["linear", "circular"] = "linear"
    parametrization: Literal["frequency", "time"] = "frequency"
    method: Literal["auto", "right_angle", "real", "matmul", "butterfly", "toeplitz", "plain"] = (
        "auto"
    )
    initial: Literal["noise", "smooth", "small"] = "noise"
    tau_min: PositiveFloat = 1.0
    tau_max: NonNegativeFloat = 0.0
    energy_gate: Literal["rms", "norm", "none"] = "rms"
    energy_bias: float = 0.0
    kernel_dropout: Fraction = 0.0
    kernel_threshold: NonNegativeFloat = 0.0

    section = "spectral"
    can_be_causal = False
    definition = (("model.spectral.method", "plain"),)

    @classmethod
    def check(cls, config: Architecture) -> None:
        low, high = config.option("spectral.tau_min"), config.option("spectral.tau_max")
        if high and high < low:
            raise ConfigError(
                f"config.model.spectral.tau_max is {high}, less than tau_min = {low}; 0 is the "
                "whole context"
            )

    @classmethod
    def has_frequencies(cls, config: Architecture) -> bool:
        return bool(config.option("spectral.parametrization") == "frequency")

    @classmethod
    def methods(cls, config: Architecture, batch: int) -> dict[str, Choice]:
        circular = config.option("spectral.padding") == "circular"
        fft_length = config.max_positions * (1 if circular else 2)
        sizes = config.max_positions, fft_length, config.dtype, config.hidden_dim
        return {"spectral_filter": fft.resolve(config.option("spectral.method"), *sizes)}

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        width = x_BND.shape[-1]
        fft_length = {"linear": 2, "circular": 1}[self.padding] * self.max_positions
        x_BND = jnp.where(mask_BN[..., None], x_BND, jnp.zeros((), x_BND.dtype))
        w_FD = self._transfer(fft_length, width)
        probe(self, "response", lambda: response(w_FD))
        u_BND = fft.spectral_filter(x_BND, w_FD, fft_length, self.method)
        u_BND = constrain(u_BND, "batch", "position", "width")
        return self._gated(u_BND, mask_BN).astype(self.dtype)

    def _transfer(self, fft_length: int, width: int) -> jax.Array:
        """complex64 [F, D]: the filter's transfer function."""
        channels = filter_axis(width)
        kernels = initial_kernels(self.initial, self.tau_min, self.tau_max)
        if self.parametrization == "frequency":
            axes = (None, "frequency", channels)
            shape = (2, fft_length // 2 + 1, width)
            init = parameter(transfer_functions(kernels), *axes, group="dynamics")
            real_imag = self.param("filter", init, shape)
            probe(self, "frequency_share", lambda: frequency_share(real_imag))
            return jax.lax.complex(real_imag[0], real_imag[1])
        init = parameter(kernels, "tap", channels, group="dynamics")
        kernel = self.param("filter", init, (fft_length, width))
        shrunk = jnp.maximum(jnp.abs(kernel) - self.kernel_threshold, 0.0) * jnp.sign(kernel)
        drop = Dropout(self.kernel_dropout, self.deterministic, axes=("tap", channels))
        shrunk = drop(shrunk)
        # Every device transforms the whole kernel, which is small; no batch is involved.
        return jnp.fft.rfft(constrain(shrunk, None, None), axis=0)

    def _gated(self, u_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        if self.energy_gate == "none":
            return u_BND
        if self.energy_gate == "norm":
            probe(self, "energy_gate_mean", lambda: valid_mean(norm_gate(u_BND), mask_BN))
            return norm_gate(u_BND) * u_BND.astype(jnp.float32)
        gate = gate_parameters(self, u_BND.shape[-1], self.energy_bias)
        probe(self, "energy_gate_mean", lambda: valid_mean(rms_gate(u_BND, *gate), mask_BN))
        return rms_gated(u_BND, *gate)


def gate_parameters(module: nn.Module, width: int, start: float) -> tuple[jax.Array, jax.Array]:
    """The slope and the bias of a module's energy gate, float32 [D] each; `start` is the first
    bias."""
    slope = parameter(nn.initializers.ones_init(), "width", group="dynamics")
    bias = parameter(nn.initializers.constant(start), "width", group="dynamics")
    return (
        module.param("energy_slope", slope, (width,)),
        module.param("energy_bias", bias, (width,)),
    )


def rms_gate(u_BND: jax.Array, slope_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """`sigmoid(a log rms(u) + b)`, float32 [B, N, D]; at a = 1, b = 0 it is rms / (1 + rms)."""
    return _gate(_log_rms(u_BND), slope_D, bias_D)


@jax.custom_vjp
def rms_gated(u_BND: jax.Array, slope_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """`rms_gate(u) * u`, float32, with a hand-written gradient that stores only u and its rms."""
    return rms_gate(u_BND, slope_D, bias_D) * u_BND.astype(jnp.float32)


def _rms_gated_forward(
    u_BND: jax.Array, slope_D: jax.Array, bias_D: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    log_rms_BN1 = jax.lax.optimization_barrier(_log_rms(u_BND))
    y_BND = _gate(log_rms_BN1, slope_D, bias_D) * u_BND.astype(jnp.float32)
    return y_BND, (u_BND, log_rms_BN1, slope_D, bias_D)


def _rms_gated_backward(
    residuals: tuple[jax.Array, ...], dy_BND: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    u_BND, log_rms_BN1, slope_D, bias_D = jax.lax.optimization_barrier(residuals)
    gate_BND = _gate(log_rms_BN1, slope_D, bias_D)
    dlogit_BND = dy_BND * u_BND.astype(jnp.float32) * gate_BND * (1 - gate_BND)
    dslope_D = jnp.einsum("bn,bnd->d", log_rms_BN1[..., 0], dlogit_BND, precision="highest")
    dlog_rms_BN = jnp.einsum("bnd,d->bn", dlogit_BND, slope_D, precision="highest")
    # d log rms(u) / du = u / (D rms(u)^2)
    rate_BN1 = dlog_rms_BN[..., None] * jnp.exp(-2 * log_rms_BN1) / slope_D.size
    # The gate is computed once more: XLA on CPUs would compute it as early as it can, and keep it.
    *again, rate_BN1 = jax.lax.optimization_barrier((log_rms_BN1, slope_D, bias_D, rate_BN1))
    du_BND = dy_BND * _gate(*again) + u_BND.astype(jnp.float32) * rate_BN1
    return du_BND.astype(u_BND.dtype), dslope_D, jnp.sum(dlogit_BND, (0, 1))


rms_gated.defvjp(_rms_gated_forward, _rms_gated_backward)


def _log_rms(u_BND: jax.Array) -> jax.Array:
    u_BND = u_BND.astype(jnp.float32)
    return 0.5 * jnp.log(jnp.mean(jnp.square(u_BND), axis=-1, keepdims=True) + 1e-6)


def _gate(log_rms_BN1: jax.Array, slope_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(slope_D[None, None] * log_rms_BN1 + bias_D[None, None])


def norm_gate(u_BND: jax.Array) -> jax.Array:
    """`sigmoid(|u|)`, [B, N, 1]: the original gate, nearly 1 for any u of ordinary size."""
    u_BND = u_BND.astype(jnp.float32)
    return jax.nn.sigmoid(jnp.sqrt(jnp.sum(jnp.square(u_BND), axis=-1, keepdims=True) + 1e-12))


Initializer = Callable[..., jax.Array]  # of a key, a shape and a dtype


def initial_kernels(kind: str, tau_min: float = 1.0, tau_max: float = 0.0) -> Initializer:
    """An initializer of circular kernels [T, D]: lag t at t, lag -t at T - t.

    Args:
      kind: 'noise' is white noise and 'smooth' one random number for all earlier positions and one
        for all later ones, under envelopes `exp(-|lag| / tau_d)`; their energy is 1 on average.
        'small' is white noise of standard deviation 0.002 without an envelope, as long-convolution
        models start (Fu et al. 2023, "Simple Hardware-Efficient Long Convolutions").
      tau_min, tau_max: time constants in positions, log-spaced over the channels, so that there are
        local and global filters from the start; a `tau_max` of 0 is T / 2, the whole context.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        fft_length, width = shape
        axes = ("tap", filter_axis(width))
        if kind == "small":
            return constrain(0.002 * jax.random.normal(key, shape, dtype), *axes)
        time_T = jnp.arange(fft_length, dtype=dtype)
        lag_T = jnp.minimum(time_T, fft_length - time_T)
        low, high = (jnp.log(jnp.asarray(x, dtype)) for x in (tau_min, tau_max or fft_length / 2))
        tau_D = jnp.exp(jnp.linspace(low, high, width))
        envelope_TD = jnp.exp(-lag_T[:, None] / tau_D[None])
        envelope_TD /= jnp.linalg.norm(envelope_TD, axis=0, keepdims=True)
        if kind == "noise":
            factor_TD = jax.random.normal(key, shape, dtype)
        else:
            past_D, future_D = jax.random.normal(key, (2, width), dtype)
            factor_TD = jnp.where((time_T <= fft_length // 2)[:, None], past_D, future_D)
        return constrain(envelope_TD * factor_TD, *axes)

    return init


def transfer_functions(kernels: Initializer) -> Initializer:
    """An initializer of transfer functions [2, F, D] (real, imaginary), those of `kernels`."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        _, num_bins, width = shape
        channels = filter_axis(width)
        kernel_TD = kernels(key, (2 * (num_bins - 1), width), dtype)
        # Each device transforms its own channels only, so that no device holds all of the filters.
        transform = partial(jnp.fft.rfft, axis=0)
        w_FD = shard_op(transform, [("tap", channels)], ("frequency", channels))(kernel_TD)
        return jnp.stack([w_FD.real, w_FD.imag])

    return init
