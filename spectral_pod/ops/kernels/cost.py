"""The cost of a Pallas kernel, counted from its own program.

XLA sees a kernel as a custom call and knows nothing of its cost. `with_cost` counts it and hands it
over, so that XLA's scheduler and `analysis/hlo_cost.py` read it in the compiled program.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.extend import core


def with_cost(
    build: Callable[[pl.CostEstimate | None], Callable[..., Any]], arguments: Sequence[jax.Array]
) -> Any:
    """Runs `build(cost)`, a `pl.pallas_call`, on the arguments, with its cost as counted."""
    (kernel,) = kernels(jax.make_jaxpr(build(None))(*arguments).jaxpr)
    mapping, body = kernel.params["grid_mapping"], kernel.params["jaxpr"]
    cost = pl.CostEstimate(
        flops=math.prod(mapping.grid) * _flops(body),
        transcendentals=0,
        bytes_accessed=sum(_traffic(mapping.grid, block) for block in mapping.block_mappings),
    )
    return build(cost)(*arguments)


def kernels(jaxpr: core.Jaxpr) -> list[Any]:
    """The `pallas_call` equations of a program and of what it calls."""
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    return found + [
        kernel
        for eqn in jaxpr.eqns
        if eqn.primitive.name != "pallas_call"
        for inner in _inner(eqn)
        for kernel in kernels(inner)
    ]


def _flops(jaxpr: core.Jaxpr) -> int:
    """FLOPs of the matrix products, 2mnk each; the body of a loop counts for each iteration."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs: Any = eqn.invars[0].aval
            out: Any = eqn.outvars[0].aval
            total += 2 * math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(_flops, _inner(eqn)))
    return total


def _inner(eqn: Any) -> list[core.Jaxpr]:
    """The programs that an equation runs."""
    values = [v if isinstance(v, tuple | list) else [v] for v in eqn.params.values()]
    programs = [getattr(v, "jaxpr", v) for v in itertools.chain.from_iterable(values)]
    return [program for program in programs if isinstance(program, core.Jaxpr)]


def _traffic(grid: tuple[int, ...], block: Any) -> int:
    """Bytes that move between HBM and the chip: a block stays there while its index is the same.

    Index maps must only choose among the grid's indices and constants.
    """
    index = block.index_map_jaxpr.jaxpr
    assert not index.eqns, index
    cells = np.array(list(np.ndindex(*grid)))
    varying = [index.invars.index(v) for v in index.outvars if v in index.invars]
    at = cells[:, varying]
    fetched = 1 + int(np.any(at[1:] != at[:-1], axis=1).sum())
    size = math.prod(getattr(n, "block_size", n) or 1 for n in block.block_shape)
    return fetched * size * block.array_aval.dtype.itemsize
