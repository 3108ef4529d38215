"""What a model is made of: `config.model`, and the same as its modules see it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from spectral_pod.errors import ConfigError
from spectral_pod.fields import Fraction, NonNegative, Positive


@dataclasses.dataclass
class ModelConfig:
    """The fields of `config.model` that no mixer owns; mixers add sections (`layers/mixer.py`)."""

    name: str = "spectral_model"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; parameters are float32
    pattern: tuple[str, ...] = ()  # blocks, repeating: ('hyena', 'hyena+delta'); () is the model's
    channel_mixer: str = "gated"  # or 'frequency', with a causal long filter beside it
    context: NonNegative = 0  # positions that a causal model is made for; 0: data.seq_len
    positions: Literal["learned", "none"] = "learned"  # of causal models
    consistency_weight: float = 0.0  # of spectral_llm's loss between spectra
    num_layers: Positive = 6
    hidden_dim: Positive = 256
    embed_dim: Positive = 256  # width of byte embeddings before patching
    coarser_scales: tuple[int, ...] = ()  # of spectral_model: (4, 4) adds views by 4 and 16 patches
    mlp_expansion: float = 1.0  # hidden width of the channel mixer over hidden_dim
    memory_interval: NonNegative = 2  # every n-th block has a delta memory; 0: none
    norm: Literal["pre", "post"] = "pre"
    pooling: Literal["attention", "mean", "last"] = "attention"
    dropout: Fraction = 0.0
    unroll: Positive = 1  # repeats of the pattern written out: faster on CPUs, slow to compile
    remat: Literal["none", "full", "dots"] = "none"  # what the backward pass computes again
    long_conv: Literal["auto", "right_angle", "real", "matmul"] = "auto"  # see ops/long_conv.py


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Architecture(ModelConfig):
    """A `ModelConfig` resolved for the data and the use of one model; hashed, so never changed.

    Attributes:
      sections: the options of mixers, by section and name.
      pattern: never empty.
      max_positions: N, positions that the blocks are made for.
      causal: whether a position sees none after it.
      documents: in a record, encoded alike and then compared.
      vocab_size: rows of the embedding.
      decoding: whether layers are modules of their own rather than stacked (`layers/block.py`).
    """

    sections: FrozenConfigDict
    max_positions: int
    causal: bool
    documents: int = 1
    vocab_size: int = 0
    decoding: bool = False

    @classmethod
    def of(cls, model: Mapping[str, Any], **resolved: Any) -> "Architecture":
        """From the values of `config.model`, some of them replaced or added by `resolved`."""
        sections = {name: x for name, x in model.items() if isinstance(x, Mapping)}
        fields = {name: _fixed(x) for name, x in model.items() if name not in sections}
        return cls(**(fields | {"sections": FrozenConfigDict(sections)} | resolved))

    def option(self, path: str) -> Any:
        """The value of 'field' or 'section.field'.

        Raises:
          ConfigError: there is none.
        """
        section, _, name = path.rpartition(".")
        try:
            return self.sections[section][name] if section else getattr(self, name)
        except (KeyError, AttributeError):
            raise ConfigError(f"a mixer asks for config.model.{path}, which there is not") from None

    @property
    def activation_dtype(self) -> Any:
        return jnp.dtype(self.dtype)


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
