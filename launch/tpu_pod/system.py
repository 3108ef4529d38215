"""The machine that the launcher runs on: its clock, and the programs it starts."""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


@dataclasses.dataclass(frozen=True)
class Done:
    """How a program ended."""

    code: int
    out: str
    err: str


class System:
    """Programs run in process groups of their own, so that Ctrl-C reaches the launcher alone."""

    def __init__(self, environment: dict[str, str] | None = None):
        self._environment = os.environ | (environment or {})
        self._running: set[subprocess.Popen[str]] = set()

    def now(self) -> float:
        """Seconds since some time."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def say(self, line: str) -> None:
        """Prints a line on stderr. A terminal that was closed must not end the launcher."""
        with contextlib.suppress(OSError):
            sys.stderr.write(f"tpu_pod: {line}\n")
            sys.stderr.flush()

    def show(self, line: str) -> None:
        """Prints a line of a worker on stdout."""
        with contextlib.suppress(OSError):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def run(self, argv: Sequence[str], timeout: float) -> Done:
        """Runs a program to its end; one that takes longer than `timeout` seconds is killed."""
        process = self._start(argv, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill(process)
            out, err = process.communicate()
            err += f"\nno answer within {timeout:.0f} s"
        finally:
            self._running.discard(process)
        return Done(process.returncode, out, err)

    def lines(self, argv: Sequence[str]) -> Iterator[str]:
        """The lines that a program prints, as it prints them; its errors are dropped."""
        process = self._start(argv, stderr=subprocess.DEVNULL)
        try:
            assert process.stdout
            for line in process.stdout:
                yield line.rstrip("\n")
        finally:
            _kill(process)
            process.wait()
            self._running.discard(process)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """The results for all items, which are worked on at the same time."""
        pool = ThreadPoolExecutor(64)
        try:
            return list(pool.map(function, items))
        except BaseException:  # also Ctrl-C: what the threads wait for is ended, so that they end
            pool.shutdown(wait=False, cancel_futures=True)
            self.end()
            raise
        finally:
            pool.shutdown()

    def in_background(self, function: Callable[[], None]) -> Callable[[], bool]:
        """Starts `function`; the result says whether it still runs."""
        thread = threading.Thread(target=function, daemon=True)
        thread.start()
        return thread.is_alive

    def end(self) -> None:
        """Kills what still runs."""
        for process in list(self._running):
            _kill(process)

    def _start(self, argv: Sequence[str], stderr: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=self._environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._running.add(process)
        return process


class DryRun(System):
    """Prints the programs, ready to paste into a shell, and runs none."""

    def run(self, argv: Sequence[str], timeout: float) -> Done:
        self.show(" ".join(map(_quoted, argv)))
        return Done(0, "", "")

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [function(item) for item in items]


def _quoted(word: str) -> str:
    """A word for a shell, on one line."""
    if "\n" not in word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says so of a zombie
        os.killpg(process.pid, signal.SIGKILL)
