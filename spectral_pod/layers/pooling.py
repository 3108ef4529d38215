"""From a sequence to one vector."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import partitioned
from spectral_pod.shapes import Pooled, PositionMask, Positions


class AttentionPooling(nn.Module):
    """`sum_n softmax(x_n . q / sqrt(D)) x_n` over valid positions, with a learned query q."""

    @nn.compact
    def __call__(self, x_BND: Positions, mask_BN: PositionMask) -> Pooled:
        """[B, N, D] to float32 [B, D]; a sequence without a valid position pools to zero."""
        x_BND = x_BND.astype(jnp.float32)
        width = x_BND.shape[-1]
        query_D = self.param("query", partitioned(nn.initializers.normal(1.0), "width"), (width,))
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
        place_BN = jnp.where(mask_BN, place_N[None], 0)  # counted from one
        last_B1 = jnp.max(place_BN, axis=1, keepdims=True)
        last_BN = (mask_BN & (place_BN == last_B1)).astype(jnp.float32)
        return jnp.einsum("bn,bnd->bd", last_BN, x_BND.astype(jnp.float32))


def _masked_softmax(scores_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    # A finite floor and a second masking keep rows without a valid position at zero, not NaN.
    scores_BN = jnp.where(mask_BN, scores_BN, jnp.finfo(jnp.float32).min)
    return jnp.where(mask_BN, jax.nn.softmax(scores_BN, axis=-1), 0.0)


POOLING: dict[str, type[nn.Module]] = {
    "attention": AttentionPooling,
    "mean": MeanPooling,
    "last": LastPooling,
}
