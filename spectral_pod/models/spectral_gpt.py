"""SpectralGPT: bytes -> causal long convolutions with delta memories -> the next byte."""

from spectral_pod.models.causal_model import CausalModel


class SpectralGPT(CausalModel):
    """Learned embeddings; by default Hyena blocks, every second one with a delta memory."""

    mixer = "hyena"
