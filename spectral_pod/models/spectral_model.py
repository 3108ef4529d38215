"""SpectralModel: bytes -> patches -> spectral blocks with memory -> pooling -> classes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.block import all_blocks
from spectral_pod.layers.dense import Dense, layer_norm
from spectral_pod.layers.dropout import Dropout
from spectral_pod.layers.multi_scale import MultiScale
from spectral_pod.layers.patching import ByteLatentEncoder, Patches, sinusoidal_positions
from spectral_pod.layers.pooling import POOLING, Comparison, PooledPart, combined
from spectral_pod.layers.probes import probe, valid_rms
from spectral_pod.models.model import Model
from spectral_pod.parallel.sharding import constrain
from spectral_pod.shapes import (
    Logits,
    PositionMask,
    Positions,
    SequenceLogits,
    TokenMask,
    Tokens,
)


class SpectralModel(Model):
    """A classifier of byte sequences."""

    mixer = "spectral"
    reads_patches = True
    causal = False
    max_documents = 2  # which are compared

    @nn.compact
    def __call__(
        self, tokens_BL: Tokens, mask_BL: TokenMask, train: bool = False
    ) -> Logits | SequenceLogits:
        """int tokens and their validity, [B, L], to float32 logits [B, C].

        Without pooling the logits are those of every position, [B, L, C]. If a record is two
        documents, the inputs are [B, 2 * L] and each document is encoded separately.

        Padding does not affect logits: [B, L] and [B, L'] with the same valid bytes give the same
        ones, for L and L' any multiples of the patch stride up to max_positions patches. Dropout
        uses the rng `dropout`.
        """
        config = self.config
        if config.documents == 2:
            tokens_BL, mask_BL = _split_documents(tokens_BL), _split_documents(mask_BL)
        x_BND, mask_BN, _ = self._read(tokens_BL, mask_BL, train)
        if not self.pools:
            return constrain(self._logits(x_BND), "batch", "position", None)
        pooling: Any = POOLING[config.pooling](name="pooling")
        pooled_BD = constrain(pooling(x_BND, mask_BN), "batch", None)
        if config.documents == 2:
            compare = Comparison(
                config.activation_dtype, config.comparison == "normalized", not train,
                name="comparison",
            )  # fmt: skip
            pooled_BD = compare(pooled_BD, mask_BN.any(axis=1))
        return self._logits(pooled_BD)

    @nn.compact
    def extend(
        self, tokens_BL: Tokens, mask_BL: TokenMask, carry: Any, train: bool = False
    ) -> tuple[SequenceLogits | PooledPart, Any]:
        """Reads the next chunk of longer sequences; see `models/chunks.py`.

        Returns:
          Without pooling float32 logits [B, L, C], else the part of the pooled vector that `pooled`
          makes logits of; and what is carried on.
        """
        x_BND, mask_BN, carry = self._read(tokens_BL, mask_BL, train, carry, chunked=True)
        if not self.pools:
            return constrain(self._logits(x_BND), "batch", "position", None), carry
        pooling: Any = POOLING[self.config.pooling](name="pooling")
        return pooling.part(x_BND, mask_BN), carry

    @nn.compact
    def pooled(self, parts: PooledPart) -> Logits:
        """float32 logits [B, C] from the parts of all chunks, stacked along the first axis."""
        return self._logits(constrain(combined(parts), "batch", None))

    def _read(
        self,
        tokens_BL: Tokens,
        mask_BL: TokenMask,
        train: bool,
        carry: Any = None,
        chunked: bool = False,
    ) -> tuple[Positions, PositionMask, Any]:
        """The normalised outputs of the blocks, which positions are valid, and what is carried on
        if `chunked`: the number of positions so far, the last bytes, and that of the blocks."""
        config, dtype = self.config, self.config.activation_dtype
        start, before_BH, of_blocks = carry or (0, None, None)
        patches = Patches(**config.sections["patch"])
        widths = config.hidden_dim, config.embed_dim
        encoder = ByteLatentEncoder(patches, *widths, dtype, name="encoder")
        x_BND, mask_BN, last_BH = encoder(tokens_BL, mask_BL, before_BH)
        if config.coarser_scales:
            x_BND += MultiScale(config.coarser_scales, dtype, name="scales")(x_BND, mask_BN)
        length = x_BND.shape[1]
        if patches.positions == "sinusoidal":
            x_BND += sinusoidal_positions(length, config.hidden_dim, dtype, start)
        x_BND = Dropout(config.dropout, deterministic=not train)(x_BND)
        probe(self, "input_rms", lambda: valid_rms(x_BND, mask_BN))
        x_BND, of_blocks = all_blocks(config, x_BND, mask_BN, train, of_blocks, chunked)
        carry = (jnp.asarray(start + length, jnp.int32), last_BH, of_blocks) if chunked else None
        return layer_norm(x_BND, "norm"), mask_BN, carry

    def _logits(self, x: jax.Array) -> jax.Array:
        return Dense(self.num_classes, ("embed", "class"), jnp.float32, name="head")(x)


def _split_documents(x_BL: jax.Array) -> jax.Array:
    """[B, 2 * L] to [2 * B, L], rows 2i and 2i + 1 from row i: every device keeps its own rows."""
    batch, both = x_BL.shape
    return constrain(x_BL.reshape(2 * batch, both // 2), "batch", None)
