"""Pooling: a sequence to one vector."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.dense import Dense
from spectral_pod.layers.parameter import parameter
from spectral_pod.ops.gelu import gelu
from spectral_pod.shapes import Pooled, PositionMask, Positions


class AttentionPooling(nn.Module):
    """`sum_n softmax(x_n . q / sqrt(D)) x_n` over valid positions, with a learned query q."""

    @nn.compact
    def __call__(self, x_BND: Positions, mask_BN: PositionMask) -> Pooled:
        """[B, N, D] to float32 [B, D]; a sequence without a valid position pools to zero."""
        x_BND = x_BND.astype(jnp.float32)
        width = x_BND.shape[-1]
        init = parameter(nn.initializers.normal(1.0), "width", group="undecayed")
        query_D = self.param("query", init, (width,))
        scores_BN = jnp.einsum("bnd,d->bn", x_BND, query_D) / jnp.sqrt(jnp.float32(width))
        weights_BN = _masked_softmax(scores_BN, mask_BN)
        return jnp.einsum("bn,bnd->bd", weights_BN, x_BND)


class MeanPooling(nn.Module):
    """The mean over valid positions."""

    @nn.compact
    def __call__(self, x_BND: Positions, mask_BN: PositionMask) -> Pooled:
        """[B, N, D] to float32 [B, D]; a sequence without a valid position pools to zero."""
        weights_BN = _masked_softmax(jnp.zeros(mask_BN.shape, jnp.float32), mask_BN)
        return jnp.einsum("bn,bnd->bd", weights_BN, x_BND.astype(jnp.float32))


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
    task of the Long Range Arena (Tay et al. 2020)."""

    dtype: Any

    @nn.compact
    def __call__(self, pooled_BD: jax.Array) -> jax.Array:
        """float32 [2 * B, D], pairs in rows 2i and 2i + 1, to float32 [B, D]."""
        width = pooled_BD.shape[-1]
        a_BD, b_BD = pooled_BD[0::2], pooled_BD[1::2]
        both = jnp.concatenate([a_BD, b_BD, a_BD * b_BD, a_BD - b_BD], axis=-1)
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
