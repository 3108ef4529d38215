"""The table of logical axes and mesh axes, and how operations run on each device's shard.

Modules and operations name logical axes only. XLA partitions matrix products well, but not FFTs,
depthwise convolutions and data-dependent branches, for which it gathers the global batch. Those
run under `jax.shard_map` through `shard_op`, on each device's own rows and channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]

SEQUENCE = "sequence"  # the mesh axis that splits positions, for operations that communicate

# Logical axis -> mesh axes. Activations first, then parameters.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),  # sequences of a batch
    ("position", SEQUENCE),  # bytes or patches of a sequence
    ("channel", "tensor"),  # activation width inside a spectral operation
    ("exchanged_channel", ("tensor", SEQUENCE)),  # the same after positions were exchanged
    ("head", "tensor"),  # memory heads, activations and parameters
    ("width", None),  # model width of activations between blocks
    ("layer", None),  # stacked parameters of scanned layers
    ("embed", "fsdp"),  # model width of parameters, gathered just before use
    ("hidden", "tensor"),  # hidden width of a channel mixer
    # Channels of a spectral filter; gathering over fsdp, the last axis, puts them in place.
    ("filter", ("tensor", SEQUENCE, "fsdp")),
    ("few_filters", ("tensor", "fsdp")),  # the same if there are too few channels for that
    ("frequency", None),  # bins of a transfer function; their number is odd, so never split
    ("vocab", None),
    ("tap", None),  # positions of a kernel
    ("class", None),
)
_TABLE = dict(RULES)


def spec(*axes: str | None) -> PartitionSpec:
    """The partition spec of an array whose dimensions have these logical axes.

    Raises:
      KeyError: an axis is not in the table (Flax would silently leave it unsharded).
      ValueError: two dimensions use the same mesh axis.
    """
    entries = [None if axis is None else _TABLE[axis] for axis in axes]
    used = [name for e in entries for name in ((e,) if isinstance(e, str) else e or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {entries}")
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to its sharding in the table; does nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def shard_op(
    fn: Callable[..., Any],
    in_axes: Sequence[Axes],
    out_axes: Axes | Sequence[Axes],
    *,
    checked: bool = True,
) -> Callable[..., Any]:
    """Wraps `fn` to run on each device's own shard of every argument, under the current mesh.

    Without a mesh, or with a single device, it returns `fn` itself.

    Args:
      fn: a function of arrays, which may communicate by naming mesh axes.
      in_axes: one tuple of logical axes per argument.
      out_axes: one tuple for a single result, or a sequence of tuples.
      checked: whether JAX follows over which mesh axes values vary. Kernels of others do not say;
        for them every argument and result must be split over all axes of the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn
    single = not out_axes or out_axes[0] is None or isinstance(out_axes[0], str)
    out_specs = spec(*out_axes) if single else tuple(spec(*axes) for axes in out_axes)  # type: ignore[misc]
    in_specs = tuple(spec(*axes) for axes in in_axes)
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=checked)


def num_shards(axis: str) -> int:
    """The number of shards into which the current mesh splits a logical axis; 1 without a mesh."""
    sizes, names = jax.sharding.get_abstract_mesh().shape, _TABLE[axis]
    return math.prod(sizes.get(n, 1) for n in ((names,) if isinstance(names, str) else names or ()))


def shard_index(axis: str | None) -> jax.Array:
    """Which shard of a logical axis this device has, a uint32 scalar; 0 if the axis is not split.

    To be called inside `shard_op`.
    """
    if axis is None or num_shards(axis) == 1:
        return jnp.uint32(0)
    return jax.lax.axis_index(_TABLE[axis]).astype(jnp.uint32)


def filter_axis(width: int) -> str:
    """The logical axis of the channels of a filter that has `width` of them."""
    return "few_filters" if width % num_shards("filter") else "filter"


def platform() -> str:
    """The current mesh's platform: 'cpu', 'gpu' or 'tpu'; its devices may be on another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Marks `x` inside `shard_op` as varying over the mesh axes over which `like` varies.

    The cotangent of the result is then summed over those axes.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in (like, x)]
    axes = varying[0] - varying[1]
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def tree_shardings(abstract_boxed: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every leaf of a tree of boxed parameters (`layers/parameter.py`)."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_boxed), mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the rows of a batch over the data and fsdp axes; other dimensions stay whole."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
