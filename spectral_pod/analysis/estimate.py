"""An estimate of a step's time: what its compiled program takes, one thing after the other.

Where a roofline says what a step takes at least, this follows the compiled program. The time of an
instruction is that of `tpu_time.py` or `gpu_time.py`.

- All bytes together by the bandwidth are the least time of everything that is not communication:
  on TPUs, copies in the background take no time of their own.
- Collectives overlap with nothing, and take what they send by the bandwidth of their links.
- Of a conditional the cheapest branch runs: here the others are rare fall-backs. What they would
  add is given beside the estimate.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from spectral_pod.analysis import hlo_cost, kernel_calls
from spectral_pod.analysis.hardware import Chip
from spectral_pod.analysis.hlo import Instruction, Program
from spectral_pod.analysis.provenance import layer


@dataclasses.dataclass(frozen=True)
class Operation:
    """All instructions of a layer in one pass, or all runs of a kernel there."""

    what: str
    runs: int
    seconds: float
    share: float  # of the step


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step, and of its parts."""

    step_s: float  # max(compiled_s + kernels_s, memory_s) + network_s
    compiled_s: float  # of what XLA compiled
    kernels_s: float
    memory_s: float  # of all bytes to and from HBM
    network_s: float
    launches: int  # instructions and kernels, each of them a launch on a GPU
    fallbacks_s: float  # added, if of every conditional the costliest branch ran
    operations: list[Operation]  # the costliest first, without collectives


def estimate(
    program: Program, seconds: Callable[[Instruction], float], network_s: float, chip: Chip
) -> Estimate:
    """The estimate for one chip.

    Args:
      program: compiled for this kind of chip.
      seconds: of one run of an instruction, without collectives.
      network_s: the time of the collectives (`roofline.py`).
      chip: its figures.
    """
    seconds = functools.cache(seconds)

    def total(rare: bool) -> float:
        runs = program.runs(seconds, fused=False, rare=rare)
        return math.fsum(count * seconds(i) for i, count in runs)

    runs = program.runs(seconds, fused=False, rare=False)
    spent = {"": 0.0, "kernels": 0.0}
    rows: dict[str, tuple[int, float]] = {}
    for i, count in runs:
        kernel = kernel_calls.compiled(program, i)
        what = layer(program.source(i)) + (f": {kernel[0]}" if kernel else "")
        before, taken = rows.get(what, (0, 0.0))
        rows[what] = before + count, taken + count * seconds(i)
        spent["kernels" if kernel else ""] += count * seconds(i)
    memory_s = hlo_cost.traffic(program, rare=False) / chip.hbm_bandwidth
    step_s = max(sum(spent.values()), memory_s) + network_s
    operations = [Operation(what, n, taken, taken / step_s) for what, (n, taken) in rows.items()]
    return Estimate(
        step_s=step_s,
        compiled_s=spent[""],
        kernels_s=spent["kernels"],
        memory_s=memory_s,
        network_s=network_s,
        launches=sum(count for _, count in runs),
        fallbacks_s=total(rare=True) - total(rare=False),
        operations=sorted(operations, key=lambda one: -one.seconds),
    )
