"""Bytes to patches: the byte-latent encoder, and positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.dense import Dense, layer_norm
from spectral_pod.parallel.sharding import constrain, partitioned
from spectral_pod.shapes import VOCAB_SIZE

STRIDE = 4
KERNEL = 6  # with padding 2 on both sides: patch p sees bytes 4p - 2 .. 4p + 3


class ByteLatentEncoder(nn.Module):
    """Embed -> strided convolution -> Dense + GELU -> LayerNorm: [B, L] bytes to [B, L/4, D]."""

    hidden_dim: int
    embed_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the patches [B, N, D] in `dtype` and their validity [B, N].

        A patch is valid when one of its own four bytes is; padded bytes embed to zero. L must be a
        multiple of 4 (ValueError).
        """
        B, L = tokens_BL.shape
        if L % STRIDE:
            raise ValueError(f"sequence length {L} is not a multiple of the patch stride {STRIDE}")
        table_VE = self.param(
            "embedding",
            partitioned(nn.initializers.normal(1.0), "vocab", "embed"),
            (VOCAB_SIZE, self.embed_dim),
        )
        # Gather the table, not the batch: a lookup in a split table would collect all indices.
        table_VE = constrain(table_VE.astype(self.dtype), None, None)
        x_BLE = jnp.where(mask_BL[..., None], table_VE[tokens_BL], jnp.zeros((), self.dtype))
        x_BLE = constrain(x_BLE, "batch", "position", None)

        # The convolution as two dense products over blocks of four bytes: each patch sees a whole
        # block of the padded sequence and the first two bytes of the next one.
        padded = jnp.pad(x_BLE, ((0, 0), (2, 2), (0, 0)))
        blocks = padded.reshape(B, L // STRIDE + 1, STRIDE, self.embed_dim)
        window = jnp.concatenate([blocks[:, :-1], blocks[:, 1:, : KERNEL - STRIDE]], axis=2)
        x_BND = Dense(self.hidden_dim, ("tap", "embed", None), self.dtype, name="convolution")(
            window
        )
        x_BND = Dense(self.hidden_dim, ("embed", None), self.dtype, name="project")(x_BND)
        x_BND = layer_norm(nn.gelu(x_BND), "norm").astype(self.dtype)
        mask_BN = mask_BL.reshape(B, L // STRIDE, STRIDE).any(axis=-1)
        return constrain(x_BND, "batch", "position", "width"), mask_BN


def sinusoidal_positions(length: int, width: int, dtype: Any) -> jax.Array:
    """[1, N, D]: sines in the first half of the width, cosines in the second (Vaswani et al.)."""
    rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[None, :, :width].astype(
        dtype
    )
