"""Rows of the table, and how the files of a checkout are run."""

import contextlib
import dataclasses
import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

AGREES, DISAGREES = "agrees", "**disagrees**"
_FALSE_ALARM = 1e-4  # the probability that equal distributions are said to differ


@dataclasses.dataclass
class Row:
    """The comparisons of one kind, of which the worst is shown.

    `verdict` overrides what the comparisons say.
    """

    peer: str
    what: str
    cases: int = 0
    verdict: str = ""
    worst: str = ""
    difference: float = 0.0
    tolerance: float = 0.0
    agrees: bool = True

    def add(self, name: str, difference: float, tolerance: float) -> None:
        """Notes one comparison; NaN disagrees."""
        within = difference <= tolerance
        worse = _share(difference, tolerance) > _share(self.difference, self.tolerance)
        if not self.worst or worse or (self.agrees and not within):
            self.worst, self.difference, self.tolerance = name, float(difference), float(tolerance)
        self.agrees &= within

    def add_draws(self, name: str, ours: Any, theirs: Any) -> None:
        """Compares two samples by their distribution functions (Kolmogorov-Smirnov)."""
        ours, theirs = np.sort(np.ravel(ours)), np.sort(np.ravel(theirs))
        at = np.concatenate([ours, theirs])
        shares = [np.searchsorted(x, at, side="right") / len(x) for x in (ours, theirs)]
        effective = len(ours) * len(theirs) / len(at)
        tolerance = math.sqrt(-math.log(_FALSE_ALARM / 2) / 2 / effective)
        self.add(name, np.abs(shares[0] - shares[1]).max(), tolerance)

    @property
    def failed(self) -> bool:
        """Whether something disagrees, or nothing was compared."""
        return not (self.worst and self.agrees)

    def line(self) -> str:
        values = f"{self.difference:.2g} | {self.tolerance:.2g}" if self.worst else " | "
        verdict = self.verdict or (DISAGREES if self.failed else AGREES)
        cells = self.peer, self.what, str(self.cases), self.worst, values, verdict
        return "| " + " | ".join(cells) + " |"


def _share(difference: float, tolerance: float) -> float:
    return difference / tolerance if tolerance else (math.inf if difference else 0.0)


@contextlib.contextmanager
def importable(modules: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts, importing one of these names gives the object here."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load(path: Path, modules: Mapping[str, Any] | None = None, name: str = "") -> ModuleType:
    """Runs one file of a checkout as a module, with `modules` in place of what it imports."""
    spec = importlib.util.spec_from_file_location(name or f"peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with importable(modules or {}):
        spec.loader.exec_module(module)
    return module
