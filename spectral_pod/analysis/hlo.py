"""What a compiled program communicates, read from its HLO text."""

import dataclasses
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}  # fmt: skip
_COLLECTIVE = re.compile(
    r"= (?P<type>\(.*?\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """One collective of a program: its kind, its result's bytes on one chip, and its source."""

    kind: str
    bytes: int
    what: str  # the result's type, e.g. 'f32[128,64]'
    source: str  # the operation it came from, as JAX names it


def collectives(hlo_text: str) -> list[Collective]:
    """Every collective in the text of a compiled module (`compiled.as_text()`), largest first.

    Those inside loops are listed once.
    """
    found = []
    for line in hlo_text.splitlines():
        match = _COLLECTIVE.search(line)
        if match:
            size = sum(
                _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
                for dtype, dims in _ARRAY.findall(match["type"])
                if dtype in _BYTES
            )
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(match["kind"], size, match["type"], source[1] if source else "")
            )
    return sorted(found, key=lambda c: (-c.bytes, c))
