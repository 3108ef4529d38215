"""Ends a run in which nothing moves, after every process has written what its threads are doing."""

import collections
import faulthandler
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping

from etils import epath

from spectral_pod import errors, storage
from spectral_pod.parallel import runtime

_START_SECONDS = 3600.0  # that the first step may take: it compiles
_WRITE_SECONDS = 20.0  # that writing the stacks may take: storage may be what hangs


class Watchdog:
    """Expects a `beat` at least every max(`seconds`, `factor` x the median interval).

    A hang is everybody's: the process that sees it first tells the others, and all write their
    stacks to WORKDIR/stalls and leave with `errors.STALLED`. The leader gives them to `report`,
    by name, too.
    """

    def __init__(
        self,
        workdir: str,
        *,
        factor: float,
        seconds: float,
        report: Callable[[Mapping[str, str]], None],
    ):
        self._stalls = epath.Path(workdir) / "stalls"
        self._factor, self._seconds, self._report = factor, seconds, report
        self._intervals: collections.deque[float] = collections.deque(maxlen=64)
        self._last = time.monotonic()
        self._beats = 0
        self._closed = threading.Event()
        self._ending = threading.Lock()

    def __enter__(self) -> "Watchdog":
        if self._factor:
            runtime.when_told("stalled", self._end)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def beat(self) -> None:
        """The run has moved."""
        now = time.monotonic()
        if self._beats:  # the first interval is the compilation's
            self._intervals.append(now - self._last)
        self._beats += 1
        self._last = now

    def limit(self) -> float:
        """Seconds of silence that are too many now."""
        if not self._intervals:
            return max(_START_SECONDS, self._seconds)
        return max(self._seconds, self._factor * statistics.median(list(self._intervals)))

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self.limit():
                why = f"nothing has moved for {silent:.0f} s on process {runtime.this_process()}"
                runtime.tell("stalled", why)
                self._end(why)

    def _end(self, why: str) -> None:
        if self._closed.is_set() or not self._ending.acquire(blocking=False):
            return
        writing = threading.Thread(target=self._write, args=(_stacks(),), daemon=True)
        writing.start()
        writing.join(_WRITE_SECONDS)
        runtime.leave(
            errors.STALLED,
            f"Stalled: {why}. What every thread was doing is in {self._stalls}; the newest "
            "checkpoint is kept, the same command continues from it",
        )

    def _write(self, stacks: str) -> None:
        runtime.share("stacks", stacks)
        self._stalls.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        storage.write_whole(self._stalls / f"{now}-process-{runtime.this_process()}.txt", stacks)
        if runtime.this_process() != 0:
            return
        told = {0: stacks}
        deadline = time.monotonic() + _WRITE_SECONDS / 2
        while len(told) < runtime.num_processes() and time.monotonic() < deadline:
            time.sleep(0.2)
            told |= runtime.shared("stacks")
        self._report({f"stall/process_{i}": f"```\n{told[i]}\n```" for i in sorted(told)})


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
