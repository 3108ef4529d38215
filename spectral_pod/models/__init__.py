"""Models by name, and their construction from a configuration."""

from typing import TYPE_CHECKING, Any, cast

from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.block import mixers_of
from spectral_pod.models.model import Model
from spectral_pod.models.spectral_gpt import SpectralGPT
from spectral_pod.models.spectral_llm import SpectralLLM
from spectral_pod.models.spectral_model import SpectralModel
from spectral_pod.ops.choice import Choice
from spectral_pod.shapes import VOCAB_SIZE

if TYPE_CHECKING:
    from spectral_pod.config import Config

MODELS: dict[str, type[Model]] = {
    "spectral_model": SpectralModel,
    "spectral_gpt": SpectralGPT,
    "spectral_llm": SpectralLLM,
}


def pattern(config: "Config") -> tuple[str, ...]:
    """The pattern that a model's blocks repeat: `config.model.pattern`, or by default the model's
    `mixer`, with a delta memory in every `memory_interval`-th block (0: in none)."""
    model = config.model
    if model.pattern:
        return tuple(model.pattern)
    mixer, interval = MODELS[model.name].mixer, model.memory_interval
    if interval == 0 or interval > model.num_layers:
        return (mixer,)
    memory = "gated_delta" if model.memory.gated else "delta"
    return (mixer,) * (interval - 1) + (f"{mixer}+{memory}",)


def bytes_per_position(config: "Config") -> int:
    """How many bytes one position of a configuration's model stands for."""
    model = config.model
    return int(model.patch.stride) if MODELS[model.name].reads_patches else 1


def architecture(config: "Config", *, seq_len: int = 0, **resolved: Any) -> Architecture:
    """The resolved architecture of a configuration's model, for sequences of up to `seq_len` bytes.

    Args:
      config: the configuration.
      seq_len: 0 means `config.data.seq_len`; `config.model.context` applies if it is longer.
      resolved: fields of `Architecture` that the configuration does not have.
    """
    cls, stride = MODELS[config.model.name], bytes_per_position(config)
    positions = max(seq_len or config.data.seq_len, config.model.context) // stride
    return Architecture.of(
        cast(Any, config.model).to_dict(),
        pattern=pattern(config),
        max_positions=positions,
        stride=stride,
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

    With `decoding` its layers are not stacked; it takes the parameters of `layers.block.unstack`.
    """
    fields = {"seq_len": seq_len, "vocab_size": vocab_size, "decoding": decoding}
    return MODELS[config.model.name](architecture(config, **fields), num_classes)


def operations(config: "Config") -> dict[str, Choice]:
    """The method of each operation in training on the current mesh, for the run's record."""
    described = architecture(config)
    batch = config.data.documents * config.train.global_batch_size // config.train.grad_accumulation
    methods: dict[str, Choice] = {}
    for mixer in mixers_of(described).values():
        methods |= mixer.methods(described, batch)
    return methods
