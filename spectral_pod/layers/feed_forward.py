"""The channel mixer: a gated linear unit."""

from typing import Any

import flax.linen as nn
import jax

from spectral_pod.layers.dense import Dense
from spectral_pod.parallel.sharding import constrain


class GatedFeedForward(nn.Module):
    """`W_o (W_v x * gelu(W_g x))`, per position (GEGLU, Shazeer 2020)."""

    expansion: float
    dropout: float
    deterministic: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        width = x_BND.shape[-1]
        hidden = int(self.expansion * width)
        value_BNM = Dense(hidden, ("embed", "hidden"), self.dtype, name="value")(x_BND)
        gate_BNM = Dense(hidden, ("embed", "hidden"), self.dtype, name="gate")(x_BND)
        h_BNM = constrain(value_BNM * nn.gelu(gate_BNM), "batch", "position", "hidden")
        h_BNM = nn.Dropout(self.dropout, deterministic=self.deterministic)(h_BNM)
        y_BND = Dense(width, ("hidden", "embed"), self.dtype, name="out")(h_BNM)
        return constrain(y_BND, "batch", "position", "width")
