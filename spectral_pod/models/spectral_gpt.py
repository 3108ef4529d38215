"""SpectralGPT: bytes -> causal long convolutions with delta memories -> the next byte."""

from spectral_pod.layers.embedding import Embedding
from spectral_pod.models.causal_model import CausalModel
from spectral_pod.shapes import Positions, Tokens


class SpectralGPT(CausalModel):
    """Learned embeddings; by default Hyena blocks, every second one with a delta memory."""

    mixer = "hyena"

    def embed(self, tokens_BL: Tokens) -> Positions:
        config = self.config
        return Embedding(
            config.vocab_size, config.hidden_dim, config.activation_dtype, name="embedding"
        )(tokens_BL)
