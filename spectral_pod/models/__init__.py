"""Models by name."""

from typing import Any

import flax.linen as nn
import ml_collections

from spectral_pod import config as config_lib
from spectral_pod.layers.mixers import mixers_of
from spectral_pod.models.spectral_gpt import SpectralGPT
from spectral_pod.models.spectral_llm import SpectralLLM
from spectral_pod.models.spectral_model import SpectralModel
from spectral_pod.ops import fft, long_conv
from spectral_pod.parallel.sharding import platform
from spectral_pod.shapes import VOCAB_SIZE

# A model has a `mixer`, that of its blocks unless the config gives a pattern, its
# `bytes_per_position`, and whether it is `causal`.
MODELS: dict[str, Any] = {
    "spectral_model": SpectralModel,
    "spectral_gpt": SpectralGPT,
    "spectral_llm": SpectralLLM,
}


def pattern(config: Any) -> tuple[str, ...]:
    """The blocks of a model, repeating; see `config.pattern`."""
    return config_lib.pattern(config, MODELS[config.model.name].mixer)


def max_positions(config: Any, seq_len: int) -> int:
    """Positions that the blocks are made for: of `seq_len` bytes, or the context if longer."""
    return max(seq_len, config.model.context) // MODELS[config.model.name].bytes_per_position


def operations(config: Any, *, seq_len: int) -> dict[str, str]:
    """The method that each operation's door takes on the mesh that is set, to be recorded."""
    mixers, positions = mixers_of(pattern(config)), max_positions(config, seq_len)
    causal, chosen = MODELS[config.model.name].causal, {}
    if "spectral" in mixers or ("selective" in mixers and not causal):
        chosen["spectral_filter"] = config.model.spectral.method
        if config.model.spectral.method == "auto":
            circular = "spectral" in mixers and config.model.spectral.padding == "circular"
            fft_length = positions if circular else 2 * positions
            chosen["spectral_filter"] = fft.choose(platform(), positions, fft_length)
    long = mixers & {"hyena", "wavelet"} or ("selective" in mixers and causal)
    if long or config.model.channel_mixer == "frequency":
        method = config.model.long_conv
        chosen["causal_conv"] = long_conv.choose(platform()) if method == "auto" else method
    if mixers & {"delta", "gated_delta"}:
        chosen["delta_rule"] = config.model.memory.method
    return chosen


def build(
    config: Any,
    *,
    seq_len: int,
    num_classes: int,
    vocab_size: int = VOCAB_SIZE,
    decoding: bool = False,
) -> nn.Module:
    """The model of `config.model` for sequences of up to `seq_len` bytes.

    With `decoding` its layers are not stacked; see `layers/block.py` for the parameters then.
    """
    cls = MODELS[config.model.name]
    fields = config.model.to_dict() | {
        "max_positions": max_positions(config, seq_len),
        "pattern": pattern(config),
        "vocab_size": vocab_size,
        "causal": cls.causal,
        "documents": config.data.documents,
        "decoding": decoding,
    }
    return cls(ml_collections.FrozenConfigDict(fields), num_classes)
