"""What instructions and collectives belong to: a layer, a parameter, a gradient, an activation."""

import itertools
import re
from collections.abc import Mapping

from spectral_pod.analysis.hlo import Collective

# Parts of an operation's path that are added by JAX's transformations, not by the model.
_MACHINERY = re.compile(
    r"\w+\(.*\)|while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|remat\d*|"
    r"branch_\d+_fun|custom_[jv]+p_call\w*|pjit|core_call|[A-Z]\w*"
)
_ARGUMENT = re.compile(r"\w+(?:\.\w+|\['[^']*'\]|\[\d+\])+")  # state.params['head']['kernel']

Shape = tuple[int, ...]


def parameter_shapes(
    parameters: Mapping[str, Shape], mesh_shape: Mapping[str, int]
) -> dict[Shape, str]:
    """The shapes in which parameters may be communicated, with their names ('' if not unique).

    A parameter may be communicated whole or as one layer of a stack, with any one dimension split
    over mesh axes. Shapes are canonical: sorted, without dimensions of size 1.
    """
    sizes = {a * b for a, b in itertools.combinations((1, 1, *mesh_shape.values()), 2)}
    shapes: dict[Shape, str] = {}
    for name, shape in parameters.items():
        for layers in range(min(3, len(shape) + 1)):
            for axis, size in itertools.product(range(layers, len(shape)), sizes):
                if shape[axis] % size == 0:
                    split = (*shape[layers:axis], shape[axis] // size, *shape[axis + 1 :])
                    key = _canonical(split)
                    shapes[key] = name if shapes.get(key, name) == name else ""
    return shapes


def describe(collective: Collective, parameters: Mapping[Shape, str]) -> str:
    """Describes a collective, e.g. 'gradient of blocks/block_0/feed_forward/out f32[64,64]'.

    `parameters` come from `parameter_shapes`. If there are several arrays, the largest is named.
    """
    arrays = [a for a in collective.arrays if a.shape]
    module, primitive = _module_and_primitive(collective.source)
    if not arrays:
        return f"scalars ({primitive or 'sum'})"
    if argument := _ARGUMENT.fullmatch(collective.source):
        path = "/".join(re.findall(r"\w+", argument[0]))
        return f"{re.sub('.*params/', 'parameter ', path, count=1)} {collective.what}"
    recomputed = "rematted_computation" in collective.source
    backward = "transpose(" in collective.source and not recomputed
    known = sum(a.bytes for a in arrays if _canonical(a.shape) in parameters)
    if 2 * known >= sum(a.bytes for a in arrays):  # a few sums may be merged with gradients
        largest = _canonical(max(arrays, key=lambda a: a.bytes).shape)
        name = parameters.get(largest) or module or "the step"
        role = "gradient of" if backward else "parameter"
    else:
        name = f"{module or 'the step'} ({primitive or 'unnamed'})"
        role = "activation's gradient in" if backward else "activation in"
        if collective.link == "DCN":  # padded and flattened for sending: the shape is no clue
            role = "from the backward pass of" if backward else "from"
    again = ", again for the backward pass" if recomputed else ""
    return f"{role} {name} {collective.what}{again}"


def layer(source: str) -> str:
    """The layer of a JAX operation, and the pass: 'blocks/block_0/hyena, backward'."""
    module, _ = _module_and_primitive(source)
    name = "/".join(module.split("/")[:3]) or "outside of layers"
    if "rematted_computation" in source:
        return f"{name}, again for the backward pass"
    return f"{name}, backward" if "transpose(" in source else name


def _module_and_primitive(source: str) -> tuple[str, str]:
    """The module and primitive of an operation, from its path; of the first one, if merged."""
    first = re.sub(r"/\(([^:()]*(?:\([^()]*\)[^:()]*)*):.*", r"/\1", source)
    parts = [part.split(".")[0] for part in first.split("/") if not _MACHINERY.fullmatch(part)]
    *module, primitive = [part for part, _ in itertools.groupby(parts)] or [""]
    return "/".join(module), primitive


def _canonical(shape: Shape) -> Shape:
    return tuple(sorted(n for n in shape if n > 1))
