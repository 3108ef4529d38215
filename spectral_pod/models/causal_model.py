"""What the causal models share: bytes -> embeddings -> causal blocks -> the next byte."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from spectral_pod.layers.block import block_stack
from spectral_pod.layers.dense import Dense, layer_norm
from spectral_pod.parallel.sharding import constrain
from spectral_pod.shapes import Positions, SequenceLogits, TokenMask, Tokens


class CausalModel(nn.Module):
    """A model whose logits at a position depend on tokens up to it, and on no later one.

    Attributes:
      config: `config.model`, frozen, with what `models.build` adds.
      num_classes: C; of bytes 257, the last is the end of a document.
    """

    config: ml_collections.FrozenConfigDict
    num_classes: int

    bytes_per_position = 1
    causal = True

    @nn.compact
    def __call__(
        self,
        tokens_BL: Tokens,
        mask_BL: TokenMask,
        train: bool = False,
        position: jax.Array | None = None,
    ) -> SequenceLogits:
        """int tokens and their validity, [B, L], to float32 logits [B, L, C].

        Invalid positions, before or after the valid ones, change nothing at valid ones. Dropout
        draws from the rng `dropout`. Whatever is minimised besides the cross-entropy is sown into
        the collection `losses`, [B].

        To decode, `config.decoding` is set: a call on prompts with the collection `cache` mutable
        fills it, and a call with tokens [B, 1] and their `position`, an int32 scalar that counts
        from the start of the (padded) prompts, continues from it (`generate/decode.py`).
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        tokens_BL, mask_BL = (constrain(x, "batch", "position") for x in (tokens_BL, mask_BL))
        embedded_BND = self.embed(tokens_BL)
        x_BND = embedded_BND
        if config.positions == "learned":
            x_BND = x_BND + self._positions(mask_BL, position)
        x_BND = jnp.where(mask_BL[..., None], x_BND, jnp.zeros((), dtype))
        x_BND = constrain(x_BND, "batch", "position", "width")
        x_BND = nn.Dropout(config.dropout, deterministic=not train)(x_BND)
        x_BND = block_stack(config, config.pattern, not train, x_BND, mask_BL, position)
        x_BND = layer_norm(x_BND, "norm")
        if train:
            self.sow_losses(x_BND, embedded_BND, mask_BL)
        head = Dense(self.num_classes, ("embed", "class"), dtype, name="head")
        logits_BLC = head(x_BND.astype(dtype)).astype(jnp.float32)
        return constrain(logits_BLC, "batch", "position", None)

    def embed(self, tokens_BL: Tokens) -> Positions:
        """Tokens [B, L] to [B, L, D] in the model's dtype."""
        raise NotImplementedError

    def sow_losses(self, x_BND: Positions, embedded_BND: Positions, mask_BN: TokenMask) -> None:
        """Sows what is minimised besides the cross-entropy; nothing here."""

    def _positions(self, mask_BN: jax.Array, position: jax.Array | None) -> jax.Array:
        """Learned positions [B or 1, N, D]; prompts are counted from their first valid token."""
        table_ND = self.param(
            "position_embedding",
            nn.with_logical_partitioning(nn.initializers.normal(0.1), (None, "embed")),
            (self.config.max_positions, self.config.hidden_dim),
        )
        table_ND = constrain(table_ND.astype(self.config.dtype), None, None)
        if position is not None:
            count_B1 = self.get_variable("cache", "count")
            self.put_variable("cache", "count", count_B1 + 1)
            return table_ND[count_B1]
        if self.is_mutable_collection("cache"):
            count_BN = jnp.cumsum(mask_BN, axis=1)
            self.put_variable("cache", "count", count_BN[:, -1:])
            return table_ND[jnp.maximum(count_BN - 1, 0)]
        return constrain(table_ND[None, : mask_BN.shape[1]], None, "position", None)
