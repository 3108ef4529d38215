"""Dropout whose random bits every device makes for its own part of an array.

`flax.linen.Dropout` leaves their layout to XLA, which on some meshes exchanges a part of them that
grows with the batch. The bits are the same, those of `jax.random.bernoulli`, on every mesh.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.ops.random_bits import bernoulli
from spectral_pod.parallel.sharding import Axes


class Dropout(nn.Module):
    """Sets elements to zero with the probability `rate`, and divides the others by `1 - rate`.

    Attributes:
      axes: the logical axes of the inputs.
    """

    rate: float
    deterministic: bool
    axes: Axes = ("batch", "position", "width")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rate == 0 or self.deterministic:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        kept = bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape, self.axes)
        return jnp.where(kept, x / (1.0 - self.rate), jnp.zeros_like(x))
