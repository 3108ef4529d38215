"""SpectralModel: bytes -> patches -> spectral blocks with memory -> pooling -> classes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.block import all_blocks
from spectral_pod.layers.dense import Dense, layer_norm
from spectral_pod.layers.multi_scale import MultiScale
from spectral_pod.layers.patching import ByteLatentEncoder, Patches, sinusoidal_positions
from spectral_pod.layers.pooling import POOLING, Comparison
from spectral_pod.models.model import Model
from spectral_pod.parallel.sharding import constrain
from spectral_pod.shapes import Logits, SequenceLogits, TokenMask, Tokens


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
        config, dtype = self.config, self.config.activation_dtype
        if config.documents == 2:
            tokens_BL, mask_BL = _split_documents(tokens_BL), _split_documents(mask_BL)
        patches = Patches(**config.sections["patch"])
        widths = config.hidden_dim, config.embed_dim
        x_BND, mask_BN = ByteLatentEncoder(patches, *widths, dtype, name="encoder")(
            tokens_BL, mask_BL
        )
        if config.coarser_scales:
            x_BND = MultiScale(config.coarser_scales, dtype, name="scales")(x_BND, mask_BN)
        if patches.positions == "sinusoidal":
            x_BND += sinusoidal_positions(x_BND.shape[1], config.hidden_dim, dtype)
        x_BND = nn.Dropout(config.dropout, deterministic=not train)(x_BND)
        x_BND = all_blocks(config, x_BND, mask_BN, train)
        x_BND = layer_norm(x_BND, "norm")
        head = Dense(self.num_classes, ("embed", "class"), jnp.float32, name="head")
        if config.pooling == "none":
            return constrain(head(x_BND), "batch", "position", None)
        pooling: Any = POOLING[config.pooling](name="pooling")
        pooled_BD = constrain(pooling(x_BND, mask_BN), "batch", None)
        if config.documents == 2:
            pooled_BD = Comparison(dtype, name="comparison")(pooled_BD)
        return head(pooled_BD)


def _split_documents(x_BL: jax.Array) -> jax.Array:
    """[B, 2 * L] to [2 * B, L], rows 2i and 2i + 1 from row i: every device keeps its own rows."""
    batch, both = x_BL.shape
    return constrain(x_BL.reshape(2 * batch, both // 2), "batch", None)
