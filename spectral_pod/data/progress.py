"""A progress line for long jobs on data."""

import sys
import time


class Progress:
    """Prints progress and an ETA to stderr: one updated line on a terminal, or else a line every
    ten seconds."""

    def __init__(self, what: str, total: float, unit: str):
        """`total` is in units; 0 if it is unknown, and then there is no ETA."""
        self._what, self._total, self._unit = what, total, unit
        self._terminal = sys.stderr.isatty()
        self._started = self._last_printed = time.monotonic()
        self.done = 0.0

    def add(self, amount: float = 1) -> None:
        self.at(self.done + amount)

    def at(self, done: float) -> None:
        """Sets the number of units that are done."""
        self.done = done
        now = time.monotonic()
        if now - self._last_printed < (0.2 if self._terminal else 10.0) or not done:
            return
        self._last_printed = now
        rate = done / (now - self._started)
        left = max(self._total - done, 0) / rate
        line = f"{self._what}: {done:,.0f} {self._unit}, {rate:,.0f} a second"
        if self._total:
            line = (
                f"{self._what}: {done:,.0f} of {self._total:,.0f} {self._unit}, {rate:,.0f} a "
                f"second, ETA {int(left // 60)}:{int(left % 60):02d}"
            )
        end = "\r" if self._terminal else "\n"
        print(f"{line:<78}" if self._terminal else line, end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clears the line on a terminal."""
        if self._terminal:
            print(f"{'':<78}", end="\r", file=sys.stderr, flush=True)
