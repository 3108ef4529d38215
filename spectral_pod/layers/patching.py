"""Bytes to patches: the byte-latent encoder, and positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.dense import Dense, layer_norm
from spectral_pod.layers.embedding import lookup
from spectral_pod.ops.halo import previous
from spectral_pod.parallel.sharding import constrain, partitioned, shard_op
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
        tokens_BL, mask_BL = (constrain(x, "batch", "position") for x in (tokens_BL, mask_BL))
        table_VE = self.param(
            "embedding",
            partitioned(nn.initializers.normal(1.0), "vocab", "embed"),
            (VOCAB_SIZE, self.embed_dim),
        )
        # Gather the table, not the batch: a lookup in a split table would collect all indices.
        table_VE = constrain(table_VE.astype(self.dtype), None, None)
        x_BLE = lookup(table_VE, tokens_BL)
        x_BLE = jnp.where(mask_BL[..., None], x_BLE, jnp.zeros((), self.dtype))
        x_BLE = constrain(x_BLE, "batch", "position", None)

        # The convolution as a dense product over the six bytes that each patch sees.
        activation = ("batch", "position", None)
        windows = shard_op(_windows, [activation], (*activation, None))(x_BLE)
        x_BND = Dense(self.hidden_dim, ("tap", "embed", None), self.dtype, name="convolution")(
            windows
        )
        x_BND = Dense(self.hidden_dim, ("embed", None), self.dtype, name="project")(x_BND)
        x_BND = layer_norm(nn.gelu(x_BND), "norm").astype(self.dtype)
        mask_BN = mask_BL.reshape(B, L // STRIDE, STRIDE).any(axis=-1)
        return constrain(x_BND, "batch", "position", "width"), mask_BN


def _windows(x_BLE: jax.Array) -> jax.Array:
    """The bytes 4p - 2 .. 4p + 3 of every patch p, [B, N, 6, E]; zero before the first byte."""
    B, L, E = x_BLE.shape
    before = KERNEL - STRIDE
    padded = jnp.concatenate([previous(x_BLE, before), x_BLE], axis=1)
    padded = jnp.pad(padded, ((0, 0), (0, STRIDE - before), (0, 0)))
    blocks = padded.reshape(B, L // STRIDE + 1, STRIDE, E)
    return jnp.concatenate([blocks[:, :-1], blocks[:, 1:, :before]], axis=2)


def sinusoidal_positions(length: int, width: int, dtype: Any) -> jax.Array:
    """[1, N, D]: sines in the first half of the width, cosines in the second (Vaswani et al.)."""
    rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[None, :, :width].astype(
        dtype
    )
