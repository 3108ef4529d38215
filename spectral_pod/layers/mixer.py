"""What a mixer is: a layer through which positions see one another.

A mixer is one class. Its fields, annotated as in `fields.py`, are its options: the fields of
`config.model.SECTION` with their defaults, but for `shared` ones, which another section has. What
else the project must know of a mixer, such as what must divide what on a mesh, the class says too:
one line in `layers/mixers.py` is all that adds a mixer.

Every mixer maps a whole sequence, `mixer(x_BND, mask_BN)`. One that can be causal also decodes:

    y_BPD, state = mixer.prefill(x_BPD, mask_BP)            # prompts, with padding before them
    y_B1D, state = mixer.advance(x_B1D, state, position)    # the next position, and so on

gives the rows of the whole sequence. `init_state` is the state before the first position.
"""

import dataclasses
from typing import Any, ClassVar, TypeAlias

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod import fields
from spectral_pod.layers.architecture import Architecture

State: TypeAlias = Any  # a pytree of arrays, of a type of the mixer's own


class GrowingState(flax.struct.PyTreeNode):
    """A state that needs room for every position to come."""

    def extend(self, capacity: int) -> "GrowingState":
        """The state with room for `capacity` positions, those that it holds included."""
        raise NotImplementedError


def shared(path: str, default: Any) -> Any:
    """A field of a mixer that has the value of 'field' or 'section.field' of `config.model`; the
    default counts where a mixer is made without a configuration."""
    return dataclasses.field(default=default, metadata={"path": path})


def option(name: str, default: Any) -> Any:
    """A field of a mixer that has another name in its section of the configuration."""
    return dataclasses.field(default=default, metadata={"option": name})


class Mixer(nn.Module):
    """The base of all mixers, and of the channel mixers (`layers/feed_forward.py`).

    Attributes:
      width: D.
      max_positions: N, the positions that the mixer is made for.
      causal: whether a position must see none after it.
      deterministic: whether dropout is off.
      dtype: of activations and products.
    """

    width: int
    max_positions: int = 0
    causal: bool = True
    deterministic: bool = True
    dtype: Any = jnp.float32

    section: ClassVar[str] = ""
    # Without this the mixer sees the whole sequence, whatever the model.
    can_be_causal: ClassVar[bool] = True
    # Pairs of fields of the configuration of which the second must divide the first.
    divisible: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Fields and the values with which positions see later ones, so that nothing can be decoded.
    sees_future: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Fields and the values with which operations are computed as they are defined: their FLOPs are
    # the model's, whatever method computes them.
    definition: ClassVar[tuple[tuple[str, str], ...]] = ()

    @classmethod
    def options(cls) -> dict[str, tuple[Any, Any]]:
        """Annotation and default of every field of `config.model.SECTION` that the mixer has."""
        annotations = fields.types_of(cls)
        return {
            field.metadata.get("option", field.name): (annotations[field.name], field.default)
            for field in cls._own_fields()
            if "path" not in field.metadata
        }

    @classmethod
    def configured(cls, config: Architecture) -> dict[str, Any]:
        """The values of all fields of its own, shared ones too.

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
        """The mixer that a configuration describes, as a module of this name; `fixed` are fields
        that it has whatever the configuration says."""
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
        """Raises a ConfigError for options that annotations and `divisible` cannot rule out."""

    @classmethod
    def halo(cls, config: Architecture) -> int:
        """Positions before a device's own that it asks of the device before."""
        return 0

    @classmethod
    def methods(cls, config: Architecture) -> dict[str, str]:
        """The method of each operation, as dispatch picks it on the mesh that is set."""
        return {}

    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; invalid positions change nothing at valid ones.

        By default `prefill` without its state, which the compiler drops.
        """
        return self.prefill(x_BND, mask_BN)[0]

    def init_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first position."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, State]:
        """Prompts, invalid before their first position: the result of a call, and the state."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def advance(
        self, x_B1D: jax.Array, state: State, position: jax.Array
    ) -> tuple[jax.Array, State]:
        """One more position, valid in every sequence, counted from the start of the prompts."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")
