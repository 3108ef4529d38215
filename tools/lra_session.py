"""Runs the cells of `tools.lra`, one after the other."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from etils import epath

from spectral_pod import project_files, storage
from spectral_pod.errors import TimeUp, UserError

from . import exit_codes, lra_report, shell, status
from .lra_report import Cell

_LOOK_SECONDS = 1.0  # between looks at a running cell
_SHOW_SECONDS = 60.0  # between lines of progress
_SAVE_SECONDS = 120.0  # for a trainer to save and end, after which it is killed
_TAIL = 15  # lines of a failed cell's output that are shown


class Session:
    """Runs cells that are not done.

    Args:
      out: the folder or gs:// URL of the cells' workdirs, and of the tables.
      cells: all of them, as they were read from `out`.
      command: what starts a cell.
      waits: whether a cell that is to end may take its time, as launchers do that delete what they
        have rented; else it is killed after two minutes.
    """

    def __init__(
        self,
        out: str,
        cells: Sequence[Cell],
        command: Callable[[Cell], list[str]],
        *,
        budget_minutes: float,
        waits: bool,
    ):
        self._out, self._cells, self._command, self._waits = out, cells, command, waits
        self._deadline = time.monotonic() + 60 * budget_minutes
        self._code = 0  # the worst of the cells
        self._budget_ended = False
        self._stopped = False  # a cell by its own --stop_after_minutes
        self._without_data: set[str] = set()  # tasks
        # Seconds of cells that are done, by task and model.
        self._seconds = {
            (cell.task, cell.model): cell.facts["seconds"]
            for cell in cells
            if cell.is_done and cell.facts["seconds"] is not None
        }
        self._logs = pathlib.Path(out) / "logs"
        if storage.is_remote(out):
            self._logs = pathlib.Path(tempfile.mkdtemp(prefix="spectral_pod-lra-"))

    def run(self) -> int:
        """Runs them, and prints and writes the tables, whatever happens; returns the exit code."""
        missing = self._missing()
        shell.say(f"{len(self._cells)} cell(s), {len(missing)} of them to run")
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            with _signals():
                for i, cell in enumerate(missing):
                    self._budget_ended |= time.monotonic() >= self._deadline
                    if self._budget_ended:
                        break
                    if cell.task in self._without_data:
                        cell.state = "no data"
                        continue
                    self._run(cell, missing[i:])
        finally:
            self._write_tables()
        if self._budget_ended:
            shell.say(f"The budget ended; {len(self._missing())} cell(s) are not done")
        return self._code or (TimeUp.exit_code if self._budget_ended or self._stopped else 0)

    def _missing(self) -> list[Cell]:
        return [cell for cell in self._cells if not cell.is_done]

    def _run(self, cell: Cell, rest: Sequence[Cell]) -> None:
        """Runs a cell to its end, or to that of the budget."""
        log = self._logs / f"{cell.name}.log"
        position = f"[{len(self._cells) - len(rest) + 1} of {len(self._cells)}]"
        shell.say(f"{position} {cell.name}: its output is in {log}")
        with open(log, "ab") as file:
            start = file.tell()
            code = self._wait(cell, rest, position, file)
        cell.read(self._out)
        if cell.is_done:
            self._seconds[cell.task, cell.model] = cell.facts["seconds"] or 0.0
            shell.say(f"{position} {cell.name}: {cell.facts['accuracy']:.2f}%")
        elif code == 0:
            shell.say(f"{position} {cell.name}: the launcher has ended, and there is no result yet")
        elif code == TimeUp.exit_code:
            self._stopped = True
            shell.say(f"{position} {cell.name}: {exit_codes.meaning(code)}")
        elif not (self._budget_ended and exit_codes.is_curable(code)):
            self._report_failure(cell, code, log, start)

    def _wait(self, cell: Cell, rest: Sequence[Cell], position: str, log: IO[bytes]) -> int:
        """Starts a cell, and returns its exit code."""
        # A session of its own: Ctrl-C in a terminal reaches it only through this tool.
        child = subprocess.Popen(
            self._command(cell), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        shown = time.monotonic()
        try:
            while child.poll() is None:
                time.sleep(_LOOK_SECONDS)
                if time.monotonic() >= self._deadline:
                    self._budget_ended = True
                    shell.say(f"{position} {cell.name}: the budget ends; saving")
                    return self._end(child)
                if time.monotonic() >= shown + _SHOW_SECONDS:
                    shown = time.monotonic()
                    shell.say(f"{position} {cell.name}: {self._progress(cell, rest)}")
            return _code(child)
        except KeyboardInterrupt:
            shell.say(f"{position} {cell.name}: saving; Ctrl-C again kills it")
            self._end(child)
            cell.read(self._out)
            raise
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def _end(self, child: subprocess.Popen[bytes]) -> int:
        """Lets a cell save and end; returns its exit code."""
        child.terminate()
        limit = None if self._waits else _SAVE_SECONDS
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(limit)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return _code(child)

    def _report_failure(self, cell: Cell, code: int, log: pathlib.Path, start: int) -> None:
        self._code = exit_codes.worse(self._code, code)
        lines = log.read_bytes()[start:].decode(errors="replace").rstrip().splitlines()
        has_begun = cell.state != "not run"
        faults = [line for line in lines if line.startswith("DataError: ")]
        if code == UserError.exit_code and faults and not has_begun:  # a run begins with its data
            self._without_data.add(cell.task)
            cell.state = "no data"
            shell.say(f"{cell.task} has no data: {faults[-1]}")
            return
        cell.state = f"failed ({code}{f', {cell.state}' if has_begun else ''})"
        meaning = exit_codes.meaning(code)
        shell.say(f"{cell.name} failed with exit code {code} ({meaning}); the end of {log}:")
        for line in lines[-_TAIL:]:
            shell.say(f"    {line}")

    def _progress(self, cell: Cell, rest: Sequence[Cell]) -> str:
        workdir = f"{self._out}/{cell.name}"
        try:
            log = project_files.Log(epath.Path(workdir) / "metrics.jsonl", project_files.METRICS)
            facts = status.facts(workdir, log, time.time())
        except (UserError, *storage.failures()):  # it has no workdir yet; storage may not answer
            return "no metrics yet"
        left = facts["eta_seconds"]
        text = f"step {facts['step']:,} of {facts['total_steps']:,}"
        if left is None:
            return text
        text += f", done in {status.duration(left)}"
        # A cell that is like none that is done takes as long as those on average.
        total = left / max(1 - facts["step"] / facts["total_steps"], 1e-6)
        known = self._seconds | {(cell.task, cell.model): total}
        usual = sum(known.values()) / len(known)
        later = [(c.task, c.model) for c in rest[1:] if c.task not in self._without_data]
        left += sum(known.get(one, usual) for one in later)
        return f"{text}; all cells in about {status.duration(left)}"

    def _write_tables(self) -> None:
        summary = lra_report.summary(self._cells)
        text = lra_report.tables(summary)
        out = epath.Path(self._out)
        storage.write_whole(out / "table.md", text)
        storage.write_whole(out / "table.json", json.dumps(summary, indent=1) + "\n")
        print(text, end="", flush=True)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the cells as Ctrl-C does, within this context."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup
        numbers.remove(signal.SIGHUP)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _code(child: subprocess.Popen[bytes]) -> int:
    """The exit code as shells report it: 128 more than the number of the signal that ended it."""
    return child.returncode if child.returncode >= 0 else 128 - child.returncode
