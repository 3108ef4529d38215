"""Channel mixers by name: mixers (`layers/mixer.py`) that may treat each position on its own."""

from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dense import Dense
from spectral_pod.layers.dropout import Dropout
from spectral_pod.layers.long_convolution import FilterCache, FilterInputs, LongConvolution
from spectral_pod.layers.mixer import Mixer, shared
from spectral_pod.layers.parameter import parameter
from spectral_pod.layers.probes import probe, valid_mean
from spectral_pod.ops.choice import Choice
from spectral_pod.ops.gelu import gelu
from spectral_pod.parallel.sharding import constrain


class GatedFeedForward(Mixer):
    """`W_o (W_v x * gelu(W_g x))`, per position (GEGLU, Shazeer 2020)."""

    expansion: float = shared("mlp_expansion", 1.0)
    dropout: float = shared("dropout", 0.0)

    def setup(self) -> None:
        hidden = int(self.expansion * self.width)
        self.value = Dense(hidden, ("embed", "hidden"), self.dtype)
        self.gate = Dense(hidden, ("embed", "hidden"), self.dtype)
        hidden_axes = ("batch", "position", "hidden")
        self.drop = Dropout(self.dropout, self.deterministic, hidden_axes, name="Dropout_0")
        self.out = Dense(self.width, ("hidden", "embed"), self.dtype)

    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; per position, so that the mask has no effect."""
        h_BNM = self.value(x_BND) * gelu(self.gate(x_BND))
        h_BNM = self.drop(constrain(h_BNM, "batch", "position", "hidden"))
        return constrain(self.out(h_BNM), "batch", "position", "width")

    def init_state(self, batch: int) -> None:
        return None

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, None]:
        return self(x_BPD), None

    def advance(self, x_B1D: jax.Array, state: None, position: jax.Array) -> tuple[jax.Array, None]:
        return self(x_B1D), None


class FrequencyFeedForward(Mixer):
    """`(1 - alpha) MLP(x) + alpha (h conv x)`, with learned long filters h and a learned alpha.

    The decode state is that of the `LongConvolution`.

    Attributes:
      padding: 'linear' is causal; with 'circular' (the original design) positions see later ones.
      expansion, dropout: of the MLP, a `GatedFeedForward`.
      filter, decay, method: see `LongConvolution`.
    """

    padding: Literal["linear", "circular"] = "linear"
    expansion: float = shared("mlp_expansion", 1.0)
    dropout: float = shared("dropout", 0.0)
    filter: str = shared("hyena.filter", "explicit")
    decay: str = shared("hyena.decay", "learned")
    method: str = shared("long_conv", "auto")

    section = "frequency"
    sees_future = (("model.frequency.padding", "circular"),)
    definition = (("model.long_conv", "real"),)

    @classmethod
    def methods(cls, config: Architecture, batch: int) -> dict[str, Choice]:
        return LongConvolution.methods(config, batch)

    def setup(self) -> None:
        self.long = LongConvolution(
            self.width, self.max_positions, self.filter, self.decay, self.padding, self.method
        )
        self.mlp = GatedFeedForward(
            self.width,
            deterministic=self.deterministic,
            dtype=self.dtype,
            expansion=self.expansion,
            dropout=self.dropout,
        )
        mix = parameter(nn.initializers.zeros_init(), group="undecayed")
        self.logit = self.param("mix", mix, ())

    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        return self._mixed(x_BND, self.long(self._masked(x_BND, mask_BN)))

    def extend(
        self, x_BND: jax.Array, mask_BN: jax.Array, carry: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        y_BND, carry = self.long.extend(self._masked(x_BND, mask_BN), carry)
        return self._mixed(x_BND, y_BND), carry

    def init_state(self, batch: int) -> FilterInputs:
        return self.long.init_state(batch)

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, FilterInputs]:
        y_BPD, state = self.long.prefill(self._masked(x_BPD, mask_BP))
        return self._mixed(x_BPD, y_BPD), state

    def advance(
        self, x_B1D: jax.Array, state: FilterCache, position: jax.Array
    ) -> tuple[jax.Array, FilterCache]:
        u_B1D = constrain(x_B1D.astype(self.dtype), "batch", "position", "channel")
        y_B1D, state = self.long.advance(u_B1D, state, position)
        return self._mixed(x_B1D, y_B1D), state

    def _masked(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        u_BND = jnp.where(mask_BN[..., None], x_BND.astype(self.dtype), jnp.zeros((), self.dtype))
        return constrain(u_BND, "batch", "position", "channel")

    def _mixed(self, x_BND: jax.Array, y_BND: jax.Array) -> jax.Array:
        y_BND = constrain(y_BND, "batch", "position", "width")
        alpha = jax.nn.sigmoid(self.logit).astype(self.dtype)
        probe(self, "convolution_share", lambda: alpha)
        return (1 - alpha) * self.mlp(x_BND) + alpha * y_BND


class HalfGLU(Mixer):
    """`gelu(y) * sigmoid(W gelu(y) + b)` of a mixer's output y, before its residual (S5's program:
    'half_glu1')."""

    dropout: float = shared("dropout", 0.0)

    within_branch = True
    gates_activated: ClassVar[bool] = True

    def setup(self) -> None:
        self.gate = Dense(self.width, ("embed", "width"), self.dtype)
        self.drop = Dropout(self.dropout, self.deterministic, name="Dropout_0")

    def __call__(self, y_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; per position, so that the mask has no effect."""
        activated_BND = self.drop(gelu(y_BND.astype(self.dtype)))
        gate_BND = jax.nn.sigmoid(self.gate(activated_BND))
        probe(self, "gate_mean", lambda: valid_mean(gate_BND, mask_BN))
        y_BND = activated_BND if self.gates_activated else y_BND.astype(self.dtype)
        return constrain(y_BND * gate_BND, "batch", "position", "width")


class HalfGLU2(HalfGLU):
    """`y * sigmoid(W gelu(y) + b)` of a mixer's output y, before its residual ('half_glu2')."""

    gates_activated = False


CHANNEL_MIXERS: dict[str, type[Mixer]] = {
    "gated": GatedFeedForward,
    "frequency": FrequencyFeedForward,
    "half_glu1": HalfGLU,
    "half_glu2": HalfGLU2,
}
