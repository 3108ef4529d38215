"""An estimate of a step's time on TPUs: what its compiled program takes, one thing after the other.

Where a roofline says what a step takes at least, this follows the compiler: libtpu's own estimates
of the instructions, and the compiled schedules of kernels (`kernel_schedule.py`). Nothing of it has
been compared with hardware, and waits for memory are seen only as follows.

- Every instruction takes at least as long as its bytes by the bandwidth of HBM.
- Where libtpu says nothing, it takes the time of its bytes and a latency, that of a fusion of a few
  numbers in HBM. So does a kernel, which waits for its first block.
- Copies in the background take no time of their own, but all bytes together by the bandwidth are
  the least time of everything that is not communication.
- Collectives overlap with nothing, and take what they send by the bandwidth of their links.
- Of a conditional the cheapest branch runs: here the others are rare fall-backs. What they would
  add is given beside the estimate.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

from spectral_pod.analysis import hlo, hlo_cost
from spectral_pod.analysis.hardware import Chip
from spectral_pod.analysis.hlo import Instruction, Program
from spectral_pod.analysis.kernel_schedule import Arrays, Schedule, Signature
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
    fallbacks_s: float  # added, if of every conditional the costliest branch ran
    operations: list[Operation]  # the costliest first, without collectives


def estimate(
    program: Program, schedules: Mapping[Signature, Schedule], network_s: float, chip: Chip
) -> Estimate:
    """The estimate for one chip; the program's `notes` say which kernels have no schedule.

    Args:
      program: compiled for TPUs.
      schedules: of its kernels. One without counts for its bytes only.
      network_s: the time of the collectives (`roofline.py`).
      chip: its figures.
    """

    @functools.cache
    def seconds(i: Instruction) -> float:
        bytes_s = hlo_cost.moved(program, i) / chip.hbm_bandwidth
        if kernel := _signature(program, i):
            schedule = schedules.get(kernel)
            if schedule is None:
                program.notes.add(f"the kernel {kernel[0]} has no schedule: its bytes count")
            known = schedule.cycles if schedule else 0
            return chip.latency + max(known / chip.clock, bytes_s)
        if i.opcode.endswith("-start") or i.opcode in hlo.KINDS:
            return 0.0
        if cycles := hlo_cost.instruction_cycles(i):
            return max(cycles / chip.clock, bytes_s)
        return chip.latency + bytes_s if bytes_s else 0.0

    def total(rare: bool) -> float:
        runs = program.runs(seconds, fused=False, rare=rare)
        return math.fsum(count * seconds(i) for i, count in runs)

    runs = program.runs(seconds, fused=False, rare=False)
    spent = {"": 0.0, "kernels": 0.0}
    rows: dict[str, tuple[int, float]] = {}
    for i, count in runs:
        kernel = _signature(program, i)
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
        fallbacks_s=total(rare=True) - total(rare=False),
        operations=sorted(operations, key=lambda one: -one.seconds),
    )


def _signature(program: Program, i: Instruction) -> Signature | None:
    """Of an instruction that calls a kernel, by what JAX says of it; None of any other."""
    if i.opcode != "custom-call" or i.attribute('custom_call_target="(tpu_custom_call)"') is None:
        return None
    name = i.attribute(r'op_name="[^"]*?([^"/]+)/pallas_call"') or i.name
    operands = [a for operand in program.operands(i) for a in operand.arrays]
    return name, _arrays(operands), _arrays(i.arrays)


def _arrays(arrays: Iterable[hlo.Array]) -> Arrays:
    return tuple((array.shape, array.bytes) for array in arrays)
