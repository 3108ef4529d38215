"""The time of an instruction on a GPU: a launch, and its bytes or its FLOPs at measured rates.

XLA launches one kernel for an instruction, except that an inverse FFT is scaled by another one. A
launch takes `Chip.latency`; what is achieved of the peak figures is in `hardware.GPU_PRICES`.

A Pallas kernel is known by its own program: the FLOPs of its products, and the sums over the
threads of a cell of its grid, one after the other, which is what a recurrence waits for. The cells
are taken to run at the same time. The bounds of loops are those in the first and the last cell, and
in the first trip of the loops around them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spectral_pod.analysis import hlo, hlo_cost, kernel_calls
from spectral_pod.analysis.hardware import GPU_PRICES, Chip
from spectral_pod.analysis.hlo import Instruction, Program
from spectral_pod.analysis.kernel_calls import Signature


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel does besides moving data."""

    flops: float = 0.0  # of products, as many of bfloat16 as take the same time
    sums: float = 0.0  # over the threads of one cell, one after the other
    unknown: bool = False  # a loop of unknown length was counted once

    def __add__(self, other: "Work") -> "Work":
        unknown = self.unknown or other.unknown
        return Work(self.flops + other.flops, self.sums + other.sums, unknown)

    def times(self, count: float) -> "Work":
        return Work(count * self.flops, count * self.sums, self.unknown)


def seconds(
    program: Program, kernels: Mapping[Signature, Work], chip: Chip
) -> Callable[[Instruction], float]:
    """The time of one run of an instruction; `notes` say what is not known of kernels.

    Args:
      program: compiled for GPUs.
      kernels: the work of its Pallas kernels. One without counts for its bytes only.
      chip: its figures.
    """
    bandwidth = GPU_PRICES.bandwidth * chip.hbm_bandwidth

    def of(i: Instruction) -> float:
        moved = hlo_cost.moved(program, i)
        if not moved or i.opcode.removesuffix("-start") in hlo.KINDS:
            return 0.0
        work = Work(hlo_cost.matrix_work_of(program, i, chip))
        if kernel := kernel_calls.compiled(program, i):
            work = kernels.get(kernel, work)
            if kernel not in kernels:
                program.notes.add(f"of the kernel {kernel[0]} only the bytes are known")
            if work.unknown:
                program.notes.add(f"loops of unknown length in the kernel {kernel[0]} count once")
        flops_s = work.flops / (GPU_PRICES.flops * chip.peak_flops)
        taken = chip.latency + max(moved / bandwidth, flops_s, work.sums * GPU_PRICES.sum_s)
        if i.opcode == "fft" and (i.attribute(r"fft_type=(\w+)") or "").startswith("I"):
            taken += chip.latency + 2 * sum(a.bytes for a in i.arrays) / bandwidth
        return taken

    return of


def kernels(jaxpr: Any, chip: Chip) -> dict[Signature, Work]:
    """The work of the Pallas kernels that a traced program calls."""
    from spectral_pod.ops.kernels import cost

    return {kernel_calls.traced(one): _work(one, chip) for one in cost.kernels(jaxpr)}


def _work(equation: Any, chip: Chip) -> Work:
    grid, body = equation.params["grid_mapping"].grid, equation.params["jaxpr"]
    ends = [(0,) * len(grid), tuple(n - 1 for n in grid)]
    first, last = (_Walk(chip, cell).walk(body, [None] * len(body.invars))[0] for cell in ends)
    return Work(
        flops=math.prod(grid) * (first.flops + last.flops) / 2,
        sums=max(first.sums, last.sums),
        unknown=first.unknown or last.unknown,
    )


class _Walk:
    """Counts the work of a cell of a grid, and follows the integers that bound its loops."""

    def __init__(self, chip: Chip, cell: Sequence[int]):
        self.chip, self.cell = chip, cell

    def walk(self, jaxpr: Any, inputs: Sequence[Any]) -> tuple[Work, list[Any]]:
        """The work of a program, and its results; inputs and results are None where not known."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        total = Work()
        for equation in jaxpr.eqns:
            values = [v.val if hasattr(v, "val") else known.get(v) for v in equation.invars]
            work, results = self._equation(equation, values)
            total += work
            known |= dict(zip(equation.outvars, results, strict=True))
        return total, [v.val if hasattr(v, "val") else known.get(v) for v in jaxpr.outvars]

    def _equation(self, equation: Any, values: list[Any]) -> tuple[Work, list[Any]]:
        name, params, nothing = equation.primitive.name, equation.params, [None]
        nothing *= len(equation.outvars)
        if name == "scan":
            state = values[: params["num_consts"] + params["num_carry"]]
            each = [None] * (len(values) - len(state))
            return self.walk(_open(params["jaxpr"]), state + each)[0].times(
                params["length"]
            ), nothing
        if name == "while":
            return self._loop(params, values), nothing
        if name == "cond":
            branches = [self.walk(_open(branch), values[1:])[0] for branch in params["branches"]]
            return min(branches, key=lambda work: (work.sums, work.flops)), nothing
        if name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
            return self.walk(_open(params.get("jaxpr", params.get("call_jaxpr"))), values)
        if name == "dot_general":
            return Work(_product(equation, self.chip)), nothing
        if name.startswith("reduce_") or name in ("argmax", "argmin"):
            return Work(sums=1), nothing
        if name == "program_id":
            return Work(), [self.cell[params["axis"]]]
        scalars = all(v.aval.shape == () for v in equation.outvars)
        if scalars and not equation.effects and all(v is not None for v in values):
            return Work(), [_evaluate(equation, values)]
        return Work(), nothing

    def _loop(self, params: Mapping[str, Any], values: list[Any]) -> Work:
        condition, tests = _open(params["cond_jaxpr"]), params["cond_nconsts"]
        state = values[tests + params["body_nconsts"] :]
        consts = values[tests : tests + params["body_nconsts"]]
        once, _ = self.walk(_open(params["body_jaxpr"]), consts + state)
        known = dict(zip(condition.invars, values[:tests] + state, strict=True))
        if [equation.primitive.name for equation in condition.eqns] == ["lt"]:
            counter, limit = (
                v.val if hasattr(v, "val") else known[v] for v in condition.eqns[0].invars
            )
            if counter is not None and limit is not None:
                return once.times(max(int(limit) - int(counter), 0))
        return once + Work(unknown=True)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _evaluate(equation: Any, values: list[Any]) -> Any:
    import numpy as np

    inputs = [
        np.asarray(value, v.aval.dtype) for value, v in zip(values, equation.invars, strict=True)
    ]
    return equation.primitive.bind(*inputs, **equation.params)


def _product(equation: Any, chip: Chip) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs, out = equation.invars[0].aval, equation.outvars[0].aval
    flops = 2.0 * math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracted)
    precision = equation.params["precision"]
    name = precision[0].name.lower() if precision else "default"
    return flops * hlo_cost.passes(chip, lhs.dtype.itemsize, name)
