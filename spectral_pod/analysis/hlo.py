"""A parsed HLO program: its instructions, how often each is executed, and its collectives.

XLA's own counts (`compiled.cost_analysis()`) count the body of a loop once. Here an instruction
counts once per iteration of the loops around it, and of a conditional the most expensive branch
counts, or the cheapest one on request.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2,
          "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8,
          "c128": 16}  # fmt: skip
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<operands>[^)]*)\)(?P<attributes>.*)"
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
# Opcodes whose called computation is executed as a part of the program, not once per element.
_CALLERS = ("fusion", "call", "while", "conditional", "async-start")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type; `dtype` is spelled as in HLO."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool  # False for on-chip memory, whose layouts say S(1) or higher

    @property
    def width(self) -> float:
        """Bytes of an element."""
        return _BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return math.ceil(self.width * math.prod(self.shape))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@functools.lru_cache(maxsize=65536)
def arrays(type_text: str) -> tuple[Array, ...]:
    """The arrays of a type such as `f32[8,128]{1,0}` or `(f32[8], s32[])`, in order."""
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), _in_hbm(layout))
        for dtype, dims, layout in _ARRAY.findall(type_text)
        if dtype in _BYTES
    )


def _in_hbm(layout: str) -> bool:
    space = re.search(r"S\((\d+)\)", layout)
    return space is None or space[1] == "0"


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction (line) of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    computation: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.type)

    def attribute(self, pattern: str) -> str | None:
        """The first group of the pattern's first match in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    @property
    def callees(self) -> list[str]:
        if self.opcode not in _CALLERS:
            return []
        names = ",".join(_CALLED.findall(self.attributes))
        return [name.lstrip("%") for name in re.findall(r"%?[\w.-]+", names)]


class Program:
    """The computations of a compiled module, from `compiled.as_text()`.

    Attributes:
      computations: for each computation by name, its instructions by name, in order.
      entry: the name of the entry computation.
      num_partitions: number of devices of the program; with several slices, those of one slice.
      notes: conventions that were applied while counting.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, name = "", ""
        self.notes: set[str] = set()
        for line in text.splitlines():
            if line[:1] != " ":
                if header := _COMPUTATION.match(line):
                    name = header[2]
                    self.computations[name] = {}
                    self.entry = name if header[1] else self.entry
                elif line.startswith("HloModule"):
                    partitions = re.search(r"num_partitions=(\d+)", line)
                    self.num_partitions = int(partitions[1]) if partitions else 1
            elif match := _INSTRUCTION.match(line):
                operands = tuple(re.findall(r"%([\w.-]+)", match["operands"]))
                if match["opcode"] in ("constant", "parameter"):
                    operands = (match["operands"],)
                self.computations[name][match["name"]] = Instruction(
                    match["name"], match["type"], match["opcode"], operands,
                    match["attributes"], name,
                )  # fmt: skip

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results an instruction uses."""
        scope = self.computations[instruction.computation]
        return [scope[name] for name in instruction.operands if name in scope]

    def runs(
        self, measure: Callable[[Instruction], float], *, fused: bool = True, rare: bool = True
    ) -> list[tuple[Instruction, int]]:
        """The instructions with a positive measure, each with its number of executions per run.

        Of a conditional's branches, the one with the greatest total counts, or if not `rare` the
        one with the least. `fused` says whether to include instructions inside fusions.
        """
        memo: dict[str, list[tuple[Instruction, int]]] = {}

        def visit(computation: str) -> list[tuple[Instruction, int]]:
            if computation in memo:
                return memo[computation]
            found = []
            for instruction in self.computations[computation].values():
                if measure(instruction) > 0:
                    found.append((instruction, 1))
                if instruction.opcode == "fusion" and not fused:
                    continue
                inner = [visit(callee) for callee in instruction.callees]
                if instruction.opcode == "conditional":
                    totals = [sum(measure(i) * n for i, n in branch) for branch in inner]
                    inner = [inner[totals.index(max(totals) if rare else min(totals))]]
                elif instruction.opcode == "while":
                    trips = self.trip_count(instruction) if inner[0] else 0
                    inner = [[(i, n * trips) for i, n in inner[0]]]
                found += itertools.chain.from_iterable(inner)
            memo[computation] = found
            return found

        return visit(self.entry)

    def trip_count(self, loop: Instruction) -> int:
        """The iterations of a `while`: XLA's own figure, or derived from its counter's bound.

        A loop whose end depends on data counts as one iteration, and `notes` says so.
        """
        if count := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(count)
        condition = self._with_fused(loop.attribute(r"condition=%?([\w.-]+)") or "")
        bounds = [int(i.operands[0]) for i in condition if _is_integer_constant(i)]
        compares = [i for i in condition if i.opcode == "compare"]
        counters = [i for i in condition if i.opcode == "get-tuple-element"]
        if len(bounds) == len(compares) == len(counters) == 1:
            direction = compares[0].attribute(r"direction=(\w+)")
            first = self._initial(loop, int(counters[0].attribute(r"index=(\d+)") or 0))
            if direction in ("LT", "LE", "NE") and first is not None:
                return max(0, bounds[0] + (direction == "LE") - first)
        self.notes.add(f"{loop.name}, a loop of unknown length, counts once")
        return 1

    def _with_fused(self, computation: str) -> list[Instruction]:
        found = list(self.computations.get(computation, {}).values())
        return found + [j for i in found for callee in i.callees for j in self._with_fused(callee)]

    def _initial(self, loop: Instruction, index: int) -> int | None:
        """The initial integer value of element `index` of a loop's state, if the text shows it."""
        (state,) = self.operands(loop)
        if state.opcode != "tuple":
            return None
        value = self.operands(state)[index]
        while value.opcode in ("copy", "bitcast", "convert"):
            value = self.operands(value)[0]
        return int(value.operands[0]) if _is_integer_constant(value) else None

    def source(self, instruction: Instruction) -> str:
        """The name of the JAX operation that an instruction, or its nearest producer, came from."""
        seen, queue = {instruction.name}, [instruction]
        for candidate in queue:
            if name := candidate.attribute(r'op_name="((?:[^"\\]|\\.)*)"'):
                return name.replace("\\'", "'")
            fresh = [i for i in self.operands(candidate) if i.name not in seen]
            seen |= {i.name for i in fresh}
            queue += fresh
            if len(queue) > 64:
                break
        return ""


def _is_integer_constant(instruction: Instruction) -> bool:
    return instruction.opcode == "constant" and instruction.operands[0].lstrip("-").isdecimal()


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, or several identical ones, of a program.

    `bytes` is the size of the whole array on one chip: the result, or for a reduce-scatter the
    operand. In a ring of n chips, each chip sends (n-1)/n of it (twice that for an all-reduce), so
    `bytes` is what a chip sends up to a factor, which `sent` applies, and it does not depend on n.
    """

    kind: str
    bytes: int
    arrays: tuple[Array, ...]
    source: str  # the JAX operation it came from
    count: int = 1  # executions per run of the program
    axes: tuple[str, ...] = ()  # mesh axes it runs over
    link: str = "ICI"  # or "DCN", between slices
    group_size: int = 1  # participating chips, or slices if over DCN
    sharers: int = 1  # chips of a slice that share what their group sends to other slices

    @property
    def sent(self) -> float:
        """Bytes that one chip sends, with the best known algorithm."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        trips = 2 if self.kind == "all-reduce" else 1
        return trips * self.bytes * (self.group_size - 1) / self.group_size

    @property
    def what(self) -> str:
        """The largest array, e.g. 'f32[128,64]', and the number of further arrays."""
        largest = max(self.arrays, key=lambda a: a.bytes, default=None)
        more = f" and {len(self.arrays) - 1} more" if len(self.arrays) > 1 else ""
        return f"{largest}{more}"


def collectives(
    hlo_text: str | Program, mesh_shape: Mapping[str, int] | None = None, num_slices: int = 1
) -> list[Collective]:
    """All collectives of a compiled module, largest first.

    Args:
      hlo_text: `compiled.as_text()`, or the program parsed from it.
      mesh_shape: the sizes of the mesh axes by name, in order. Without it `axes` are empty.
      num_slices: number of equal blocks of the first mesh axis that are connected by DCN.

    Raises:
      ValueError: the replica groups are in an unsupported notation.
    """
    program = hlo_text if isinstance(hlo_text, Program) else Program(hlo_text)
    sizes = dict(mesh_shape or {})
    per_slice = math.prod(sizes.values()) // num_slices
    if num_slices > 1 and program.num_partitions == per_slice:
        # A program of one slice: devices are numbered within it, and DCN is reached by sends.
        sizes[next(iter(sizes))] //= num_slices
    found: dict[Collective, int] = {}

    def measure(i: Instruction) -> float:
        return 1 + sum(a.bytes for a in i.arrays) if _starts_collective(program, i) else 0

    for instruction, count in program.runs(measure):
        if instruction.opcode == "send":
            one = _between_slices(program, instruction, sizes, num_slices)
        else:
            one = _among_devices(program, instruction, sizes, per_slice)
        found[one] = found.get(one, 0) + count
    every = [dataclasses.replace(one, count=count) for one, count in found.items()]
    return sorted(every, key=lambda c: (-c.bytes, c.kind, c.source))


def _starts_collective(program: Program, i: Instruction) -> bool:
    if i.opcode == "send":
        return "_xla_megascale_transfer_type" in i.attributes
    if i.opcode.removesuffix("-start") not in KINDS:
        return False
    if "chain_id=" not in i.attributes:
        return True
    # TPUs split a collective into steps fused with other work; only the first step counts.
    scope = program.computations[i.computation].values()
    return any("AsyncCollectiveStart" in other.attributes for other in scope)


def _among_devices(
    program: Program, i: Instruction, sizes: Mapping[str, int], per_slice: int
) -> Collective:
    kind, results = i.opcode.removesuffix("-start"), i.arrays
    if i.opcode in ("all-gather-start", "collective-permute-start"):
        results = results[len(i.operands) : 2 * len(i.operands)]  # the operands come first
    groups = replica_groups(i.attributes, max(program.num_partitions, math.prod(sizes.values())))
    if kind == "reduce-scatter":
        operands = tuple(a for operand in program.operands(i) for a in operand.arrays)
        scale = 1 if operands else groups.shape[1]
        results = operands or results
    else:
        scale = 1
    changes = np.diff(np.sort(groups // per_slice, axis=1), axis=1) > 0
    slices = 1 + int(changes.sum(axis=1).max()) if sizes else 1  # that a group reaches
    # A ring, or reducing within slices first, crosses once for all members in a slice.
    shared = slices > 1 and kind in ("all-reduce", "all-gather", "reduce-scatter")
    return Collective(
        kind=kind,
        bytes=scale * sum(a.bytes for a in results),
        arrays=results,
        source=_source_of_largest(program, i),
        axes=_axes(groups, sizes),
        link="DCN" if slices > 1 else "ICI",
        group_size=groups.shape[1],
        sharers=groups.shape[1] // slices if shared else 1,
    )


def _source_of_largest(program: Program, i: Instruction) -> str:
    """The source of a collective's largest array, as XLA merges collectives of many operations."""
    operands = program.operands(i)
    if len(operands) > 1:
        largest = max(operands, key=lambda operand: sum(a.bytes for a in operand.arrays))
        return program.source(largest) or program.source(i)
    return program.source(i)


def _between_slices(
    program: Program, send: Instruction, sizes: Mapping[str, int], num_slices: int
) -> Collective:
    kind = send.attribute(r'_xla_megascale_transfer_type="(\w+)"') or ""
    payload = send.arrays[:1]
    return Collective(
        kind=kind.lower().replace("_", "-"),
        bytes=payload[0].bytes,
        arrays=payload,
        source=program.source(send),
        axes=tuple(sizes)[:1],
        link="DCN",
        group_size=num_slices,
    )


_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """The groups of devices that communicate, int [groups, devices], from any notation of XLA's.

    `{{0,1},{2,3}}`; `{}` for all devices; `[2,4]<=[4,2]T(1,0)`, an iota reshaped and transposed;
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`, where the device order is optional and a
    part of an axis is `'b':(1)2` (the size before it, its own size); or the pairs of a permute.

    Raises:
      ValueError: the notation is not one of these.
    """
    if match := _MESH_GROUPS.search(attributes):
        return _mesh_groups(*match.groups(""))
    if match := _IOTA_GROUPS.search(attributes):
        return _iota(match[2], match[3] or "").reshape(_integers(match[1]))
    if match := _PAIRS.search(attributes):
        return np.array(_integers(match[1])).reshape(-1, 2)
    if match := _LISTED_GROUPS.search(attributes):
        groups = [_integers(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
        return np.array(groups) if groups else np.arange(num_devices)[None]
    raise ValueError(f"replica groups in an unknown spelling: {attributes[:200]}")


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(shape: str, transpose: str) -> np.ndarray:
    ids = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return ids.transpose(_integers(transpose) or range(ids.ndim))


def _mesh_groups(mesh: str, order: str, axes: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    # Every axis is split into (before, part, after), so that a part of an axis becomes an axis.
    parts = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)
    wanted = {name: (int(pre or 1), int(part or sizes[name])) for name, pre, part in parts}
    shape: list[int] = []
    grouped = []
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        if name in wanted:
            grouped.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    if not order:
        ids = np.arange(math.prod(shape))
    elif match := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        ids = _iota(match[1], match[2] or "")
    else:
        ids = np.array(_integers(order))
    rest = [d for d in range(len(shape)) if d not in grouped]
    members = math.prod(shape[d] for d in grouped)
    return ids.reshape(shape).transpose(*rest, *grouped).reshape(-1, members)


def _axes(groups: np.ndarray, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ; devices are in mesh order."""
    if not sizes or groups.max() >= math.prod(sizes.values()):
        return ()
    coords = np.stack(np.unravel_index(groups, tuple(sizes.values())))  # [axes, groups, members]
    varies = np.any(coords != coords[:, :, :1], axis=(1, 2))
    return tuple(axis for axis, varied in zip(sizes, varies, strict=True) if varied)


def grown(
    small: Iterable[Collective], large: Iterable[Collective]
) -> list[tuple[Collective, Collective | None]]:
    """The collectives of a larger mesh that move more bytes than those of a smaller mesh explain.

    XLA may merge and split collectives differently for the two meshes, so their arrays are matched
    instead: each array of the larger mesh, once per execution, must be matched with one of at least
    its bytes in a collective of the same kind (all-reduce and reduce-scatter are both reductions),
    or else of any kind. A collective with an unmatched array is returned, together with the
    collective of the same JAX operation on the smaller mesh, if there is one. Scalars are ignored:
    they cannot grow, and XLA may sum one once or twice.

    A reduction over slices has a stage within slices and one between them, and XLA chooses how much
    of it each chip sends between slices, and in how many pieces. An unmatched stage between slices
    is not growth if it moves no more than the stage within slices, which is matched itself, or if
    all pieces of that operation together do not.
    """
    small, large = sorted(small, key=lambda c: c.bytes), list(large)
    same_operation = {c.source: c for c in small}
    supply: dict[str, Counter[int]] = {}
    for one in small:
        for array in one.arrays:
            supply.setdefault(_operation(one.kind), Counter())[array.bytes] += one.count
    demands = [(array.bytes, one) for one in large for array in one.arrays if array.shape]
    left = []
    for size, one in sorted(demands, key=lambda demand: -demand[0]):
        missing = _take(supply.get(_operation(one.kind), Counter()), size, one.count)
        if missing:
            left.append((size, missing, one))
    found = []
    for size, missing, one in left:
        for others in supply.values():
            missing = _take(others, size, missing)
        if missing and one not in found:
            found.append(one)
    found = [
        one
        for one in found
        if not (_is_second_stage(one, large) or _is_cut_differently(one, small, large))
    ]
    return [(one, same_operation.get(one.source)) for one in found]


def _is_cut_differently(
    one: Collective, small: Iterable[Collective], large: Iterable[Collective]
) -> bool:
    """Whether it is a piece of a reduction between slices that moves no more than on `small`."""

    def moved(found: Iterable[Collective]) -> int:
        alike = (c for c in found if c.source == one.source and _reduces(c, "DCN"))
        return sum(c.count * c.bytes for c in alike)

    return bool(one.source) and _reduces(one, "DCN") and moved(large) <= moved(small)


def _reduces(collective: Collective, link: str) -> bool:
    return collective.link == link and _operation(collective.kind) == "reduction"


def _is_second_stage(one: Collective, found: Iterable[Collective]) -> bool:
    """Whether it continues, between slices, a reduction of at least its bytes within slices."""
    firsts = [first for first in found if first.source == one.source and _reduces(first, "ICI")]
    enough = any(first.bytes >= one.bytes and first.count >= one.count for first in firsts)
    return bool(one.source) and _reduces(one, "DCN") and enough


def _operation(kind: str) -> str:
    return "reduction" if kind in ("all-reduce", "reduce-scatter") else kind


def _take(supply: Counter[int], size: int, count: int) -> int:
    """Removes `count` entries of at least `size`, smallest first; returns how many were missing."""
    for enough in sorted(n for n, left in supply.items() if n >= size and left):
        taken = min(count, supply[enough])
        supply[enough] -= taken
        count -= taken
    return count
