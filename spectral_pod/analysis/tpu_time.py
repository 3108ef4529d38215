"""The time of an instruction on a TPU, by what libtpu says of it.

libtpu's own estimates of the instructions, and the compiled schedules of kernels
(`kernel_schedule.py`). Nothing of it has been compared with hardware, and waits for memory are seen
only as follows.

- Every instruction takes at least as long as its bytes by the bandwidth of HBM.
- Where libtpu says nothing, it takes the time of its bytes and a latency, that of a fusion of a few
  numbers in HBM. So does a kernel, which waits for its first block.
- Copies in the background take no time of their own.
"""

from collections.abc import Callable, Mapping

from spectral_pod.analysis import hlo, hlo_cost, kernel_calls
from spectral_pod.analysis.hardware import Chip
from spectral_pod.analysis.hlo import Instruction, Program
from spectral_pod.analysis.kernel_calls import Signature
from spectral_pod.analysis.kernel_schedule import Schedule


def seconds(
    program: Program, schedules: Mapping[Signature, Schedule], chip: Chip
) -> Callable[[Instruction], float]:
    """The time of one run of an instruction; `notes` say which kernels have no schedule.

    Args:
      program: compiled for TPUs.
      schedules: of its kernels. One without counts for its bytes only.
      chip: its figures.
    """

    def of(i: Instruction) -> float:
        bytes_s = hlo_cost.moved(program, i) / chip.hbm_bandwidth
        if kernel := kernel_calls.compiled(program, i):
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

    return of
