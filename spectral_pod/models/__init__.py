"""Models by name."""

from typing import Any

import flax.linen as nn
import ml_collections

from spectral_pod.models.spectral_model import SpectralModel, max_positions
from spectral_pod.ops import fft
from spectral_pod.parallel.sharding import platform

MODELS = {"spectral_model": SpectralModel}


def operations(config: Any, *, seq_len: int) -> dict[str, str]:
    """The method that each operation's door takes on the mesh that is set, to be recorded."""
    spectral, positions = config.model.spectral, max_positions(seq_len)
    fft_length = {"linear": 2, "circular": 1}[spectral.padding] * positions
    chosen = {"spectral_filter": spectral.method}
    if spectral.method == "auto":
        chosen["spectral_filter"] = fft.choose(platform(), positions, fft_length)
    if config.model.memory_interval:
        chosen["delta_rule"] = config.model.memory.method
    return chosen


def build(config: Any, *, seq_len: int, num_classes: int) -> nn.Module:
    """The model of `config.model` for sequences of up to `seq_len` bytes."""
    fields = config.model.to_dict() | {"max_positions": max_positions(seq_len)}
    return MODELS[config.model.name](ml_collections.FrozenConfigDict(fields), num_classes)
