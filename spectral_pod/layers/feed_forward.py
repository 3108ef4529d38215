"""Channel mixers by name; called as the mixers of positions are (`layers/mixers.py`)."""

from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.dense import Dense
from spectral_pod.layers.hyena import LongConvolution
from spectral_pod.ops.gelu import gelu
from spectral_pod.parallel.sharding import constrain, partitioned

Config: TypeAlias = Any  # config.model, frozen


class GatedFeedForward(nn.Module):
    """`W_o (W_v x * gelu(W_g x))`, per position (GEGLU, Shazeer 2020)."""

    expansion: float
    dropout: float
    deterministic: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array, *_: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; positions don't meet, so their mask has no effect."""
        width = x_BND.shape[-1]
        hidden = int(self.expansion * width)
        value_BNM = Dense(hidden, ("embed", "hidden"), self.dtype, name="value")(x_BND)
        gate_BNM = Dense(hidden, ("embed", "hidden"), self.dtype, name="gate")(x_BND)
        h_BNM = constrain(value_BNM * gelu(gate_BNM), "batch", "position", "hidden")
        h_BNM = nn.Dropout(self.dropout, deterministic=self.deterministic)(h_BNM)
        y_BND = Dense(width, ("hidden", "embed"), self.dtype, name="out")(h_BNM)
        return constrain(y_BND, "batch", "position", "width")


class FrequencyFeedForward(nn.Module):
    """`(1 - alpha) MLP(x) + alpha (h conv x)` with learned long filters h and alpha = sigmoid(.).

    Attributes:
      expansion, dropout, deterministic: of the `GatedFeedForward` that is the MLP.
      max_positions, filter, decay, padding: see `LongConvolution`; a 'circular' one is the
        original design.
    """

    expansion: float
    dropout: float
    deterministic: bool
    dtype: Any
    max_positions: int
    filter: str
    decay: str
    padding: str
    method: str = "auto"

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; see `layers/mixers.py` for `position`."""
        u_BND = jnp.where(mask_BN[..., None], x_BND.astype(self.dtype), jnp.zeros((), self.dtype))
        u_BND = constrain(u_BND, "batch", "position", "channel")
        long = LongConvolution(
            self.max_positions, self.filter, self.decay, self.padding, self.method, name="long"
        )
        y_BND = constrain(long(u_BND, position), "batch", "position", "width")
        mlp = GatedFeedForward(
            self.expansion, self.dropout, self.deterministic, self.dtype, name="mlp"
        )
        logit = self.param("mix", partitioned(nn.initializers.zeros_init()), ())
        alpha = jax.nn.sigmoid(logit).astype(self.dtype)
        return (1 - alpha) * mlp(x_BND) + alpha * y_BND


def _gated(config: Config, deterministic: bool, name: str) -> GatedFeedForward:
    dtype = jnp.dtype(config.dtype)
    return GatedFeedForward(config.mlp_expansion, config.dropout, deterministic, dtype, name=name)


def _frequency(config: Config, deterministic: bool, name: str) -> FrequencyFeedForward:
    return FrequencyFeedForward(
        expansion=config.mlp_expansion,
        dropout=config.dropout,
        deterministic=deterministic,
        dtype=jnp.dtype(config.dtype),
        max_positions=config.max_positions,
        filter=config.hyena.filter,
        decay=config.hyena.decay,
        padding=config.frequency.padding,
        method=config.long_conv,
        name=name,
    )


CHANNEL_MIXERS: dict[str, Callable[[Config, bool, str], nn.Module]] = {
    "gated": _gated,
    "frequency": _frequency,
}
