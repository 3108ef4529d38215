"""Ends a run that makes no progress, after every process has written its threads' stacks."""

import collections
import faulthandler
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping

from absl import logging
from etils import epath

from spectral_pod import errors, storage
from spectral_pod.errors import UserError
from spectral_pod.parallel import runtime

_START_SECONDS = 3600.0  # limit for the first step, which includes compilation
_WRITE_SECONDS = 20.0  # limit for writing the stacks, as storage may hang


class Watchdog:
    """Expects a `beat` at least every max(`seconds`, `factor` x the median interval).

    A hang concerns all processes: the first that detects it broadcasts it, and all write their
    stacks to WORKDIR/stalls and exit with `errors.STALLED`. The leader also passes all stacks to
    `report`, by name, which may be called as soon as this context is entered. After a time in which
    this process was stopped, such as by SIGSTOP or with its virtual machine, it counts anew; the
    other processes of the run have seen no progress, and end it.
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
            runtime.on_broadcast("stalled", self._end)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def beat(self) -> None:
        """To be called whenever the run has made progress."""
        now = time.monotonic()
        if self._beats:  # the first interval includes compilation
            self._intervals.append(now - self._last)
        self._beats += 1
        self._last = now

    def limit(self) -> float:
        """Seconds without a beat after which the run counts as stalled."""
        if not self._intervals:
            return max(_START_SECONDS, self._seconds)
        return max(self._seconds, self._factor * statistics.median(list(self._intervals)))

    def _watch(self) -> None:
        woken = time.monotonic()
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            now = time.monotonic()
            if now - woken > self._seconds / 2:  # this thread was stopped as well
                self._last = now
            woken = now
            silent = now - self._last
            if silent > self.limit():
                why = f"nothing has moved for {silent:.0f} s on process {runtime.this_process()}"
                runtime.broadcast("stalled", why)
                self._end(why)

    def _end(self, why: str) -> None:
        if self._closed.is_set() or not self._ending.acquire(blocking=False):
            return
        writing = threading.Thread(target=self._write, args=(_stacks(),), daemon=True)
        writing.start()
        writing.join(_WRITE_SECONDS)
        runtime.exit_now(
            errors.STALLED,
            f"Stalled: {why}. What every thread was doing is in {self._stalls}; the newest "
            "checkpoint is kept, the same command continues from it",
        )

    def _write(self, stacks: str) -> None:
        try:
            self._store(stacks)
        except (UserError, *storage.failures()) as error:  # storage may be what has stalled
            logging.error("the stacks cannot be stored: %s\n%s", error, stacks)

    def _store(self, stacks: str) -> None:
        runtime.share("stacks", stacks)
        self._stalls.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        storage.write_whole(self._stalls / f"{now}-process-{runtime.this_process()}.txt", stacks)
        if runtime.this_process() != 0:
            return
        collected = {0: stacks}
        deadline = time.monotonic() + _WRITE_SECONDS / 2
        while len(collected) < runtime.num_processes() and time.monotonic() < deadline:
            time.sleep(0.2)
            collected |= runtime.shared("stacks")
        texts = {f"stall/process_{i}": f"```\n{collected[i]}\n```" for i in sorted(collected)}
        self._report(texts)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
