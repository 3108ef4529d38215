"""Mixers by name; `layers/mixer.py` defines their interface."""

from spectral_pod.layers.attention import (
    AttentionLayer,
    LinearAttentionLayer,
    LinformerLayer,
    LocalAttentionLayer,
)
from spectral_pod.layers.delta_memory import DeltaMemoryLayer, GatedDeltaMemoryLayer
from spectral_pod.layers.fnet import FNetLayer
from spectral_pod.layers.hyena import HyenaLayer
from spectral_pod.layers.mixer import Mixer
from spectral_pod.layers.multi_scale import MultiScaleLayer
from spectral_pod.layers.s5 import S5Layer
from spectral_pod.layers.selective import SelectiveLayer
from spectral_pod.layers.spectral import SpectralLayer
from spectral_pod.layers.wavelet_attention import WaveletAttention

MIXERS: dict[str, type[Mixer]] = {
    "spectral": SpectralLayer,
    "delta": DeltaMemoryLayer,
    "gated_delta": GatedDeltaMemoryLayer,
    "hyena": HyenaLayer,
    "selective": SelectiveLayer,
    "attention": AttentionLayer,
    "local_attention": LocalAttentionLayer,
    "linear_attention": LinearAttentionLayer,
    "linformer": LinformerLayer,
    "fnet": FNetLayer,
    "s5": S5Layer,
    "wavelet": WaveletAttention,
    "multi_scale": MultiScaleLayer,
}
