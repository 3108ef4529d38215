"""The device mesh: axes data, fsdp, sequence, tensor."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, laid out by JAX for the hardware's links.

    `sizes` come from `config.validate_mesh`. The axes are automatic: the compiler places what the
    table in `sharding.py` does not.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
