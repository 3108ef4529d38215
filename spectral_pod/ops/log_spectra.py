"""The log-spectral distance between sequences."""

import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import SEQUENCE, num_shards, shard_op
from spectral_pod.shapes import PositionMask, Positions

FLOOR = 1e-3  # relative to white noise of unit variance; bounds the slope of the logarithm


def log_spectral_distance(x_BND: Positions, y_BND: Positions, mask_BN: PositionMask) -> jax.Array:
    """The mean over frequencies and channels of `(log P(x) - log P(y))^2`.

    P = |rfft|^2 / M + FLOOR along positions, with M the number of valid positions. The others count
    as zero, so more padding samples the same spectra at more frequencies.

    Args:
      x_BND, y_BND: real, any float dtype.
      mask_BN: positions that are valid in both.

    Returns:
      The distances, float32 [B].

    Raises:
      ValueError: positions are split and a device's channels are not a multiple of their shards.
    """
    shards, channels = num_shards("position"), x_BND.shape[2] // num_shards("channel")
    if channels % shards:
        raise ValueError(
            f"{channels} channels of a device cannot be exchanged for positions over {shards} "
            "devices: channels must be a multiple of the devices that share a sequence"
        )
    valid = mask_BN[..., None]
    count_B = jnp.maximum(jnp.sum(mask_BN, axis=1, dtype=jnp.float32), 1.0)

    def op(x_BND: jax.Array, y_BND: jax.Array, count_B: jax.Array) -> jax.Array:
        pair_BDN = jnp.swapaxes(jnp.concatenate([x_BND, y_BND]), 1, 2)
        if shards > 1:
            pair_BDN = jax.lax.all_to_all(pair_BDN, SEQUENCE, 1, 2, tiled=True)
        spectra = jnp.fft.rfft(pair_BDN)
        power = jnp.square(spectra.real) + jnp.square(spectra.imag)
        count = jnp.concatenate([count_B, count_B])[:, None, None]
        x_BDF, y_BDF = jnp.split(jnp.log(power / count + FLOOR), 2)
        return jnp.mean(jnp.square(x_BDF - y_BDF), axis=2)

    activation = ("batch", "position", "channel")
    run = shard_op(op, (activation, activation, ("batch",)), ("batch", "exchanged_channel"))
    x_BND, y_BND = (jnp.where(valid, a.astype(jnp.float32), 0.0) for a in (x_BND, y_BND))
    return jnp.mean(run(x_BND, y_BND, count_B), axis=1)
