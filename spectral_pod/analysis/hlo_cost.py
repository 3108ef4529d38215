"""The cost of one run of a compiled program on one chip: FLOPs and memory traffic.

XLA's `cost_analysis` counts the body of a loop once and includes elementwise work; these functions
count every iteration, only the work of matrix units, and only traffic to and from HBM.
"""

import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from spectral_pod.analysis.hardware import Chip
from spectral_pod.analysis.hlo import Array, Instruction, Program

# Instructions that neither compute nor move data, besides the `-done` half of asynchronous pairs.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "while", "conditional", "call", "async-start", "opt-barrier", "domain",
    "send", "recv",
)  # fmt: skip


def flops(program: Program, *, rare: bool = True) -> float:
    """FLOPs of products, convolutions and FFTs in one run, for one chip.

    A product counts 2mnk, a convolution 2 per tap that falls on data, a complex FFT 5 n log2 n, a
    real FFT half of that, and a custom call its own cost estimate. Elementwise work is excluded.
    If not `rare`, conditionals take the branch of the fewest cycles, here and below.
    """
    return math.fsum(flops_by_opcode(program, rare=rare).values())


def flops_by_opcode(program: Program, *, rare: bool = True) -> dict[str, float]:
    """`flops`, by the opcode that spends them: 'dot', 'convolution', 'fft', 'custom-call'."""
    found: dict[str, float] = {}
    for i, count in program.runs(lambda i: _flops(program, i) if rare else _usual(i), rare=rare):
        if spent := count * _flops(program, i):
            found[i.opcode] = found.get(i.opcode, 0.0) + spent
    return found


def matrix_work(program: Program, chip: Chip, *, rare: bool = True) -> float:
    """`flops`, as many of bfloat16 as take the same time (`passes`)."""
    runs = program.runs(lambda i: _flops(program, i) if rare else _usual(i), rare=rare)
    return math.fsum(count * _work(program, i, chip) for i, count in runs)


def matrix_work_of(program: Program, i: Instruction, chip: Chip) -> float:
    """`matrix_work` of one instruction, with all of a fusion."""
    fused = i.callees if i.opcode == "fusion" else []
    inner = (j for name in fused for j in program.computations[name].values())
    return _work(program, i, chip) + sum(matrix_work_of(program, j, chip) for j in inner)


def passes(chip: Chip, width: float, precision: str) -> float:
    """Products of bfloat16 that take as long as one of operands of this many bytes.

    A TPU's units multiply bfloat16: float32 takes 3 passes over the parts of its operands at
    precision HIGH, and 6 at HIGHEST. Those of GPUs round float32 to TF32, at half the rate of
    bfloat16, and at HIGHEST other units compute.
    """
    if chip.platform != "gpu":
        return {"default": 1, "high": 3, "highest": 6}.get(precision, 1)
    if width <= 2:
        return 1
    return {"default": 2, "high": 6}.get(precision, chip.peak_flops / chip.float32_flops)


def _usual(i: Instruction) -> float:
    """Positive, and least for the branch of the fewest cycles: one of fewer FLOPs or bytes
    may be the fall-back."""
    return 1e-3 + instruction_cycles(i)


def _work(program: Program, i: Instruction, chip: Chip) -> float:
    if not (count := _flops(program, i)):
        return 0.0
    precision = i.attribute(r"operand_precision=\{(\w+)") or "default"
    if i.opcode == "fft" and chip.platform == "gpu":
        precision = "highest"
    operands = program.operands(i)
    width = operands[0].arrays[0].width if operands else 4
    return count * passes(chip, width, precision)


def traffic(program: Program, *, rare: bool = True) -> float:
    """Bytes read from and written to one chip's HBM in one run, without reuse in caches.

    A fusion reads its operands and writes its results once. For an operand that it only slices, the
    slice counts; for one that it updates in place, the update.
    """
    runs = program.runs(lambda i: moved(program, i) if rare else _usual(i), fused=False, rare=rare)
    return math.fsum(count * moved(program, i) for i, count in runs)


def estimated_cycles(program: Program, *, rare: bool = True) -> float:
    """Cycles of one run by libtpu's own estimate of every instruction, one after the other."""
    runs = program.runs(instruction_cycles, fused=False, rare=rare)
    return math.fsum(count * instruction_cycles(i) for i, count in runs)


def instruction_cycles(i: Instruction) -> float:
    """libtpu's own estimate of an instruction; 0 where it says nothing, as of kernels.

    Programs for TPUs say it of fusions and of most copies.
    """
    return float(i.attribute(r'"estimated_cycles":"(\d+)"') or 0)


def _flops(program: Program, i: Instruction) -> float:
    if i.opcode == "dot":
        lhs = program.operands(i)[0].arrays[0].shape
        axes = _integers(i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
        return 2.0 * math.prod(i.arrays[0].shape) * math.prod(lhs[axis] for axis in axes)
    if i.opcode == "convolution":
        return _convolution_flops(program, i)
    if i.opcode == "fft":
        length = math.prod(_integers(i.attribute(r"fft_length=\{([\d,]*)\}") or "1"))
        ends = (program.operands(i)[0].arrays[0], i.arrays[0])
        whole = max(ends, key=lambda a: a.shape[-1])
        real = any(end.dtype in ("f32", "f64") for end in ends)
        return math.prod(whole.shape) * math.log2(max(length, 2)) * (2.5 if real else 5.0)
    return _estimate(i, "flops") or 0.0


def _estimate(i: Instruction, figure: str) -> float | None:
    """What a kernel says of its own cost (`ops/kernels/cost.py`)."""
    if i.opcode != "custom-call":
        return None
    found = i.attribute(rf'"cost_estimate":\{{[^}}]*"{figure}":"?(\d+)')
    return None if found is None else float(found)


def _convolution_flops(program: Program, i: Instruction) -> float:
    lhs, rhs = (operand.arrays[0].shape for operand in program.operands(i)[:2])
    labels = i.attribute(r"dim_labels=(\w+->\w+)") or ""
    lhs_labels, rhs_labels, out_labels = re.split("_|->", labels)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", i.attribute(r"window=\{([^}]*)\}") or ""))
    batch, features = lhs[lhs_labels.index("b")], lhs[lhs_labels.index("f")]
    outputs = rhs[rhs_labels.index("o")]
    taps = 1
    for d in range(len(lhs) - 2):

        def setting(name: str, default: str, d: int = d) -> str:
            return window[name].split("x")[d] if name in window else default

        low, _, _ = setting("pad", "0_0").partition("_")
        taps *= _valid_taps(
            data=lhs[lhs_labels.index(str(d))],
            kernel=rhs[rhs_labels.index(str(d))],
            out=i.arrays[0].shape[out_labels.index(str(d))],
            stride=int(setting("stride", "1")),
            low=int(low),
            data_dilation=int(setting("lhs_dilate", "1")),
            kernel_dilation=int(setting("rhs_dilate", "1")),
        )
    features //= int(i.attribute(r"feature_group_count=(\d+)") or 1)
    batch //= int(i.attribute(r"batch_group_count=(\d+)") or 1)
    return 2.0 * batch * features * outputs * taps


@functools.lru_cache(maxsize=4096)
def _valid_taps(
    *, data: int, kernel: int, out: int, stride: int, low: int, data_dilation: int,
    kernel_dilation: int,
) -> int:  # fmt: skip
    """Pairs of output position and tap, along one dimension, that fall on data and not on padding.

    XLA for TPUs expresses batched products as convolutions with much padding or dilation.
    """
    index = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None] * kernel_dilation
    valid = (index % data_dilation == 0) & (index >= 0) & (index < data * data_dilation)
    return int(np.count_nonzero(valid))


def moved(program: Program, i: Instruction) -> float:
    """Bytes that one instruction reads from and writes to HBM."""
    if i.opcode in _FREE or i.opcode.endswith("-done"):
        return 0.0
    operands = [_size(operand.arrays) for operand in program.operands(i)]
    results: Sequence[Array] = i.arrays
    if i.opcode.endswith("-start") and len(results) > 1:  # (operands, results, semaphores)
        results = [a for a in results if a.shape][len(operands) :] or results
    written = _size(results)
    if i.opcode.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
        return written + (sum(a.bytes for a in results) if operands[0] else 0.0)
    if i.opcode == "dynamic-update-slice":
        return operands[1] + min(written, program.operands(i)[1].arrays[0].bytes)
    if i.opcode == "fusion":
        return _fusion_traffic(program, i, written)
    own = _estimate(i, "bytes_accessed")
    return sum(operands) + written if own is None else own


def _fusion_traffic(program: Program, fusion: Instruction, written: float) -> float:
    inner = program.computations[fusion.callees[0]]
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    parameters = {int(p.operands[0]): p for p in inner.values() if p.opcode == "parameter"}
    total = written
    for index, operand in enumerate(program.operands(fusion)):
        whole = _size(operand.arrays)
        if not whole or index not in parameters:
            continue
        readers = _readers(parameters[index], users)
        if readers and all(_touches_part(r, of) for r, of in readers):
            part = 0.0
            for reader, _ in readers:
                if reader.opcode == "dynamic-update-slice":
                    update = inner[reader.operands[1]].arrays[0].bytes
                    total += update - _size(operand.arrays)  # written in place, not whole
                else:
                    part += sum(a.bytes for a in reader.arrays)
            whole = min(whole, part)
        total += whole
    return max(total, 0.0)


def _readers(
    value: Instruction, users: dict[str, list[Instruction]]
) -> list[tuple[Instruction, str]]:
    """The instructions that use a value, past bitcasts, each with its name of the operand."""
    found = []
    for user in users.get(value.name, []):
        found += _readers(user, users) if user.opcode == "bitcast" else [(user, value.name)]
    return found


def _touches_part(reader: Instruction, name: str) -> bool:
    sliced = reader.opcode in ("dynamic-slice", "slice", "gather", "dynamic-update-slice")
    return sliced and reader.operands[0] == name


def _size(arrays: Sequence[Array]) -> float:
    return float(sum(a.bytes for a in arrays if a.in_hbm))


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
