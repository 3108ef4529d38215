"""Where every array lives: THE table from logical axes to mesh axes, and how operations run on it.

Modules and operations name logical axes only. XLA partitions matrix products well and FFTs,
depthwise convolutions and data-dependent branches badly (it gathers the global batch), so those
run under `jax.shard_map` through `shard_op`, on each device's own rows and channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]

SEQUENCE = "sequence"  # the mesh axis that splits positions; ops that communicate name it

# Logical axis -> mesh axes. Activations first, then parameters.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),  # sequences of a batch
    ("position", SEQUENCE),  # bytes or patches of a sequence
    ("channel", "tensor"),  # activation width inside a spectral operation
    ("exchanged_channel", ("tensor", SEQUENCE)),  # the same where positions have been made whole
    ("head", "tensor"),  # memory heads, activations and parameters
    ("width", None),  # model width of activations between blocks
    ("layer", None),  # stacked parameters of scanned layers
    ("embed", "fsdp"),  # model width of parameters: gathered just before use
    ("hidden", "tensor"),  # hidden width of a channel mixer
    # Channels of a spectral filter; gathered over fsdp, the last, they are where they are used.
    ("filter", ("tensor", SEQUENCE, "fsdp")),
    ("few_filters", ("tensor", "fsdp")),  # the same where they are too few to go round
    ("frequency", None),  # frequency bins; their number is odd, so never split
    ("vocab", None),
    ("tap", None),  # positions of a short convolution kernel
    ("class", None),
)
_TABLE = dict(RULES)


def spec(*axes: str | None) -> PartitionSpec:
    """The mesh axes of an array whose dimensions carry these logical axes.

    Raises:
      KeyError: an axis is not in the table (Flax would silently leave it unsharded).
      ValueError: two dimensions would share a mesh axis.
    """
    entries = [None if axis is None else _TABLE[axis] for axis in axes]
    used = [name for e in entries for name in ((e,) if isinstance(e, str) else e or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {entries}")
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its place in the table; does nothing where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def shard_op(
    fn: Callable[..., Any], in_axes: Sequence[Axes], out_axes: Axes | Sequence[Axes]
) -> Callable[..., Any]:
    """`fn` on each device's own block of every argument, under the mesh that is set, if any.

    `in_axes` holds one tuple of logical axes per argument, `out_axes` one tuple (one result) or a
    sequence of tuples. `fn` communicates, if it needs to, by naming mesh axes itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn
    single = not out_axes or out_axes[0] is None or isinstance(out_axes[0], str)
    out_specs = spec(*out_axes) if single else tuple(spec(*axes) for axes in out_axes)  # type: ignore[misc]
    return jax.shard_map(fn, in_specs=tuple(spec(*a) for a in in_axes), out_specs=out_specs)


def num_shards(axis: str) -> int:
    """Into how many parts the mesh that is set, if any, splits a logical axis."""
    sizes, names = jax.sharding.get_abstract_mesh().shape, _TABLE[axis]
    return math.prod(sizes.get(n, 1) for n in ((names,) if isinstance(names, str) else names or ()))


def filter_axis(width: int) -> str:
    """The logical axis of the channels of a filter that is this wide."""
    return "few_filters" if width % num_shards("filter") else "filter"


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': of the mesh that is set, which need not be this machine's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, known inside `shard_op` to differ between the devices between which `like` does.

    The cotangent of the result is then summed over those devices.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in (like, x)]
    axes = varying[0] - varying[1]
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def tree_shardings(abstract_boxed: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every leaf of a boxed (`nn.with_logical_partitioning`) tree."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_boxed), mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes; everything else whole."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
