"""Runs the cells of a study (`study.py`), one after the other or a few at a time."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from spectral_pod import project_files, storage
from spectral_pod.errors import TimeUp, UserError

from . import exit_codes, shell, status
from .study import Cell, Study

_LOOK_SECONDS = 1.0  # between looks at the running cells
_SHOW_SECONDS = 60.0  # between lines of progress
_SAVE_SECONDS = 120.0  # for a trainer to save and end, after which it is killed
_TAIL = 15  # lines of a failed cell's output that are shown


class Session:
    """Runs the cells of a study that are not done.

    Cells without a launcher that are to end are killed if they have not after two minutes; a
    launcher may take its time, as some delete what they have rented.

    Args:
      study: whose cells have been read.
      jobs: how many cells run at a time. Each has an equal share of the CPU's cores.
    """

    def __init__(self, study: Study[Any], *, budget_minutes: float, jobs: int = 1):
        self._study, self._jobs = study, jobs
        self._cells: list[Cell] = study.cells
        self._deadline = time.monotonic() + 60 * budget_minutes
        self._code = 0  # the worst of the cells
        self._budget_ended = False
        self._stopped = False  # a cell by its own --stop_after_minutes
        self._without_data: set[str] = set()
        # Seconds of cells that are done, by their kind.
        self._seconds = {
            cell.kind: cell.facts["seconds"]
            for cell in self._cells
            if cell.is_done and cell.facts["seconds"] is not None
        }
        self._logs = pathlib.Path(study.out) / "logs"
        if storage.is_remote(study.out):
            self._logs = pathlib.Path(tempfile.mkdtemp(prefix="spectral_pod-study-"))

    def run(self) -> int:
        """Runs them, and prints and writes the tables, whatever happens; returns the exit code."""
        waiting = self._missing()
        shell.say(f"{len(self._cells)} cell(s), {len(waiting)} of them to run")
        self._logs.mkdir(parents=True, exist_ok=True)
        running: list[_Run] = []
        try:
            with _signals():
                try:
                    self._work(waiting, running)
                except KeyboardInterrupt:
                    self._end(running, "saving; Ctrl-C again kills it")
                    raise
        finally:
            for run in running:
                run.kill()
                run.cell.read(self._study.out)
            self._write_tables()
        if self._budget_ended:
            shell.say(f"The budget ended; {len(self._missing())} cell(s) are not done")
        return self._code or (TimeUp.exit_code if self._budget_ended or self._stopped else 0)

    def _missing(self) -> list[Cell]:
        return [cell for cell in self._cells if not cell.is_done]

    def _work(self, waiting: list[Cell], running: list["_Run"]) -> None:
        """Starts and finishes cells until none is left, or the budget ends; both lists change."""
        while waiting or running:
            while waiting and len(running) < self._jobs and time.monotonic() < self._deadline:
                cell = waiting.pop(0)
                if cell.data in self._without_data:
                    cell.state = "no data"
                    continue
                running.append(self._start(cell, {run.share for run in running}))
            for run in [run for run in running if run.child.poll() is not None]:
                running.remove(run)
                self._finish(run)
            if time.monotonic() >= self._deadline:
                self._budget_ended = bool(waiting or running)
                self._end(running, "the budget ends; saving")
                for run in running:
                    self._finish(run)
                running.clear()
                return
            for run in running:
                if time.monotonic() >= run.shown + _SHOW_SECONDS:
                    run.shown = time.monotonic()
                    run.say(self._progress(run.cell, [r.cell for r in running], waiting))
            if len(running) == self._jobs or not waiting:
                time.sleep(_LOOK_SECONDS)

    def _start(self, cell: Cell, taken: set[int]) -> "_Run":
        log = self._logs / f"{cell.name}.log"
        position = f"[{self._cells.index(cell) + 1} of {len(self._cells)}]"
        shell.say(f"{position} {cell.name}: its output is in {log}")
        share = next(i for i in range(self._jobs) if i not in taken)
        return _Run(cell, position, log, self._study.command(cell), share, self._jobs)

    def _end(self, running: list["_Run"], why: str) -> None:
        """Lets cells save and end."""
        for run in running:
            run.say(why)
            run.child.terminate()
        limit = None if self._study.launcher else time.monotonic() + _SAVE_SECONDS
        for run in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.child.wait(None if limit is None else max(0.0, limit - time.monotonic()))
            run.kill()

    def _finish(self, run: "_Run") -> None:
        """Reports on a cell that has ended."""
        cell, code = run.cell, run.code
        run.log.close()
        cell.read(self._study.out)
        if cell.is_done:
            self._seconds[cell.kind] = cell.facts["seconds"] or 0.0
            run.say(f"{cell.facts['accuracy']:.2f}%")
        elif code == 0:
            run.say("the launcher has ended, and there is no result yet")
        elif code == TimeUp.exit_code:
            self._stopped = True
            run.say(exit_codes.meaning(code))
        elif not (self._budget_ended and exit_codes.is_curable(code)):
            self._report_failure(run)

    def _report_failure(self, run: "_Run") -> None:
        cell, code = run.cell, run.code
        self._code = exit_codes.worse(self._code, code)
        lines = run.output().rstrip().splitlines()
        has_begun = cell.state != "not run"
        faults = [line for line in lines if line.startswith("DataError: ")]
        if code == UserError.exit_code and faults and not has_begun:  # a run begins with its data
            self._without_data.add(cell.data)
            cell.state = "no data"
            shell.say(f"{cell.data} has no data: {faults[-1]}")
            return
        cell.state = f"failed ({code}{f', {cell.state}' if has_begun else ''})"
        meaning = exit_codes.meaning(code)
        shell.say(f"{cell.name} failed with exit code {code} ({meaning}); the end of {run.file}:")
        for line in lines[-_TAIL:]:
            shell.say(f"    {line}")

    def _progress(self, cell: Cell, running: list[Cell], waiting: list[Cell]) -> str:
        """How far a cell is, and all that run or wait."""
        facts = self._status(cell)
        if facts is None:
            return "no metrics yet"
        text = f"step {facts['step']:,} of {facts['total_steps']:,}"
        if facts["eta_seconds"] is None:
            return text
        text += f", done in {status.duration(facts['eta_seconds'])}"
        known, left = dict(self._seconds), 0.0
        for one in running:
            facts = self._status(one)
            if facts is not None and facts["eta_seconds"] is not None:
                left += facts["eta_seconds"]
                share = max(1 - facts["step"] / facts["total_steps"], 1e-6)
                known[one.kind] = facts["eta_seconds"] / share
        # A cell that is like none that was seen takes as long as those on average.
        usual = sum(known.values()) / len(known)
        later = [c.kind for c in waiting if c.data not in self._without_data]
        left += sum(known.get(kind, usual) for kind in later)
        return f"{text}; all cells in about {status.duration(left / max(1, len(running)))}"

    def _status(self, cell: Cell) -> dict[str, Any] | None:
        """The facts of `tools.status`; None before there are any."""
        workdir = self._study.workdir(cell)
        try:
            log = project_files.Log(epath.Path(workdir) / "metrics.jsonl", project_files.METRICS)
            return status.facts(workdir, log, time.time())
        except (UserError, *storage.failures()):  # it has no workdir yet; storage may not answer
            return None

    def _write_tables(self) -> None:
        summary = self._study.summary()
        text = self._study.tables(summary)
        out = epath.Path(self._study.out)
        storage.write_whole(out / "table.md", text)
        storage.write_whole(out / "table.json", json.dumps(summary, indent=1) + "\n")
        for name, picture in self._study.pictures(summary).items():
            storage.write_whole(out / name, picture)
        print(text, end="", flush=True)


class _Run:
    """A cell that runs, in a process group of its own, on its share of the cores."""

    def __init__(
        self,
        cell: Cell,
        position: str,
        file: pathlib.Path,
        command: list[str],
        share: int,
        shares: int,
    ):
        self.cell, self.file, self.share = cell, file, share
        self._position = position
        self.shown = time.monotonic()  # when a line of progress was shown last
        self.log: IO[bytes] = open(file, "ab")  # noqa: SIM115 (closed when it has ended)
        self._log_start = self.log.tell()
        with _on_share(share, shares):
            # A session of its own: Ctrl-C in a terminal reaches it only through this tool.
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self.log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def code(self) -> int:
        """The exit code as shells report it: 128 more than the signal's number that ended it."""
        code: int = self.child.returncode
        return code if code >= 0 else 128 - code

    def say(self, text: str) -> None:
        shell.say(f"{self._position} {self.cell.name}: {text}")

    def output(self) -> str:
        """What it has printed."""
        return self.file.read_bytes()[self._log_start :].decode(errors="replace")

    def kill(self) -> None:
        """Ends it at once, if it has not ended."""
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()


@contextlib.contextmanager
def _on_share(share: int, shares: int) -> Iterator[None]:
    """Processes that start within this context run on one of equal shares of the cores.

    Where there are more shares than cores, shares use the same cores in turn.
    """
    if shares == 1 or not hasattr(os, "sched_setaffinity"):  # macOS has no such call
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    size = max(1, len(cores) // shares)
    start = share * size % len(cores)
    os.sched_setaffinity(0, cores[start : start + size])  # which children inherit
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


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
