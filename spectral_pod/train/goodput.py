"""What a run spends its time on, every moment counted once."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import psutil

PHASES = {
    "start": "from the start of the process: imports, devices, joining the other processes",
    "data_preparation": "opening the data, and writing them first if there are none",
    "setup": "taking the workdir; the model and its state, new or restored",
    "compile": "compiling the training step",
    "data": "waiting for the next batch",
    "step": "dispatching steps, and waiting for them",
    "probe": "probes of layers and their pictures, and compiling them",
    "eval": "evaluations, and compiling them",
    "sample": "writing samples of text",
    "checkpoint": "steps waiting for a checkpoint",
    "restart": "from the last line of metrics to the next start, and steps repeated after it",
    "other": "outside of all these",
}


class Stopwatch:
    """Counts the time of this process by what it does.

    Attributes:
      seconds: by phase, one of PHASES; the time outside of phases is in none.
      started: when the process was, in seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Counts the time since the start of the process as that of the phase "start".

        Args:
          clock: seconds since any moment; does not go back.
        """
        self._clock = clock
        self._phase, self._since = "", clock()  # what runs now, and since when it is counted
        self.started = psutil.Process().create_time()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.seconds["start"] = max(0.0, time.time() - self.started)

    @contextlib.contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Counts the time spent in this context as that of `phase`, and of no phase around it."""
        self.count()
        outer, self._phase = self._phase, phase
        try:
            yield
        finally:
            self.count()
            self._phase = outer

    def count(self) -> float:
        """Counts the time up to now as that of the current phase; returns the clock's time."""
        now = self._clock()
        if self._phase:
            self.seconds[self._phase] += now - self._since
        self._since = now
        return now


class Goodput:
    """The fraction of all time since the first start of a run that was spent in useful steps.

    Continues from the last line of the metrics before the step of this start. The time between
    that line and this start, with steps that are repeated, counts as `restart`, unless the run had
    come to its end and is now to train for more steps.
    """

    def __init__(self, last_line: Mapping[str, float], stopwatch: Stopwatch, ended: bool = False):
        before = {
            name.removeprefix("goodput/").removesuffix("_seconds"): value
            for name, value in last_line.items()
            if name.startswith("goodput/") and name.endswith("_seconds")
        }
        if "wall_time" in last_line and not ended:
            gap = max(0.0, stopwatch.started - last_line["wall_time"])
            before["restart"] = before.get("restart", 0.0) + gap
        self._total_before = sum(before.values())
        self._before = {cause: x for cause, x in before.items() if cause != "other"}
        self._stopwatch = stopwatch

    def scalars(self) -> dict[str, float]:
        """`goodput/fraction`, and the seconds by cause; the remaining ones are `other`."""
        seconds = collections.Counter(self._before) + collections.Counter(self._stopwatch.seconds)
        total = self._total_before + time.time() - self._stopwatch.started
        known = sum(seconds.values())
        values = {f"goodput/{cause}_seconds": x for cause, x in seconds.items()}
        values["goodput/other_seconds"] = max(0.0, total - known)
        # A clock that was set back must not make the fraction exceed 1.
        return values | {"goodput/fraction": seconds["step"] / max(total, known, 1e-9)}
