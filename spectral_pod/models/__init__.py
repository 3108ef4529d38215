"""Models by name."""

from typing import Any

import flax.linen as nn
import ml_collections

from spectral_pod.models.spectral_model import SpectralModel, max_positions

MODELS = {"spectral_model": SpectralModel}


def build(config: Any, *, seq_len: int, num_classes: int) -> nn.Module:
    """The model of `config.model` for sequences of up to `seq_len` bytes."""
    fields = config.model.to_dict() | {"max_positions": max_positions(seq_len)}
    return MODELS[config.model.name](ml_collections.FrozenConfigDict(fields), num_classes)
