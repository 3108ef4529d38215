"""Kernels for TPUs without a TPU: their compiled schedules against what XLA makes of other methods.

    python -m tools.bench kernels --topology=v5e:2x2 [--json=FILE]

Every case is the causal convolution of 8 sequences of 256 channels on each chip, in bfloat16,
forward and backward, compiled for the topology. The cycles of a kernel are those of its static
schedule: the instruction bundles that libtpu prints, times the trips of their loops, over the cores
of a chip. Those of what XLA compiles are libtpu's own estimates. Neither waits for memory, so the
time is at least that of the bytes that move to and from HBM. Nothing has run on a TPU.
"""

import functools
import glob
import json
import math
import multiprocessing
import os
import re
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from spectral_pod.analysis import hardware
from spectral_pod.analysis.hardware import Topology
from spectral_pod.errors import ConfigError

from .. import shell

_BATCH, _WIDTH = 8, 256  # of a chip
_LENGTHS = (512, 2048, 4096)
_METHODS = {"kernel": "toeplitz", "matmul": "matmul", "xla_fft": "real"}
_KERNELS = ("toeplitz",)


def measure(name: str, path: str | None, quick: bool) -> None:
    """Prints the table for the topology `name`, and writes the report to `path`."""
    lengths = _LENGTHS[:1] if quick else _LENGTHS
    topology = hardware.parse(name, 1)
    if topology.chip.family == "cpu":
        raise ConfigError(f"--topology={name}: the kernels are for TPUs")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-kernels-") as dump:
        # libtpu reads its flags once, and takes very long to print the programs of XLA's FFT.
        printing, other = (_process(topology, folder) for folder in (dump, None))
        with printing, other:
            pending = {
                (case, length): (printing if method in _KERNELS else other).submit(
                    _compiled, topology, dump, length, method
                )
                for length in lengths
                for case, method in _METHODS.items()
            }
            for (case, length), found in pending.items():
                rows.append({"case": case, "length": length} | found.result())
                shell.say(f"{case} at {length}: compiled")
    by = {(row["case"], row["length"]): row for row in rows}
    ratios = {
        f"causal_{figure}_vs_{case}_{length}": by[case, length][figure]
        / by["kernel", length][figure]
        for length in lengths
        for case in ("matmul", "xla_fft")
        for figure in ("cycles", "bytes")
    }
    print(_table(rows, topology))
    print("\n".join(f"{ratio} {value:.2f}" for ratio, value in ratios.items()))
    if path:
        with open(path, "w") as file:
            report = {"topology": str(topology), "ratios": ratios, "rows": rows}
            json.dump(report, file, indent=1)
            file.write("\n")


def _process(topology: Topology, dump: str | None) -> ProcessPoolExecutor:
    """A process for `_compiled`, in which libtpu prints schedules to a folder, if that is given."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _prepare, (topology, dump))


def _prepare(topology: Topology, dump: str | None) -> None:
    hardware.prepare(topology)
    if dump:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


def _compiled(topology: Topology, dump: str, length: int, method: str) -> dict[str, float]:
    """What one chip computes and moves in a forward and a backward pass, and for how long."""
    import jax
    import jax.numpy as jnp

    from spectral_pod.analysis import hlo, hlo_cost
    from spectral_pod.ops.kernels.cost import kernels
    from spectral_pod.ops.long_conv import causal_conv
    from spectral_pod.parallel.mesh import AXES, make_mesh, on_mesh
    from spectral_pod.parallel.sharding import spec

    sizes: dict[str, int] = {axis: 1 for axis in AXES}
    sizes["data"] = topology.num_chips
    mesh = make_mesh(sizes, hardware.devices(topology))

    def both(u_BDN: jax.Array, h_DN: jax.Array, dy_BDN: jax.Array) -> Any:
        convolve = functools.partial(causal_conv, method=method)
        y_BDN, pullback = jax.vjp(convolve, u_BDN, h_DN)
        return y_BDN, *pullback(dy_BDN)

    def array(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(mesh, spec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    with on_mesh(mesh):
        rows = _BATCH * topology.num_chips
        u = array((rows, _WIDTH, length), jnp.bfloat16, "batch", None, None)
        traced = jax.jit(both).trace(u, array((_WIDTH, length), jnp.float32, None, None), u)
        lowered = traced.lower(lowering_platforms=("tpu",))
        program = hlo.Program(lowered.compile().as_text())
    chip = topology.chip
    moved, flops = hlo_cost.traffic(program), hlo_cost.flops(program)
    schedule = sum(_schedule(dump, kernel) for kernel in kernels(traced.jaxpr.jaxpr))
    cycles = hlo_cost.estimated_cycles(program) + schedule / chip.cores
    seconds = max(moved / chip.hbm_bandwidth, cycles / chip.clock)
    return {
        "bytes": moved, "flops": flops, "schedule": schedule,
        "cycles": cycles, "seconds": seconds,
    }  # fmt: skip


def _schedule(dump: str, kernel: Any) -> float:
    """Cycles of a kernel by its final bundles: those of a grid cell once for each cell, those of
    its loop once for each trip."""
    found = glob.glob(f"{dump}/*{kernel.params['name']}*-final_bundles.txt")
    path = max((p for p in found if "schedule-analysis" not in p), key=os.path.getmtime)
    depths: Counter[int] = Counter()
    with open(path) as file:
        for line in file:
            if bundle := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{", line):
                depths[len(bundle[1])] += 1
    loops = [e for e in kernel.params["jaxpr"].eqns if e.primitive.name == "scan"]
    (trips,) = (loop.params["length"] for loop in loops)
    return math.prod(kernel.params["grid_mapping"].grid) * (depths[1] + trips * depths[2])


def _table(rows: list[dict[str, Any]], topology: Topology) -> str:
    lines = [f"{topology}: {_BATCH} x {_WIDTH} a chip, bfloat16, forward and backward"]
    lines.append(f"{'case':<10}{'length':>7}{'MB':>10}{'GFLOP':>9}{'cycles':>12}{'us':>9}")
    for row in rows:
        lines.append(
            f"{row['case']:<10}{row['length']:>7,}{row['bytes'] / 1e6:>10,.1f}"
            f"{row['flops'] / 1e9:>9,.1f}{row['cycles']:>12,.0f}{row['seconds'] * 1e6:>9,.0f}"
        )
    return "\n".join(lines)
