"""Comparison of stored data with their sha256, in the background of the reads that use them.

The checksums of chunks show damaged chunks, but not parts that were exchanged, or that belong to
another store. Only the sha256 of the content does, and computing it takes as long as reading all.
"""

import atexit
import queue
import threading
import time
from collections.abc import Callable

from absl import logging

from spectral_pod.data.progress import Progress

_POLL_SECONDS = 0.05
_WAIT_SECONDS = 600.0


class Verification:
    """Checks that run one after the other in a thread."""

    def __init__(self) -> None:
        self._checks: queue.Queue[Callable[[], None]] = queue.Queue()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        self.stopped = threading.Event()  # the checks end early

    def request(self, check: Callable[[], None]) -> None:
        """Runs `check` later, which raises if data differ."""
        self._checks.put(check)
        if self._thread is None:
            # A thread inside tensorstore would crash while the interpreter shuts down.
            atexit.register(self.close)
            self._thread = threading.Thread(target=self._work, name="verification", daemon=True)
            self._thread.start()

    def raise_failure(self) -> None:
        """Raises the first error of a check so far."""
        if self._failure:
            raise self._failure

    def wait(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Waits for all checks, and raises their first error.

        At most for ten minutes: a run that has read little of large data need not read all of it.

        Args:
          while_waiting: called several times a second; may raise.
        """
        pending, deadline = self._checks.unfinished_tasks, time.monotonic() + _WAIT_SECONDS
        progress = Progress("verifying the data that were read", pending, "parts")
        while (left := self._checks.unfinished_tasks) and not self._failure:
            if time.monotonic() > deadline:
                logging.warning("%d of the parts that were read are not verified", left)
                break
            while_waiting()
            progress.at(pending - left)
            time.sleep(_POLL_SECONDS)
        progress.end()
        self.raise_failure()

    def close(self) -> None:
        """Ends the thread; checks that have not run are dropped."""
        self.stopped.set()
        if self._thread:
            self._thread.join(timeout=5)

    def _work(self) -> None:
        while not self.stopped.is_set():
            try:
                check = self._checks.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            try:
                check()
            except Exception as error:
                self._failure = self._failure or error
            finally:
                self._checks.task_done()
