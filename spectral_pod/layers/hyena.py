"""The causal long-convolution mixer of Hyena (Poli et al. 2023), of orders one to three."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.fields import Positive
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dense import Dense
from spectral_pod.layers.long_convolution import FilterCache, FilterInputs, LongConvolution
from spectral_pod.layers.mixer import Mixer, shared
from spectral_pod.layers.probes import channel_rms, probe
from spectral_pod.layers.short_convolution import ShortConvolution
from spectral_pod.ops import short_conv
from spectral_pod.ops.choice import Choice
from spectral_pod.parallel.sharding import constrain


class HyenaState(NamedTuple):
    short: jax.Array | None  # None without a short convolution
    long: tuple[FilterInputs | FilterCache, ...]  # of each long convolution


class HyenaLayer(Mixer):
    """Long convolutions and gates by turns, on short convolutions of projections of x.

    Order n > 1 is the operator of Poli et al. 2023, with n + 1 projections x_0 to x_{n-1} and v,
    and n - 1 long filters h_i with a skip d_i per channel:

        v <- x_i * v,    v <- h_i conv v + d_i * v,    for i = n - 1, ..., 1,    y = W_o (x_0 * v).

    Order 1 is the original design of this project, which is simpler than what was published: it has
    one filter, without a skip and without a gate before it, `W_o (x_0 * (h conv v))`.

    Attributes:
      order: n.
      filter, decay: see `CausalFilter`.
      short_conv: taps of the depthwise causal convolution of the projections; 1 disables it.
      method: see `ops/long_conv.py`.
    """

    order: Literal[1, 2, 3] = 2
    filter: Literal["explicit", "implicit"] = "explicit"
    decay: Literal["learned", "fixed"] = "learned"
    short_conv: Positive = 3
    method: str = shared("long_conv", "auto")

    section = "hyena"
    one_directional = True
    definition = (("model.long_conv", "real"),)

    @classmethod
    def halo(cls, config: Architecture) -> int:
        return config.option("hyena.short_conv") - 1

    @classmethod
    def methods(cls, config: Architecture, batch: int) -> dict[str, Choice]:
        methods = LongConvolution.methods(config, batch)
        if (taps := config.option("hyena.short_conv")) > 1:
            sizes = config.max_positions, config.hidden_dim, taps, config.dtype
            methods["short_conv"] = short_conv.choose(*sizes)
        return methods

    def setup(self) -> None:
        features = (self.order + 1, self.width)
        self.project = Dense(features, ("embed", None, "hidden"), self.dtype, name="in")
        if self.short_conv > 1:
            axes = (None, "channel")
            self.short = ShortConvolution(features, self.short_conv, axes, self.dtype)
        self.longs = [
            LongConvolution(
                self.width, self.max_positions, self.filter, self.decay, skip=self.order > 1,
                method=self.method, name=name,
            )
            for name in ("long", "long_2")[: max(1, self.order - 1)]
        ]  # fmt: skip
        self.out = Dense(self.width, ("hidden", "embed"), self.dtype)

    def extend(
        self, x_BND: jax.Array, mask_BN: jax.Array, carry: Any | None
    ) -> tuple[jax.Array, Any]:
        """Carries the recent inputs of all convolutions."""
        short, longs = carry or (None, [None] * len(self.longs))
        x_O = [self._projected(x_BND, mask_BN, i) for i in range(self.order + 1)]
        if self.short_conv > 1:
            before, short = short, self.short.recent(jnp.stack(x_O, 2), short)
            x_O = [self.short.extend(y_BND, before, i) for i, y_BND in enumerate(x_O)]
        y_BND, after = x_O[-1], []
        for i, long in enumerate(self.longs):
            y_BND, inputs = long.extend(self._gated(x_O, i, y_BND), longs[i])
            after.append(inputs)
        return self._read(x_O, y_BND, mask_BN), (short, after)

    def init_state(self, batch: int) -> HyenaState:
        short = self.short.init_state(batch) if self.short_conv > 1 else None
        return HyenaState(short, tuple(long.init_state(batch) for long in self.longs))

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, HyenaState]:
        x_O, short = [self._projected(x_BPD, mask_BP, i) for i in range(self.order + 1)], None
        if self.short_conv > 1:
            short = self.short.recent(jnp.stack(x_O, 2))
            x_O = [self.short(x_BPD, i) for i, x_BPD in enumerate(x_O)]
        y_BPD, states = x_O[-1], []
        for i, long in enumerate(self.longs):
            y_BPD, state = long.prefill(self._gated(x_O, i, y_BPD))
            states.append(state)
        return self._read(x_O, y_BPD, mask_BP), HyenaState(short, tuple(states))

    def advance(
        self, x_B1D: jax.Array, state: HyenaState, position: jax.Array
    ) -> tuple[jax.Array, HyenaState]:
        projected_B1OD, short = self.project(x_B1D), state.short
        if short is not None:
            projected_B1OD, short = self.short.advance(projected_B1OD, short)
        x_O = [projected_B1OD[:, :, i] for i in range(self.order + 1)]
        y_B1D, states = x_O[-1], []
        for i, (long, before) in enumerate(zip(self.longs, state.long)):
            y_B1D, after = long.advance(self._gated(x_O, i, y_B1D), before, position)
            states.append(after)
        return self._read(x_O, y_B1D), HyenaState(short, tuple(states))

    def _projected(self, x_BND: jax.Array, mask_BN: jax.Array, index: int) -> jax.Array:
        y_BND = self.project(x_BND, index)
        y_BND = jnp.where(mask_BN[..., None], y_BND, jnp.zeros((), self.dtype))
        return constrain(y_BND, "batch", "position", "channel")

    def _gated(self, x_O: list[jax.Array], i: int, y_BND: jax.Array) -> jax.Array:
        """The input of the i-th long convolution."""
        return y_BND if self.order == 1 else x_O[self.order - 1 - i] * y_BND

    def _read(
        self, x_O: list[jax.Array], y_BND: jax.Array, mask_BN: jax.Array | None = None
    ) -> jax.Array:
        probe(self, "gate_rms", lambda: channel_rms(x_O[0], mask_BN))
        return constrain(self.out(x_O[0] * y_BND), "batch", "position", "width")
