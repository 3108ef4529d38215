"""Pooling: a sequence to one vector."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.dense import BatchNorm, Dense
from spectral_pod.layers.parameter import parameter
from spectral_pod.ops.gelu import gelu
from spectral_pod.shapes import Pooled, PositionMask, Positions


class PooledPart(NamedTuple):
    """What one chunk of a sequence contributes to a pooled vector; `combined` has the formula."""

    top_B: jax.Array  # float32: the largest score of the chunk's valid positions
    total_BD: jax.Array  # float32: sum_n exp(score_n - top) x_n
    weight_B: jax.Array  # float32: sum_n exp(score_n - top)


def combined(parts: PooledPart) -> jax.Array:
    """The pooled vectors, float32 [B, D], of the parts of all chunks, stacked in the first axis:
    the softmax over all positions from those over chunks (Milakov and Gimelshein 2018)."""
    scale_SB = jnp.exp(parts.top_B - jnp.max(parts.top_B, axis=0, keepdims=True))
    total_BD = jnp.sum(parts.total_BD * scale_SB[..., None], axis=0)
    weight_B = jnp.sum(parts.weight_B * scale_SB, axis=0)
    return total_BD / jnp.maximum(weight_B, jnp.finfo(jnp.float32).tiny)[:, None]


class AttentionPooling(nn.Module):
    """`sum_n softmax(x_n . q / sqrt(D)) x_n` over valid positions, with a learned query q."""

    def __call__(self, x_BND: Positions, mask_BN: PositionMask) -> Pooled:
        """[B, N, D] to float32 [B, D]; a sequence without a valid position pools to zero."""
        x_BND = x_BND.astype(jnp.float32)
        weights_BN = _masked_softmax(self._scores(x_BND), mask_BN)
        return jnp.einsum("bn,bnd->bd", weights_BN, x_BND)

    def part(self, x_BND: Positions, mask_BN: PositionMask) -> PooledPart:
        """What the chunk [B, N, D] of longer sequences contributes."""
        x_BND = x_BND.astype(jnp.float32)
        scores_BN = jnp.where(mask_BN, self._scores(x_BND), jnp.finfo(jnp.float32).min)
        top_B = jnp.max(scores_BN, axis=1)
        weights_BN = jnp.where(mask_BN, jnp.exp(scores_BN - top_B[:, None]), 0.0)
        total_BD = jnp.einsum("bn,bnd->bd", weights_BN, x_BND)
        return PooledPart(top_B, total_BD, jnp.sum(weights_BN, axis=1))

    @nn.compact
    def _scores(self, x_BND: jax.Array) -> jax.Array:
        width = x_BND.shape[-1]
        init = parameter(nn.initializers.normal(1.0), "width", group="undecayed")
        query_D = self.param("query", init, (width,))
        return jnp.einsum("bnd,d->bn", x_BND, query_D) / jnp.sqrt(jnp.float32(width))


class MeanPooling(AttentionPooling):
    """The mean over valid positions."""

    def _scores(self, x_BND: jax.Array) -> jax.Array:
        return jnp.zeros(x_BND.shape[:2], jnp.float32)


class LastPooling(nn.Module):
    """The last valid position."""

    @nn.compact
    def __call__(self, x_BND: Positions, mask_BN: PositionMask) -> Pooled:
        """[B, N, D] to float32 [B, D]; a sequence without a valid position pools to zero."""
        place_N = jnp.arange(1, mask_BN.shape[1] + 1)
        place_BN = jnp.where(mask_BN, place_N[None], 0)  # counted from one; 0 where invalid
        last_B1 = jnp.max(place_BN, axis=1, keepdims=True)
        last_BN = (mask_BN & (place_BN == last_B1)).astype(jnp.float32)
        return jnp.einsum("bn,bnd->bd", last_BN, x_BND.astype(jnp.float32))


class Comparison(nn.Module):
    """Two pooled vectors a, b to one by a hidden layer on [a, b, a * b, a - b], as in the retrieval
    task of the Long Range Arena (Tay et al. 2020).

    Attributes:
      normalized: whether each channel is first normalised over all documents of the batch. Then
        |a - b| takes the place of a - b, as in InferSent (Conneau et al. 2017): a distance is a sum
        of it, where it would take two hidden units a channel.
      deterministic: whether channels are normalised by running averages, as in evaluation.
    """

    dtype: Any
    normalized: bool
    deterministic: bool

    @nn.compact
    def __call__(self, pooled_BD: jax.Array, mask_B: jax.Array) -> jax.Array:
        """float32 [2 * B, D], pairs in rows 2i and 2i + 1, to float32 [B, D].

        The mask says which rows are documents, not padding of the batch.
        """
        width = pooled_BD.shape[-1]
        if self.normalized:
            # Documents share most of their mean over positions; what differs would be lost in it.
            norm = BatchNorm(self.deterministic, name="norm")
            pooled_BD = norm(pooled_BD[:, None], mask_B[:, None])[:, 0]
        a_BD, b_BD = pooled_BD[0::2], pooled_BD[1::2]
        away_BD = jnp.abs(a_BD - b_BD) if self.normalized else a_BD - b_BD
        both = jnp.concatenate([a_BD, b_BD, a_BD * b_BD, away_BD], axis=-1)
        hidden_BD = Dense(width, ("embed", "width"), self.dtype, name="hidden")(both)
        return gelu(hidden_BD).astype(jnp.float32)


def _masked_softmax(scores_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    # A finite floor and a second masking keep rows without a valid position at zero, not NaN.
    scores_BN = jnp.where(mask_BN, scores_BN, jnp.finfo(jnp.float32).min)
    return jnp.where(mask_BN, jax.nn.softmax(scores_BN, axis=-1), 0.0)


POOLING: dict[str, type[nn.Module]] = {
    "attention": AttentionPooling,
    "mean": MeanPooling,
    "last": LastPooling,
}
