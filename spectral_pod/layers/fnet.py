"""The parameter-free mixer of FNet (Lee-Thorp et al. 2021): a Fourier transform of the sequence."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.mixer import Mixer
from spectral_pod.ops.sequence_fft import exchange
from spectral_pod.parallel.sharding import constrain, num_shards, shard_op


class FNetLayer(Mixer):
    """`Re(FFT over positions of FFT over width)`, both orthonormal.

    Shorter sequences are transformed as if padded to `max_positions`, so that the result does not
    depend on the padding of a batch. Every position sees all others, so the mixer cannot be causal.
    The paper's transforms are unnormalised, which in a pre-norm block would dominate the residual
    stream.
    """

    can_be_causal = False

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; masked positions count as zeros.

        Raises:
          ValueError: positions are split over devices, whose number does not divide a device's
            channels.
        """
        shards = num_shards("position")
        if (x_BND.shape[2] // num_shards("channel")) % shards:
            raise ValueError(
                f"fnet cannot share {x_BND.shape[2]} channels (config.model.hidden_dim) between "
                f"config.mesh.tensor x config.mesh.sequence = {num_shards('channel') * shards}"
            )

        def over_positions(z_BDN: jax.Array) -> jax.Array:
            y_BDN = jnp.fft.fft(z_BDN, self.max_positions, norm="ortho").real
            return y_BDN[..., : z_BDN.shape[2]]

        def over_width(x_BND: jax.Array) -> jax.Array:
            return jnp.fft.fft(x_BND, norm="ortho")

        def mix(z_BND: jax.Array) -> jax.Array:
            z_BDN = jnp.swapaxes(z_BND, 1, 2)
            y_BDN = over_positions(z_BDN) if shards == 1 else exchange(over_positions, z_BDN)
            return jnp.swapaxes(y_BDN, 1, 2)

        x_BND = jnp.where(mask_BN[..., None], x_BND.astype(jnp.float32), 0.0)
        whole, split = ("batch", "position", "width"), ("batch", "position", "channel")
        z_BND = shard_op(over_width, (whole,), whole)(x_BND)
        y_BND = shard_op(mix, (split,), split)(z_BND)
        return constrain(y_BND, "batch", "position", "width").astype(self.dtype)
