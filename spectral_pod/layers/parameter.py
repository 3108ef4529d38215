"""Parameters, which declare their logical axes and optimizer group where they are created."""

from collections.abc import Callable
from typing import Any, Literal

import flax
import flax.linen as nn
import jax
from flax import traverse_util

from spectral_pod.parallel.sharding import spec

# 'dynamics' are filters, decays, gates and memory scales: they have their own learning rate and no
# weight decay, as in the recipes of S4 and S5. Of the others, kernels and embeddings are decayed.
# 'statistics' are not trained: they are running averages of what layers have seen.
Group = Literal["dynamics", "decayed", "undecayed", "statistics"]


class Parameter(nn.LogicallyPartitioned):
    """A parameter boxed with the logical axes of its dimensions and its optimizer group.

    Attributes:
      group: the optimizer group, a `Group`.
      inputs: how many of its leading axes a matrix product contracts, the axis of stacked layers
        not counted; 0 if the parameter is not a matrix.
    """

    group: str = flax.struct.field(default="", pytree_node=False)
    inputs: int = flax.struct.field(default=0, pytree_node=False)


def parameter(
    init: Callable[..., jax.Array], *axes: str | None, group: Group, inputs: int = 0
) -> Callable[..., Parameter]:
    """A Flax initializer of a `Parameter` with these logical axes and this optimizer group.

    Its value is float32, also where JAX_ENABLE_X64 is set.
    """
    spec(*axes)  # raises for an axis that is not in the table

    def boxed(*args: Any) -> Parameter:
        with jax.enable_x64(False):
            value = init(*args)
        return Parameter(value, axes, group=group, inputs=inputs)

    return boxed


def by_frequency(boxed: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The parameters of a boxed tree that are functions of frequency, by path: the axes over which
    the values at one frequency lie, such as real and imaginary parts and channels."""
    return {
        path: tuple(i for i, axis in enumerate(box.names) if axis not in ("layer", "frequency"))
        for path, box in traverse_util.flatten_dict(boxed).items()
        if "frequency" in box.names
    }


def groups(boxed: Any) -> Any:
    """The optimizer group of every parameter of a boxed tree, as a tree of names.

    Raises:
      ValueError: a parameter was created without `parameter`; the message names it.
    """

    def group(path: Any, box: Any) -> str:
        if not isinstance(box, Parameter):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {name} declares no optimizer group: make it by "
                "self.param(name, parameter(init, *axes, group=...), shape)"
            )
        return box.group

    return jax.tree_util.tree_map_with_path(
        group, boxed, is_leaf=lambda x: isinstance(x, Parameter)
    )
