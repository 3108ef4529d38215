"""Model FLOPs, counted by walking the jaxpr of the forward pass."""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from spectral_pod import config as config_lib
from spectral_pod import models
from spectral_pod.analysis.hardware import CHIPS
from spectral_pod.config import Config, read_len, row_len
from spectral_pod.layers.block import mixers_of
from spectral_pod.shapes import VOCAB_SIZE

# Peak dense bfloat16 FLOP/s of one JAX device, by `device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    kind: chip.peak_flops
    for chip in CHIPS.values()
    for kind in chip.device_kinds
    if kind != "cpu"  # its figure is nominal
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where it is not known, as for CPUs."""
    return PEAK_FLOPS.get(device.device_kind)


def train_flops(
    config: Config, params: Any, num_classes: int, vocab_size: int = VOCAB_SIZE
) -> float:
    """Model FLOPs of one training step: those of the forward pass, and twice as many backward.

    They are counted for the defining form of each operation, with FFTs and recurrences, whichever
    method computes it. `params` may be `jax.ShapeDtypeStruct`s.
    """
    model = models.build(defined(config), num_classes=num_classes, vocab_size=vocab_size)
    length = read_len(config)
    chunks = row_len(config) // length  # what reaches from chunk to chunk does not count
    tokens = jax.ShapeDtypeStruct((config.train.global_batch_size, length), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, bool)
    unsharded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def forward(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens, mask)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return 3.0 * chunks * forward_flops(forward, unsharded, tokens, mask)


def defined(config: Config) -> Config:
    """The configuration with the defining form of each operation of its mixers."""
    config = config_lib.copy(config)
    for mixer in mixers_of(models.architecture(config)).values():
        cast(ConfigDict, config).update_from_flattened_dict(dict(mixer.definition))
    return config


def forward_flops(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs of one call: 2mnk per product, 2.5 n log2 n per real FFT, 5 n log2 n per complex FFT.

    Elementwise operations do not count, as in the usual definition of model FLOPs. `fn` is traced
    on abstract arguments without a mesh, so shapes are global. The body of a scan counts once per
    iteration; a conditional counts its cheapest branch, as the others here are rare fall-backs.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(equation_flops(equation) for equation in jaxpr.eqns)


def equation_flops(equation: Any) -> float:
    """FLOPs of one equation of a jaxpr, as `forward_flops` counts them."""
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
    if name == "pallas_call":  # its body runs once per cell of its grid
        return math.prod(params["grid_mapping"].grid) * _count(params["jaxpr"])
    if name == "cond":
        return min(_count(branch.jaxpr) for branch in params["branches"])
    inner = [
        getattr(params[key], "jaxpr", params[key])
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr")
        if key in params
    ]
    return sum(_count(jaxpr) for jaxpr in inner[:1])
