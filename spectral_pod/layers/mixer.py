"""The interface of a mixer: a layer in which positions depend on one another.

A mixer is one class. Its fields, annotated as in `fields.py`, are its options: they define the
fields of `config.model.SECTION` and their defaults, except for `shared` fields, which belong to
another section. The class also declares what else the project needs to know about the mixer, such
as which mesh axes must divide which dimensions. A mixer is added by one line in `layers/mixers.py`.

Every mixer maps whole sequences, `mixer(x_BND, mask_BN)`. One that can be causal also decodes:

    y_BPD, state = mixer.prefill(x_BPD, mask_BP)            # left-padded prompts
    y_B1D, state = mixer.advance(x_B1D, state, position)    # then one position at a time

These return the outputs of the whole sequence. `init_state` is the state before the first position.

A sequence that is too long for this is read in chunks of `max_positions` positions:

    y_BND, carry = mixer.extend(x_BND, mask_BN, carry)      # None before the first chunk

What a mixer carries is of fixed size, whatever the number of chunks, and zero at the start.
"""

import dataclasses
from typing import Any, ClassVar, TypeAlias

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod import fields
from spectral_pod.layers.architecture import Architecture
from spectral_pod.ops.choice import Choice

State: TypeAlias = Any  # a pytree of arrays; each mixer has a type of its own


class GrowingState(flax.struct.PyTreeNode):
    """A state whose size grows with the number of positions, such as a key-value cache."""

    def extend(self, capacity: int) -> "GrowingState":
        """The state with space for `capacity` positions, including those that it holds."""
        raise NotImplementedError


def shared(path: str, default: Any) -> Any:
    """A field of a mixer with the value of `path`, a 'field' or 'section.field' of `config.model`.

    The default applies where a mixer is built without a configuration.
    """
    return dataclasses.field(default=default, metadata={"path": path})


def option(name: str, default: Any) -> Any:
    """A field of a mixer that is called `name` in its section of the configuration."""
    return dataclasses.field(default=default, metadata={"option": name})


class Mixer(nn.Module):
    """The base of all mixers, and of the channel mixers (`layers/feed_forward.py`).

    Attributes:
      width: D, the model width.
      max_positions: N, the number of positions that the mixer is built for.
      causal: whether positions must not see later ones.
      deterministic: whether dropout is off.
      dtype: of activations and matrix products.
    """

    width: int
    max_positions: int = 0
    causal: bool = True
    deterministic: bool = True
    dtype: Any = jnp.float32

    section: ClassVar[str] = ""
    # If False, positions see the whole sequence, whatever `causal` is.
    can_be_causal: ClassVar[bool] = True
    # If True, positions see earlier ones only, whatever `causal` is; `model.bidirectional` adds
    # another such mixer for later ones.
    one_directional: ClassVar[bool] = False
    # Of a channel mixer: it follows every mixer, within the mixer's residual branch.
    within_branch: ClassVar[bool] = False
    # Pairs of configuration fields, of which the second must divide the first.
    divisible: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Configuration fields and values with which positions see later ones, which rules out decoding.
    sees_future: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Configuration fields and values that select the defining form of each operation. Model FLOPs
    # are those of this form, whichever method computes the operation.
    definition: ClassVar[tuple[tuple[str, str], ...]] = ()

    @classmethod
    def options(cls) -> dict[str, tuple[Any, Any]]:
        """(annotation, default) of the mixer's fields of `config.model.SECTION`, by name."""
        annotations = fields.types_of(cls)
        return {
            field.metadata.get("option", field.name): (annotations[field.name], field.default)
            for field in cls._own_fields()
            if "path" not in field.metadata
        }

    @classmethod
    def sections(cls) -> set[str]:
        """The sections of `config.model` that the mixer reads."""
        paths = [field.metadata.get("path", f"{cls.section}.") for field in cls._own_fields()]
        return {path.partition(".")[0] for path in paths if "." in path}

    @classmethod
    def configured(cls, config: Architecture) -> dict[str, Any]:
        """The values of the mixer's own fields in a configuration, shared ones included.

        Raises:
          ConfigError: the configuration has no such field.
        """

        def path(field: Any) -> str:
            own = f"{cls.section}.{field.metadata.get('option', field.name)}"
            return str(field.metadata.get("path", own))

        return {field.name: config.option(path(field)) for field in cls._own_fields()}

    @classmethod
    def from_config(
        cls, config: Architecture, *, deterministic: bool, name: str, **fixed: Any
    ) -> "Mixer":
        """The mixer of a configuration, as a module of this name; `fixed` overrides its fields."""
        return cls(
            width=config.hidden_dim,
            max_positions=config.max_positions,
            causal=config.causal,
            deterministic=deterministic,
            dtype=config.activation_dtype,
            name=name,
            **(cls.configured(config) | fixed),
        )

    @classmethod
    def _own_fields(cls) -> list[Any]:
        of_all = {field.name for field in dataclasses.fields(Mixer)}
        return [field for field in dataclasses.fields(cls) if field.name not in of_all]

    @classmethod
    def check(cls, config: Architecture) -> None:
        """Raises a ConfigError for invalid options that annotations and `divisible` allow."""

    @classmethod
    def has_frequencies(cls, config: Architecture) -> bool:
        """Whether it learns functions of frequency: parameters with this logical axis."""
        return False

    @classmethod
    def halo(cls, config: Architecture) -> int:
        """The number of positions that a device needs from the preceding one, if they are split."""
        return 0

    @classmethod
    def merges(cls, config: Architecture) -> int:
        """How many positions it merges to one; if they are split, each device has whole ones."""
        return 1

    @classmethod
    def methods(cls, config: Architecture, batch: int) -> dict[str, Choice]:
        """The method that dispatch selects on the current mesh, and why, by operation.

        `batch` is the number of sequences that the devices compute at once in training.
        """
        return {}

    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; invalid positions do not affect valid ones.

        By default this is `prefill`; the compiler removes its state, which is not used.
        """
        return self.prefill(x_BND, mask_BN)[0]

    def extend(
        self, x_BND: jax.Array, mask_BN: jax.Array, carry: State | None
    ) -> tuple[jax.Array, State]:
        """Reads the next chunk of longer sequences; returns its outputs, and what is carried on.

        By default nothing is: positions see those of their own chunk only.
        """
        return self(x_BND, mask_BN), None

    def init_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first position."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, State]:
        """Reads left-padded prompts; returns the result of a call, and the state after them."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def advance(
        self, x_B1D: jax.Array, state: State, position: jax.Array
    ) -> tuple[jax.Array, State]:
        """Reads one more position, which is valid in every sequence.

        Args:
          x_B1D: the input there.
          state: the state of all earlier positions.
          position: int32 scalar, counted from the start of the padded prompts.

        Returns:
          The output [B, 1, D] in `dtype`, and the new state.
        """
        raise NotImplementedError(f"{type(self).__name__} does not decode")
