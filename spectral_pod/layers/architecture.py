"""The configuration of a model, `config.model`, and the resolved form from which it is built."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from spectral_pod.errors import ConfigError
from spectral_pod.fields import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat


@dataclasses.dataclass
class ModelConfig:
    """The fields of `config.model` itself; mixers add their sections to it (`layers/mixer.py`)."""

    name: str = "spectral_model"  # a name in models.MODELS
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; parameters are float32
    # The mixers of each block, repeated over the layers, as in ('hyena', 'hyena+delta'). (): the
    # model's default mixer, with a delta memory in every `memory_interval`-th block.
    pattern: tuple[str, ...] = ()
    # 'gated' is GEGLU; 'frequency' mixes it with a causal convolution as long as the sequence;
    # 'half_glu1' and 'half_glu2' are those of S5.
    channel_mixer: str = "gated"
    # Runs memories, hyena and wavelet in both directions in models that are not causal.
    bidirectional: bool = False
    # Bytes that position embeddings and long filters cover, if more than data.seq_len.
    context: NonNegative = 0
    # Bytes that are read at a time, if rows are longer: memories, Hyena and S5 carry their states
    # from chunk to chunk, all else sees its own chunk. 0: whole rows.
    chunk: NonNegative = 0
    # Whether gradients end at the start of a chunk (truncated backpropagation through time).
    truncate_gradients: bool = True
    positions: Literal["learned", "none"] = "learned"  # position embeddings of causal models
    harmonics: Positive = 16  # sines of an embedding of spectral_llm
    # Weight of the spectral consistency loss of spectral_llm.
    consistency_weight: NonNegativeFloat = 0.0
    num_layers: Positive = 6  # number of blocks
    hidden_dim: Positive = 256  # model width
    embed_dim: Positive = 256  # width of byte embeddings before patching
    # Merge ratios of coarser scales in spectral_model: (4, 4) adds scales of 4 and of 16 patches.
    coarser_scales: tuple[int, ...] = ()
    # Hidden width of the channel mixer, as a multiple of hidden_dim.
    mlp_expansion: PositiveFloat = 1.0
    memory_interval: NonNegative = 2  # every n-th block has a delta memory; 0: none
    norm: Literal["pre", "post"] = "pre"  # x + f(norm(x)) or norm(x + f(x))
    # Of blocks: over the channels of a position, or of each channel over batch and positions, as S5
    # does, in models that are not causal.
    normalization: Literal["layer", "batch"] = "layer"
    # Over positions, in spectral_model; 'none' predicts a label for every position.
    pooling: Literal["attention", "mean", "last", "none"] = "attention"
    # Of two documents, by their pooled vectors: as these are, or with each channel normalised over
    # the documents of the batch first, which removes what all of them share, see layers/pooling.py.
    comparison: Literal["plain", "normalized"] = "plain"
    dropout: Fraction = 0.0  # of embeddings, feed-forward hidden layers and residual branches
    # Repeats of the pattern per iteration of the scan over layers: higher values are faster on CPUs
    # and slower to compile.
    unroll: Positive = 1
    # What the backward pass recomputes: nothing, everything, or all but products with parameters.
    remat: Literal["none", "full", "dots"] = "none"
    # Method of long convolutions, see ops/long_conv.py.
    long_conv: Literal["auto", "right_angle", "real", "matmul", "toeplitz"] = "auto"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Architecture(ModelConfig):
    """A `ModelConfig` resolved for one model and its data. It is hashed, so it must never change.

    Attributes:
      sections: the options of mixers, by section and name.
      pattern: as in `ModelConfig`, but never empty.
      max_positions: N, the number of positions that the blocks are built for.
      stride: bytes that a position stands for.
      causal: whether positions must not see later ones.
      documents: documents per record; two are encoded separately and then compared.
      vocab_size: rows of the embedding table.
      decoding: whether each layer is a module of its own, not stacked (`layers/block.py`).
    """

    sections: FrozenConfigDict
    max_positions: int
    causal: bool
    stride: int = 1
    documents: int = 1
    vocab_size: int = 0
    decoding: bool = False

    @classmethod
    def of(cls, model: Mapping[str, Any], **resolved: Any) -> "Architecture":
        """Builds it from `config.model`; `resolved` adds fields and overrides others."""
        sections = {name: x for name, x in model.items() if isinstance(x, Mapping)}
        fields = {name: _hashable(x) for name, x in model.items() if name not in sections}
        return cls(**(fields | {"sections": FrozenConfigDict(sections)} | resolved))

    def option(self, path: str) -> Any:
        """The value of 'field' or 'section.field'.

        Raises:
          ConfigError: there is no such field.
        """
        section, _, name = path.rpartition(".")
        try:
            return self.sections[section][name] if section else getattr(self, name)
        except (KeyError, AttributeError):
            raise ConfigError(f"a mixer asks for config.model.{path}, which there is not") from None

    @property
    def activation_dtype(self) -> Any:
        return jnp.dtype(self.dtype)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
