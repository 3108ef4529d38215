"""Kernels for TPUs without a TPU: their compiled schedules against what XLA makes of other methods.

    python -m tools.bench kernels --topology=v5e:2x2 [--json=FILE]

Every case is an operation by one method, forward and backward, compiled for the topology with equal
work on each chip. The cycles of a kernel are those of its static schedule on one core
(`analysis/kernel_schedule.py`, which also says what is counted by convention). Those of what XLA
compiles are libtpu's own estimates; of a conditional the cheapest branch counts, as the others are
rare fall-backs. Neither waits for memory, so the time is at least that of the bytes that move to
and from HBM. Nothing has run on a TPU.

Letters here: those of `shapes.py`.
"""

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from spectral_pod.analysis import hardware, kernel_schedule
from spectral_pod.analysis.hardware import Topology
from spectral_pod.analysis.kernel_schedule import Kernel
from spectral_pod.errors import ConfigError

from .. import shell

_BATCH, _WIDTH = 8, 256  # of a chip
_HEADS, _HEAD_DIM = 8, 64


class Case(NamedTuple):
    """An operation on sequences of a length by a method; "kernel" is compared with the others."""

    operation: str  # a name in `_OPERATIONS`
    name: str
    method: str
    length: int


# Those of --quick come first.
_CASES = [
    Case("causal", "kernel", "toeplitz", 512),
    Case("causal", "matmul", "matmul", 512),
    Case("causal", "xla_fft", "real", 512),
    *(Case("causal", "kernel", "toeplitz", n) for n in (2048, 4096)),
    *(Case("causal", "matmul", "matmul", n) for n in (2048, 4096)),
    *(Case("causal", "xla_fft", "real", n) for n in (2048, 4096)),
    *(Case("spectral", "kernel", "butterfly", n) for n in (512, 2048, 8192)),
    *(Case("spectral", "matmul", "matmul", n) for n in (512, 2048, 8192)),
    *(Case("spectral", "xla_fft", "real", n) for n in (512, 2048, 8192)),
    Case("delta", "kernel", "fused", 2048),
    Case("delta", "batched", "batched", 2048),
    Case("delta", "chunked", "chunked", 2048),
    Case("delta_clip", "kernel", "fused", 2048),
    Case("delta_clip", "batched", "batched", 2048),
    Case("delta_clip", "chunked", "chunked", 2048),
]
_QUICK = 3


def measure(name: str, path: str | None, quick: bool) -> None:
    """Prints the table for the topology `name`, and writes the report to `path`."""
    topology = hardware.parse(name, 1)
    if topology.chip.family == "cpu":
        raise ConfigError(f"--topology={name}: the kernels are for TPUs")
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(2, context, hardware.prepare, (topology,)) as pool,
        kernel_schedule.Compiler(topology) as compiler,
    ):
        cases = _CASES[:_QUICK] if quick else _CASES
        pending = [pool.submit(_compiled, topology, case) for case in cases]
        for case, found in zip(cases, pending, strict=True):
            figures, kernels = found.result()
            schedule = sum(compiler.schedule(kernel).cycles for kernel in kernels)
            rows.append(case._asdict() | _figures(topology, schedule, **figures))
            shell.say(f"{case.operation} by {case.name} at {case.length}: compiled")
    ratios = _ratios(rows)
    print(_table(rows, topology))
    print("\n".join(f"{ratio} {value:.2f}" for ratio, value in ratios.items()))
    if path:
        report = {"topology": str(topology), "ratios": ratios, "rows": rows}
        shell.write(path, json.dumps(report, indent=1) + "\n")


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Cycles and bytes of every other method over those of the kernel, at equal work."""
    ours = {(row["operation"], row["length"]): row for row in rows if row["name"] == "kernel"}
    return {
        f"{row['operation']}_{figure}_vs_{row['name']}_{row['length']}": row[figure] / own[figure]
        for row in rows
        if row["name"] != "kernel" and (own := ours.get((row["operation"], row["length"])))
        for figure in ("cycles", "bytes")
    }


def _compiled(topology: Topology, case: Case) -> tuple[dict[str, float], list[Kernel]]:
    """What XLA compiles for one chip, a forward and a backward pass, and the kernels in it."""
    import jax

    from spectral_pod.analysis import hlo, hlo_cost
    from spectral_pod.parallel.mesh import AXES, make_mesh, on_mesh
    from spectral_pod.parallel.sharding import spec

    sizes: dict[str, int] = {axis: 1 for axis in AXES}
    sizes["data"] = topology.num_devices
    mesh = make_mesh(sizes, hardware.devices(topology))
    function, operands, result = _OPERATIONS[case.operation](case)

    def both(dy: jax.Array, *operands: jax.Array) -> Any:
        y, pullback = jax.vjp(function, *operands)
        return y, *pullback(dy)

    def array(operand: Operand) -> jax.ShapeDtypeStruct:
        first = ["batch"] if operand.split else [None]
        rows = operand.shape[0] * (topology.num_devices if operand.split else 1)
        axes = spec(*first, *[None] * (len(operand.shape) - 1))
        sharding = jax.sharding.NamedSharding(mesh, axes)
        return jax.ShapeDtypeStruct((rows, *operand.shape[1:]), operand.dtype, sharding=sharding)

    with on_mesh(mesh):
        traced = jax.jit(both).trace(array(result), *map(array, operands))
        lowered = traced.lower(lowering_platforms=("tpu",))
        program = hlo.Program(lowered.compile().as_text())
    figures = {
        "bytes": hlo_cost.traffic(program, rare=False),
        "flops": hlo_cost.flops(program, rare=False),
        "estimated": hlo_cost.estimated_cycles(program, rare=False),
    }
    return figures, kernel_schedule.kernels(traced.jaxpr.jaxpr)


def _figures(
    topology: Topology, schedule: float, bytes: float, flops: float, estimated: float
) -> dict[str, float]:
    chip, cycles = topology.chip, schedule + estimated
    seconds = max(bytes / chip.hbm_bandwidth, cycles / chip.clock)
    return {
        "bytes": bytes, "flops": flops, "schedule": schedule, "cycles": cycles, "seconds": seconds,
    }  # fmt: skip


# ---- operations


class Operand(NamedTuple):
    """An array of one chip; `split` ones have sequences first, and each chip has its own."""

    shape: tuple[int, ...]
    dtype: str
    split: bool = True


Built = tuple[Callable[..., Any], list[Operand], Operand]  # a function, its operands and result


def _causal(case: Case) -> Built:
    """In bfloat16 with filters as long as the sequence; [B, N, D], as layers have it."""
    import jax.numpy as jnp

    from spectral_pod.ops.long_conv import causal_conv

    def convolved(u_BND: Any, h_DT: Any) -> Any:
        u_BDN = jnp.swapaxes(u_BND, 1, 2)
        return jnp.swapaxes(causal_conv(u_BDN, h_DT, case.method), 1, 2)

    u = Operand((_BATCH, case.length, _WIDTH), "bfloat16")
    h = Operand((_WIDTH, case.length), "float32", split=False)
    return convolved, [u, h], u


def _spectral(case: Case) -> Built:
    """x_BND in bfloat16, filtered without wrapping around by FFTs of 2N points."""
    import jax

    from spectral_pod.ops.fft import spectral_filter

    def filtered(x_BND: jax.Array, real_FD: jax.Array, imag_FD: jax.Array) -> jax.Array:
        w_FD = jax.lax.complex(real_FD, imag_FD)
        return spectral_filter(x_BND, w_FD, 2 * case.length, case.method)

    x = Operand((_BATCH, case.length, _WIDTH), "bfloat16")
    w = Operand((case.length + 1, _WIDTH), "float32", split=False)
    return filtered, [x, w, w], x


def _delta(case: Case, clip: float | None = None) -> Built:
    """Queries and keys in float32, values in bfloat16, as `layers/delta_memory.py` has them."""
    from spectral_pod.ops.delta_rule import delta_rule

    def read(*inputs: Any) -> Any:
        method: Any = case.method
        return delta_rule(*inputs, method=method, clip=clip).o_BNHV

    shape = _BATCH, case.length, _HEADS, _HEAD_DIM
    q, v, beta = (Operand(shape, "float32"), Operand(shape, "bfloat16"),
                  Operand(shape[:3], "float32"))  # fmt: skip
    return read, [q, q, v, beta], v


def _delta_clip(case: Case) -> Built:
    """With a clip, of which the estimates assume that it does not fire."""
    return _delta(case, clip=8.0)


_OPERATIONS = {
    "causal": _causal,
    "spectral": _spectral,
    "delta": _delta,
    "delta_clip": _delta_clip,
}


def _table(rows: list[dict[str, Any]], topology: Topology) -> str:
    lines = [f"{topology}: {_BATCH} sequences a chip, forward and backward"]
    lines.append(
        f"{'operation':<11}{'case':<9}{'length':>6}{'MB':>10}{'GFLOP':>9}{'cycles':>12}{'us':>9}"
    )
    for row in rows:
        lines.append(
            f"{row['operation']:<11}{row['name']:<9}{row['length']:>6,}{row['bytes'] / 1e6:>10,.1f}"
            f"{row['flops'] / 1e9:>9,.1f}{row['cycles']:>12,.0f}{row['seconds'] * 1e6:>9,.0f}"
        )
    return "\n".join(lines)
