"""Calls of Pallas kernels: the same signature in a traced program and in its compiled HLO."""

from collections.abc import Iterable
from typing import Any

from spectral_pod.analysis import hlo
from spectral_pod.analysis.hlo import Instruction, Program

Arrays = tuple[tuple[tuple[int, ...], int], ...]  # the shape and the bytes of each
Signature = tuple[str, Arrays, Arrays]  # of a kernel: its name, operands and results

_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton")


def traced(equation: Any) -> Signature:
    """Of a `pallas_call` equation."""

    def arrays(variables: Iterable[Any]) -> Arrays:
        return tuple((v.aval.shape, v.aval.size * v.aval.dtype.itemsize) for v in variables)

    return equation.params["name"], arrays(equation.invars), arrays(equation.outvars)


def compiled(program: Program, i: Instruction) -> Signature | None:
    """Of an instruction that calls a kernel; None of any other."""

    def arrays(found: Iterable[hlo.Array]) -> Arrays:
        return tuple((array.shape, array.bytes) for array in found)

    if i.opcode != "custom-call" or i.attribute('custom_call_target="([^"]*)"') not in _TARGETS:
        return None
    # Outside of all scopes it stands in the names of transformations: transpose(jvp(name)).
    name = i.attribute(r'op_name="[^"]*?([^"/()]+)\)*/pallas_call"') or i.name
    operands = [a for operand in program.operands(i) for a in operand.arrays]
    return name, arrays(operands), arrays(i.arrays)
