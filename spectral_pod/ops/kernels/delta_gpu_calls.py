"""What both kernels of the delta rule for GPUs share: padded sizes, names of arrays, and calls.

The last part of an array's name has its dimensions, by letters of `shapes.py` and of the kernel.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spectral_pod.ops.delta_recurrence import DeltaInputs, pad_tokens

_MIN_WIDTH = 16  # of keys and of values, which are powers of two


def padded(
    inputs: DeltaInputs, state_BHVK: jax.Array, multiple: int
) -> tuple[DeltaInputs, jax.Array]:
    """The inputs with a multiple of so many tokens, and heads of widths that kernels have."""
    _, N, _, K = inputs.k.shape
    keys, values = (max(pl.next_power_of_2(width), _MIN_WIDTH) for width in (K, inputs.v.shape[3]))

    def widen(x: jax.Array, *widths: int) -> jax.Array:
        kept = [(0, 0)] * (x.ndim - len(widths))
        return jnp.pad(x, [*kept, *((0, n - w) for n, w in zip(widths, x.shape[-len(widths) :]))])

    tokens = pl.cdiv(N, multiple) * multiple
    q, k, v, *scalars = (pad_tokens(x, tokens) for x in inputs if x is not None)
    inputs = DeltaInputs(widen(q, keys), widen(k, keys), widen(v, values), *scalars)
    return inputs, widen(state_BHVK, values, keys)


def named(inputs: DeltaInputs) -> dict[str, jax.Array]:
    names = "q_BNHK", "k_BNHK", "v_BNHV", "beta_BNH", "log_gate_BNH"
    return {name: x for name, x in zip(names, inputs, strict=True) if x is not None}


def call(
    kernel: Callable[[dict[str, Any]], None],
    name: str,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, tuple[int, ...]],
    *,
    grid: tuple[int, ...],
    parts: Mapping[str, int],
    warps: int,
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs a kernel on references by name, and returns its outputs, float32 of these shapes.

    Args:
      kernel: of a dictionary of references, inputs and outputs.
      grid: programs by sequence B, head H, and anything else.
      parts: how much of a dimension, by its letter, the third axis of the grid cuts off. Of B and H
        a program has one, and of the others all.
    """
    sizes = {"B": 1, "H": 1, **parts}

    def spec(item: tuple[str, Any]) -> pl.BlockSpec:
        name, x = item
        letters, shape = name.rpartition("_")[2], getattr(x, "shape", x)

        def index(b: Any, h: Any, *rest: Any) -> tuple[Any, ...]:
            at = {"B": b, "H": h} | {letter: rest[0] for letter in parts}
            return tuple(at.get(letter, 0) for letter in letters)

        return pl.BlockSpec(
            tuple(sizes.get(letter, n) for letter, n in zip(letters, shape, strict=True)), index
        )

    names = [*inputs, *outputs]
    varying = jax.typeof(inputs["k_BNHK"]).manual_axis_type
    results = pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        name=name,
        grid=grid,
        in_specs=[*map(spec, inputs.items())],
        out_specs=[*map(spec, outputs.items())],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)
            for shape in outputs.values()
        ],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))
