"""Coarser scales of a sequence of patches, added to the finer ones."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.errors import ConfigError
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dense import Dense, layer_norm
from spectral_pod.layers.mixer import Mixer
from spectral_pod.ops.gelu import gelu
from spectral_pod.parallel.sharding import constrain


class MultiScale(nn.Module):
    """What coarser scales add to patches: merges them scale by scale, then adds each scale to the
    next finer one, coarsest first.

    Attributes:
      ratios: for each coarser scale, how many patches of the previous scale one of its patches
        merges.
    """

    ratios: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; invalid patches and those past N count as zero.

        The result depends on the whole of the coarsest patch at each place, so on later ones too.
        """
        B, _, D = x_BND.shape
        x_BND = jnp.where(mask_BN[..., None], x_BND, jnp.zeros((), x_BND.dtype))
        scales = [x_BND]
        for i, ratio in enumerate(self.ratios):
            fine_BND = scales[-1]
            missing = -fine_BND.shape[1] % ratio
            fine_BND = jnp.pad(fine_BND, ((0, 0), (0, missing), (0, 0)))
            merged = fine_BND.reshape(B, -1, ratio * D)
            y_BND = Dense(D, ("embed", None), self.dtype, name=f"merge_{i}")(merged)
            y_BND = layer_norm(gelu(y_BND), f"norm_{i}").astype(self.dtype)
            mask_BN = jnp.pad(mask_BN, ((0, 0), (0, missing))).reshape(B, -1, ratio).any(axis=2)
            y_BND = jnp.where(mask_BN[..., None], y_BND, jnp.zeros((), self.dtype))
            scales.append(constrain(y_BND, "batch", "position", "width"))
        x_BND = scales.pop()
        for i, ratio in reversed(list(enumerate(self.ratios))):
            fine_BND = scales.pop()
            y_BND = Dense(D, ("embed", None), self.dtype, name=f"spread_{i}")(x_BND)
            y_BND = jnp.repeat(y_BND, ratio, axis=1)[:, : fine_BND.shape[1]]
            x_BND = fine_BND + y_BND if scales else y_BND
        return constrain(x_BND, "batch", "position", "width")


class MultiScaleLayer(Mixer):
    """What coarser scales add, as a mixer: multi-scale patches in every block.

    Attributes:
      ratios: see `MultiScale`.
    """

    ratios: tuple[int, ...] = (4, 4)

    section = "scales"
    can_be_causal = False

    @classmethod
    def check(cls, config: Architecture) -> None:
        ratios = config.option("scales.ratios")
        if not ratios or any(ratio < 2 for ratio in ratios):
            raise ConfigError(
                f"config.model.scales.ratios is {ratios}; it must have ratios, of 2 or more"
            )

    @classmethod
    def merges(cls, config: Architecture) -> int:
        return math.prod(config.option("scales.ratios"))

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        return MultiScale(self.ratios, self.dtype, name="scales")(x_BND, mask_BN)
