"""Parameters: their place on the mesh and their optimizer group, declared where they are made."""

from collections.abc import Callable
from typing import Any, Literal

import flax
import flax.linen as nn
import jax

from spectral_pod.parallel.sharding import spec

# Filters, decays, gates and scales of memories have a learning rate of their own and no weight
# decay, as in the recipes of S4 and S5; of the others kernels and embeddings decay.
Group = Literal["dynamics", "decayed", "undecayed"]


class Parameter(nn.LogicallyPartitioned):
    """The box of a parameter: the logical axes of its dimensions, and its optimizer group.

    Attributes:
      inputs: of a matrix, its first axes over which it is multiplied, stacked layers aside; 0 for
        other parameters.
    """

    group: str = flax.struct.field(default="", pytree_node=False)
    inputs: int = flax.struct.field(default=0, pytree_node=False)


def parameter(
    init: Callable[..., jax.Array], *axes: str | None, group: Group, inputs: int = 0
) -> Callable[..., Parameter]:
    """A Flax initializer of a `Parameter` with these logical axes and this optimizer group."""
    spec(*axes)  # an axis that is not in the table is an error here

    def boxed(*args: Any) -> Parameter:
        return Parameter(init(*args), axes, group=group, inputs=inputs)

    return boxed


def groups(boxed: Any) -> Any:
    """The optimizer group of every parameter of a boxed tree, as a tree of names.

    Raises:
      ValueError: a parameter was made without `parameter`; names it.
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
