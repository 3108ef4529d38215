"""Runs trainers, one after the other or a few at a time: the cells of a study (`study.py`), or what
else a tool wants to know.
"""

import abc
import contextlib
import dataclasses
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

_LOOK_SECONDS = 1.0  # between looks at what runs
_SHOW_SECONDS = 60.0  # between lines of progress
_SAVE_SECONDS = 120.0  # for a trainer to save and end, after which it is killed
_TAIL = 15  # lines of a failed run's output that are shown


@dataclasses.dataclass
class Task:
    """What is to run: `subject` is what it is for, `position` where it stands, as in "[2 of 7]"."""

    subject: Any
    name: str
    position: str
    command: list[str]


class Run:
    """A task that runs, in a process group of its own, on its share of the cores."""

    def __init__(self, task: Task, logs: pathlib.Path, share: int, shares: int):
        self.task, self.share = task, share
        self.file = logs / f"{task.name}.log"
        self.shown = time.monotonic()  # when a line of progress was shown last
        self.say(f"its output is in {self.file}")
        self._log: IO[bytes] = open(self.file, "ab")  # noqa: SIM115 (closed when it has ended)
        self._start = self._log.tell()
        with _on_share(share, shares):
            # A session of its own: Ctrl-C in a terminal reaches it only through this tool.
            self._child = subprocess.Popen(
                task.command, stdin=subprocess.DEVNULL, stdout=self._log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def has_ended(self) -> bool:
        return self._child.poll() is not None

    @property
    def code(self) -> int:
        """The exit code as shells report it: 128 more than the signal's number that ended it."""
        code: int = self._child.returncode
        return code if code >= 0 else 128 - code

    def say(self, text: str) -> None:
        shell.say(f"{self.task.position} {self.task.name}: {text}")

    def output(self) -> list[str]:
        """The lines that it has printed."""
        text = self.file.read_bytes()[self._start :].decode(errors="replace")
        return text.rstrip().splitlines()

    def terminate(self) -> None:
        """Lets it save and end."""
        self._child.terminate()

    def wait(self, until: float | None) -> None:
        """Waits for its end, which is forced at a time of `time.monotonic`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(None if until is None else max(0.0, until - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Ends it at once, if it has not ended."""
        if not self.has_ended:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        self._log.close()


class Runner(abc.ABC):
    """Runs tasks, `jobs` at a time, each on an equal share of the CPU's cores.

    Those that are to end are killed if they have not after two minutes, unless `waits`: a launcher
    may take its time, as some delete what they have rented.

    Attributes:
      running: what runs now.
      budget_ended: whether time was up before everything had ended.
    """

    def __init__(self, logs: pathlib.Path, *, budget_minutes: float, jobs: int, waits: bool):
        self._logs, self._jobs, self._waits = logs, jobs, waits
        self._deadline = time.monotonic() + 60 * budget_minutes
        self.running: list[Run] = []
        self.budget_ended = False

    @abc.abstractmethod
    def next(self) -> Task | None:
        """What is to be started; None if there is nothing for now."""

    @abc.abstractmethod
    def finish(self, run: Run) -> None:
        """Takes the result of what has ended."""

    @abc.abstractmethod
    def progress(self, run: Run) -> str:
        """How far it is, in words."""

    def look(self, run: Run) -> None:  # noqa: B027 (not all have something to look at)
        """Is called every second for what runs."""

    def work(self) -> None:
        """Runs everything, or until the budget ends.

        Raises:
          KeyboardInterrupt: by Ctrl-C or a signal; what ran was let save and end.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            with _signals():
                try:
                    while self._step():
                        time.sleep(_LOOK_SECONDS)
                except KeyboardInterrupt:
                    self._end("saving; Ctrl-C again kills it")
                    raise
        finally:
            for run in self.running:
                run.kill()

    def _step(self) -> bool:
        """Starts, watches and finishes; returns whether anything runs."""
        self.budget_ended = time.monotonic() >= self._deadline
        if self.budget_ended:
            self._end("the budget ends; saving")
        for run in [run for run in self.running if run.has_ended]:
            self.running.remove(run)
            run.kill()
            self.finish(run)
        while not self.budget_ended and len(self.running) < self._jobs:
            if (task := self.next()) is None:
                break
            taken = {run.share for run in self.running}
            share = next(i for i in range(self._jobs) if i not in taken)
            self.running.append(Run(task, self._logs, share, self._jobs))
        for run in self.running:
            self.look(run)
            if time.monotonic() >= run.shown + _SHOW_SECONDS:
                run.shown = time.monotonic()
                run.say(self.progress(run))
        return bool(self.running)

    def _end(self, why: str) -> None:
        """Lets what runs save and end."""
        for run in self.running:
            run.say(why)
            run.terminate()
        until = None if self._waits else time.monotonic() + _SAVE_SECONDS
        for run in self.running:
            run.wait(until)


class Session(Runner):
    """Runs the cells of a study that are not done.

    Args:
      study: whose cells have been read.
    """

    def __init__(self, study: Study[Any], *, budget_minutes: float, jobs: int = 1):
        waits = bool(study.launcher)
        super().__init__(logs(study.out), budget_minutes=budget_minutes, jobs=jobs, waits=waits)
        self._study = study
        self._cells: list[Cell] = study.cells
        self._waiting = self._missing()
        self._code = 0  # the worst of the cells
        self._stopped = False  # a cell by its own --stop_after_minutes
        self._without_data: set[str] = set()
        # Seconds of cells that are done, by their kind.
        self._seconds = {
            cell.kind: cell.facts["seconds"]
            for cell in self._cells
            if cell.is_done and cell.facts["seconds"] is not None
        }

    def run(self) -> int:
        """Runs them, and prints and writes the tables, whatever happens; returns the exit code."""
        shell.say(f"{len(self._cells)} cell(s), {len(self._waiting)} of them to run")
        try:
            self.work()
        finally:
            for run in self.running:
                run.task.subject.read(self._study.out)
            self._write_tables()
        missing = len(self._missing())
        if self.budget_ended and missing:
            shell.say(f"The budget ended; {missing} cell(s) are not done")
        time_up = (self.budget_ended and missing) or self._stopped
        return self._code or (TimeUp.exit_code if time_up else 0)

    def _missing(self) -> list[Cell]:
        return [cell for cell in self._cells if not cell.is_done]

    def next(self) -> Task | None:
        while self._waiting:
            cell = self._waiting.pop(0)
            if cell.data not in self._without_data:
                position = f"[{self._cells.index(cell) + 1} of {len(self._cells)}]"
                return Task(cell, cell.name, position, self._study.command(cell))
            cell.state = "no data"
        return None

    def finish(self, run: Run) -> None:
        cell: Cell = run.task.subject
        cell.read(self._study.out)
        if cell.is_done:
            self._seconds[cell.kind] = cell.facts["seconds"] or 0.0
            run.say(f"{cell.facts['accuracy']:.2f}%")
        elif run.code == 0:
            run.say("the launcher has ended, and there is no result yet")
        elif run.code == TimeUp.exit_code:
            self._stopped = True
            run.say(exit_codes.meaning(run.code))
        elif not (self.budget_ended and exit_codes.is_curable(run.code)):
            self._report_failure(run)

    def _report_failure(self, run: Run) -> None:
        cell, code, lines = run.task.subject, run.code, run.output()
        self._code = exit_codes.worse(self._code, code)
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

    def progress(self, run: Run) -> str:
        """How far a cell is, and all that run or wait."""
        return self._progress(run.task.subject, [r.task.subject for r in self.running])

    def _progress(self, cell: Cell, running: list[Cell]) -> str:
        found = facts(self._study.workdir(cell))
        if found is None:
            return "no metrics yet"
        text = f"step {found['step']:,} of {found['total_steps']:,}"
        if found["eta_seconds"] is None:
            return text
        text += f", done in {status.duration(found['eta_seconds'])}"
        known, left = dict(self._seconds), 0.0
        for one in running:
            found = facts(self._study.workdir(one))
            if found is not None and found["eta_seconds"] is not None:
                left += found["eta_seconds"]
                share = max(1 - found["step"] / found["total_steps"], 1e-6)
                known[one.kind] = found["eta_seconds"] / share
        # A cell that is like none that was seen takes as long as those on average.
        usual = sum(known.values()) / len(known)
        later = [c.kind for c in self._waiting if c.data not in self._without_data]
        left += sum(known.get(kind, usual) for kind in later)
        return f"{text}; all cells in about {status.duration(left / max(1, len(running)))}"

    def _write_tables(self) -> None:
        summary = self._study.summary()
        text = self._study.tables(summary)
        out = epath.Path(self._study.out)
        storage.write_whole(out / "table.md", text)
        storage.write_whole(out / "table.json", json.dumps(summary, indent=1) + "\n")
        for name, picture in self._study.pictures(summary).items():
            storage.write_whole(out / name, picture)
        print(text, end="", flush=True)


def logs(out: str) -> pathlib.Path:
    """The folder of the output of what runs: in `out`, or a new one if that is on gs://."""
    if storage.is_remote(out):
        return pathlib.Path(tempfile.mkdtemp(prefix="spectral_pod-logs-"))
    return pathlib.Path(out) / "logs"


def facts(workdir: str) -> dict[str, Any] | None:
    """What `tools.status` knows of a run; None before there is anything."""
    try:
        log = project_files.Log(epath.Path(workdir) / "metrics.jsonl", project_files.METRICS)
        return status.facts(workdir, log, time.time())
    except (UserError, *storage.failures()):  # it has no workdir yet; storage may not answer
        return None


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
    """SIGTERM and SIGHUP end what runs as Ctrl-C does, within this context."""

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
