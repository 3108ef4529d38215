"""Model FLOPs, counted by walking the jaxpr of the forward pass."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Peak dense bfloat16 FLOP/s of one JAX device, by `device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where it isn't known (CPUs)."""
    return PEAK_FLOPS.get(device.device_kind)


def forward_flops(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs of one call: products 2mnk, real FFTs 2.5 n log2 n, complex ones 5 n log2 n.

    Elementwise work is left out, as in the usual definition of model FLOPs. `fn` is traced on
    abstract arguments without a mesh, so shapes are global. A scan counts its body every time; of
    a branch the cheapest side counts, since the other ones here are rare fall-backs.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(lhs[axis] for axis in contracting)
    if name == "fft":
        length = math.prod(params["fft_lengths"])
        whole = max((equation.invars[0].aval, equation.outvars[0].aval), key=lambda a: a.shape[-1])
        real = any(
            np.issubdtype(v.aval.dtype, np.floating) for v in (*equation.invars, *equation.outvars)
        )
        return math.prod(whole.shape) * math.log2(max(length, 2)) * (2.5 if real else 5.0)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "cond":
        return min(_count(branch.jaxpr) for branch in params["branches"])
    inner = [
        getattr(params[key], "jaxpr", params[key])
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr")
        if key in params
    ]
    return sum(_count(jaxpr) for jaxpr in inner[:1])
