"""Models by name, and how one is made from a configuration."""

from typing import TYPE_CHECKING, Any, cast

from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.block import mixers_of
from spectral_pod.models.model import Model
from spectral_pod.models.spectral_gpt import SpectralGPT
from spectral_pod.models.spectral_llm import SpectralLLM
from spectral_pod.models.spectral_model import SpectralModel
from spectral_pod.shapes import VOCAB_SIZE

if TYPE_CHECKING:
    from spectral_pod.config import Config

MODELS: dict[str, type[Model]] = {
    "spectral_model": SpectralModel,
    "spectral_gpt": SpectralGPT,
    "spectral_llm": SpectralLLM,
}


def pattern(config: "Config") -> tuple[str, ...]:
    """The blocks of a model, repeating: the config's own, or the model's `mixer` with a delta
    memory in every `memory_interval`-th block (0: in none)."""
    model = config.model
    if model.pattern:
        return tuple(model.pattern)
    mixer, interval = MODELS[model.name].mixer, model.memory_interval
    if interval == 0 or interval > model.num_layers:
        return (mixer,)
    memory = "gated_delta" if model.memory.gated else "delta"
    return (mixer,) * (interval - 1) + (f"{mixer}+{memory}",)


def architecture(config: "Config", *, seq_len: int = 0, **resolved: Any) -> Architecture:
    """What the model of a configuration is made of, for sequences of up to `seq_len` bytes.

    Args:
      seq_len: `config.data.seq_len` unless given; the model's `context` counts if it is longer.
      resolved: fields of `Architecture` that the configuration doesn't know.
    """
    cls = MODELS[config.model.name]
    positions = max(seq_len or config.data.seq_len, config.model.context) // cls.bytes_per_position
    return Architecture.of(
        cast(Any, config.model).to_dict(),
        pattern=pattern(config),
        max_positions=positions,
        causal=cls.causal,
        documents=config.data.documents,
        **resolved,
    )


def build(
    config: "Config",
    *,
    num_classes: int,
    seq_len: int = 0,
    vocab_size: int = VOCAB_SIZE,
    decoding: bool = False,
) -> Model:
    """The model of `config.model`; `seq_len` is as for `architecture`.

    With `decoding` its layers are not stacked; see `layers/block.py` for the parameters then.
    """
    fields = {"seq_len": seq_len, "vocab_size": vocab_size, "decoding": decoding}
    return MODELS[config.model.name](architecture(config, **fields), num_classes)


def operations(config: "Config") -> dict[str, str]:
    """The method that each operation takes on the mesh that is set, to be recorded."""
    described = architecture(config)
    methods: dict[str, str] = {}
    for mixer in mixers_of(described).values():
        methods |= mixer.methods(described)
    return methods
