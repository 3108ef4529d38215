"""SpectralLLM: bytes -> sums of sines -> convolutional attention on wavelet bands -> the next byte.

All of it is causal. The published design is not: its full-length FFTs, in attention and in the
feed-forward, let every position see the bytes that it has to predict.
"""

import jax
import jax.numpy as jnp

from spectral_pod.layers.embedding import HarmonicEmbedding
from spectral_pod.models.causal_model import CausalModel
from spectral_pod.ops.log_spectra import log_spectral_distance
from spectral_pod.shapes import Positions, TokenMask


class SpectralLLM(CausalModel):
    """Harmonic embeddings, wavelet attention, and a spectral consistency loss."""

    mixer = "wavelet"
    has_consistency_loss = True

    def make_embedding(self) -> HarmonicEmbedding:
        config = self.config
        sizes = config.vocab_size, config.hidden_dim
        dtype, harmonics = config.activation_dtype, config.harmonics
        return HarmonicEmbedding(*sizes, dtype, harmonics, name="embedding")

    def sow_losses(self, x_BND: Positions, embedded_BND: Positions, mask_BN: TokenMask) -> None:
        """Sows the spectral consistency loss, which is `consistency_weight` times the distance
        between the log power spectra over time of the final hidden states and of the embeddings of
        the next bytes; it has no gradient with respect to the latter.
        """
        if self.config.consistency_weight == 0:
            return
        next_BND = jnp.roll(jax.lax.stop_gradient(embedded_BND), -1, axis=1)
        # `roll` moves the first byte to the last position, which has no next byte and is masked.
        has_next_BN = jnp.pad(mask_BN[:, 1:], ((0, 0), (0, 1)))
        distance_B = log_spectral_distance(x_BND, next_BND, mask_BN & has_next_BN)
        self.sow("losses", "consistency", self.config.consistency_weight * distance_B)
