"""The causal long-convolution mixer of Hyena (Poli et al. 2023), of order two."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.fields import Positive
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dense import Dense
from spectral_pod.layers.long_convolution import FilterCache, FilterInputs, LongConvolution
from spectral_pod.layers.mixer import Mixer, shared
from spectral_pod.layers.short_convolution import ShortConvolution
from spectral_pod.ops import long_conv
from spectral_pod.parallel.sharding import constrain


class HyenaState(NamedTuple):
    short: jax.Array | None  # None without a short convolution
    long: FilterInputs | FilterCache


class HyenaLayer(Mixer):
    """`W_o (u * (h conv v))`, where u and v are short convolutions of projections of x.

    Attributes:
      filter, decay: see `CausalFilter`.
      short_conv: taps of the depthwise causal convolution of u and v; 1 disables it (the original
        design).
      method: see `ops/long_conv.py`.
    """

    filter: Literal["explicit", "implicit"] = "explicit"
    decay: Literal["learned", "fixed"] = "learned"
    short_conv: Positive = 3
    method: str = shared("long_conv", "auto")

    section = "hyena"
    definition = (("model.long_conv", "real"),)

    @classmethod
    def halo(cls, config: Architecture) -> int:
        return config.option("hyena.short_conv") - 1

    @classmethod
    def methods(cls, config: Architecture) -> dict[str, str]:
        return {"causal_conv": long_conv.resolve(config.long_conv)}

    def setup(self) -> None:
        self.project = Dense((2, self.width), ("embed", None, "hidden"), self.dtype, name="in")
        if self.short_conv > 1:
            features, axes = (2, self.width), (None, "channel")
            self.short = ShortConvolution(features, self.short_conv, axes, self.dtype)
        self.long = LongConvolution(
            self.width, self.max_positions, self.filter, self.decay, method=self.method
        )
        self.out = Dense(self.width, ("hidden", "embed"), self.dtype)

    def init_state(self, batch: int) -> HyenaState:
        short = self.short.init_state(batch) if self.short_conv > 1 else None
        return HyenaState(short, self.long.init_state(batch))

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, HyenaState]:
        uv_BP2D, short = self._projected(x_BPD, mask_BP), None
        if self.short_conv > 1:
            uv_BP2D, short = self.short.prefill(uv_BP2D)
        y_BPD, long = self.long.prefill(uv_BP2D[:, :, 1])
        return self._gated(uv_BP2D, y_BPD), HyenaState(short, long)

    def advance(
        self, x_B1D: jax.Array, state: HyenaState, position: jax.Array
    ) -> tuple[jax.Array, HyenaState]:
        uv_B12D, short = self._projected(x_B1D), state.short
        if short is not None:
            uv_B12D, short = self.short.advance(uv_B12D, short)
        y_B1D, long = self.long.advance(uv_B12D[:, :, 1], state.long, position)
        return self._gated(uv_B12D, y_B1D), HyenaState(short, long)

    def _projected(self, x_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
        uv_BN2D = self.project(x_BND)
        if mask_BN is not None:
            uv_BN2D = jnp.where(mask_BN[..., None, None], uv_BN2D, jnp.zeros((), self.dtype))
        return constrain(uv_BN2D, "batch", "position", None, "channel")

    def _gated(self, uv_BN2D: jax.Array, y_BND: jax.Array) -> jax.Array:
        y_BND = self.out(uv_BN2D[:, :, 0] * y_BND)
        return constrain(y_BND, "batch", "position", "width")
