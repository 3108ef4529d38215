"""Cycles of TPU kernels by their compiled schedules, without a TPU.

The compiler knows when every instruction of a kernel is issued: libtpu prints the final program as
bundles of instructions, one a cycle. A bundle counts once for every trip of the loops around it. It
is not seen when a kernel waits for memory, so the time is at least that of the bytes that move.

Three conventions, which notes report except for the first. What is done in some cells of a grid, as
under `pl.when(pl.program_id(0) == 0)`, counts in every cell: an upper bound. Of a condition on data
the shortest branch is compiled, as the others are rare fall-backs here. The body of a loop whose
trips depend on data counts once.
"""

import dataclasses
import functools
import glob
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from spectral_pod.analysis import hardware, kernel_calls
from spectral_pod.analysis.hardware import Topology
from spectral_pod.analysis.kernel_calls import Signature


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel on arrays of certain shapes, as a program of its own."""

    signature: Signature
    trips: tuple[int, ...]  # of the loops in a grid cell, as they are printed; 0: not known
    falls_back: bool  # on conditions on data, of which the shortest branches are left
    program: bytes  # `jax.export`ed


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cycles of a core, of those that share the grid, until a kernel is done."""

    cycles: int
    note: str = ""  # what was counted by convention


def kernels(jaxpr: Any) -> list[Kernel]:
    """The kernels that a traced program calls on TPUs, in order, each as often as it is called.

    Kernels of one name on equal arrays are taken to be the same.
    """
    from spectral_pod.ops.kernels import cost

    found: dict[Signature, Kernel] = {}
    every = []
    for equation in cost.kernels(jaxpr):
        if equation.params["interpret"]:
            continue
        signature = kernel_calls.traced(equation)
        if signature not in found:
            found[signature] = _kernel(equation, signature)
        every.append(found[signature])
    return every


def _kernel(equation: Any, signature: Signature) -> Kernel:
    import jax

    body = _usual(equation.params["jaxpr"])
    params = equation.params | {"jaxpr": body}

    def alone(*operands: jax.Array) -> Any:
        return equation.primitive.bind(*operands, **params)

    operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    exported = jax.export.export(jax.jit(alone), platforms=["tpu"])(*operands)
    return Kernel(
        signature=signature,
        trips=tuple(_trips(body)),
        falls_back=_length(body) < _length(equation.params["jaxpr"]),
        program=bytes(exported.serialize()),
    )


def _usual(jaxpr: Any) -> Any:
    """A kernel's program in which all branches of a condition on data are its shortest one."""
    known: set[Any] = set()  # what follows from the place in the grid

    def usual(equation: Any) -> Any:
        inputs = [v for v in equation.invars if not hasattr(v, "val")]
        if equation.primitive.name in ("program_id", "num_programs") or (
            inputs and not equation.effects and known.issuperset(inputs)
        ):
            known.update(equation.outvars)
        params = equation.params
        if equation.primitive.name == "cond" and equation.invars[0] not in known:
            shortest = min(params["branches"], key=lambda branch: _length(branch.jaxpr))
            params = params | {"branches": (shortest,) * len(params["branches"])}
        return equation.replace(params={name: _inside(value) for name, value in params.items()})

    return jaxpr.replace(eqns=[usual(equation) for equation in jaxpr.eqns])


def _inside(value: Any) -> Any:
    """`_usual` of a parameter of an equation, where that is a program or several."""
    from jax.extend import core

    if type(value) is tuple:
        return tuple(map(_inside, value))
    if isinstance(value, core.ClosedJaxpr):
        return value.replace(jaxpr=_usual(value.jaxpr))
    return _usual(value) if isinstance(value, core.Jaxpr) else value


def _length(jaxpr: Any) -> int:
    return sum(1 + sum(map(_length, _programs(equation))) for equation in jaxpr.eqns)


def _programs(equation: Any) -> Iterator[Any]:
    """The programs that an equation runs."""
    import jax

    for value in jax.tree.leaves(list(equation.params.values())):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def _trips(jaxpr: Any) -> Iterator[int]:
    """The trips of every loop that is compiled as one, outer ones before the inner ones."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            trips = equation.params["length"] // equation.params["unroll"]
            if trips > 1:
                yield trips
        elif equation.primitive.name == "while":
            yield 0
        for inner in _programs(equation):
            yield from _trips(inner)


class Compiler:
    """A process that compiles kernels for a topology, in which libtpu prints their schedules.

    libtpu reads its flags once in a process, and takes very long to print large programs: each
    kernel is compiled alone.
    """

    def __init__(self, topology: Topology):
        self._folder = tempfile.TemporaryDirectory(prefix="schedules-")
        context = multiprocessing.get_context("spawn")
        initial = topology, self._folder.name
        self._pool = ProcessPoolExecutor(1, context, _prepare, initial)
        self._topology = topology

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()
        self._folder.cleanup()

    def schedule(self, kernel: Kernel) -> Schedule:
        """Raises: ValueError if the printed loops are not those of the kernel."""
        task = functools.partial(_printed, self._topology, self._folder.name, kernel.program)
        found = count(self._pool.submit(task).result(), kernel.trips)
        if not kernel.falls_back:
            return found
        usual = "of a kernel's conditions on data the shortest branch counts"
        return Schedule(found.cycles, "; ".join(filter(None, (found.note, usual))))


def _prepare(topology: Topology, folder: str) -> None:
    hardware.prepare(topology)
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def _printed(topology: Topology, folder: str, program: bytes) -> str:
    """The final bundles of an exported kernel."""
    import jax

    for path in glob.glob(f"{folder}/*"):
        os.remove(path)
    exported = jax.export.deserialize(bytearray(program))
    device = jax.sharding.SingleDeviceSharding(hardware.devices(topology)[0])
    operands = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for a in exported.in_avals]
    lowered = jax.jit(exported.call).trace(*operands).lower(lowering_platforms=("tpu",))
    lowered.compile()
    found = []
    for path in glob.glob(f"{folder}/*-final_bundles.txt"):
        with open(path) as file:
            text = file.read()
        if _KERNEL.search(text) and "schedule-analysis" not in path:
            found.append(text)
    (printed,) = found
    return printed


_KERNEL = re.compile(r"exit bundle: \S+ = custom-call\(")
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)\s*(\{.*)")
_END = re.compile(r"scmp\.ge\.s32\.totalorder [^;]*?, (\d+) /\* loop exit test \*/")
_STAGE = re.compile(r"iteration index, stage = (\d+)")


def count(printed: str, trips: Sequence[int]) -> Schedule:
    """Counts the bundles of a printed schedule.

    Args:
      printed: the bundles, each with a mark of the loop that it begins (`LB`) and one `>` for each
        loop around its instructions.
      trips: those of the loops in a grid cell, in order; 0 if not known.

    Raises:
      ValueError: there are other loops.
    """
    bundles = [match.groups() for match in map(_BUNDLE.match, printed.splitlines()) if match]
    depths = [len(marks) for _, marks, _ in bundles]
    starts = [i for i, (label, _, _) in enumerate(bundles) if label == "LB"]
    inner = [i for i in starts if not _STAGE.search(bundles[i][2])]
    if len(inner) != len(trips):
        raise ValueError(f"a schedule has {len(inner)} loops, its kernel {len(trips)}")
    turns_of = dict(zip(inner, trips, strict=True))
    turns_of |= {start: _cells(printed) for start in starts if start not in turns_of}
    times = [1] * len(bundles)
    for start, turns in turns_of.items():
        outside = (i for i in starts if i > start and depths[i] <= depths[start])
        limit = next(outside, len(bundles))
        end = max(i for i in range(start, limit) if depths[i] >= depths[start]) + 1
        while end < limit and bundles[end][2].startswith("{}"):  # which wait for its branch
            end += 1
        for i in range(start, end):
            times[i] *= max(turns, 1)
    unknown = "loops whose trips depend on data count once" if 0 in trips else ""
    return Schedule(sum(times), unknown)


def _cells(printed: str) -> int:
    """Trips of the loop over the grid on one core, which ends last. Those before the first cell and
    after the last only move data."""
    last = _END.findall(printed)[-1]
    return int(last) - max(int(stage) for stage in _STAGE.findall(printed))
