"""Trains models on the tasks of the Long Range Arena, and tables their accuracies.

    python -m tools.lra --out=DIR --size=cpu --tasks=listops,pathfinder --models=spectral,s5
    python -m tools.lra --out=DIR --size=full --seeds=0,1,2 --budget_minutes=600 \\
        --set=text:data.options.train=train.jsonl --set=text:data.options.test=test.jsonl
    python -m tools.lra --out=DIR --report

A cell is one run of the trainer: a task, a model and a seed, in the workdir DIR/TASK-MODEL-SEED,
with its output in DIR/logs. Cells run one after the other: all of the first seed before those of
the next, and of a seed all tasks of a model before those of the next, so that whole rows are there
first. The same command continues: a cell with a result is done, and one that was interrupted goes
on where it was saved.

Fields of the configuration: --set=NAME:FIELD=VALUE for the cells of one task or model, repeatable,
and for all of them after --, as in `-- --config.train.total_steps=100`. Text and Image come from
TFDS, Retrieval from a substitute, unless their options name files (configs/lra_TASK.py); a task
without data says so, and its other cells are left out.

--launcher=COMMAND gives each cell's flags to a launcher, in place of `python -m spectral_pod.main`:

    --launcher="sbatch --wait launch/slurm.sh"
    --launcher="launch/tpu_pod.sh --name=lra --zone=ZONE --type=v5e-8 --" --out=gs://BUCKET/DIR

One that returns before its run ends, such as sbatch without --wait, is given all cells at once, and
must be given none of them again before they end; --report shows how far they are.

stdout has the tables, and DIR/table.md and DIR/table.json. Ctrl-C, SIGTERM and the end of the
budget let the running cell save. Exits with 0 if every cell is done or left to a launcher, 75 if the
budget ended before, 130 after Ctrl-C, and else with the code of the worst cell, as the trainer has
them (spectral_pod/errors.py).
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from etils import epath

from spectral_pod import fields, project_files, storage
from spectral_pod.errors import ConfigError, Preempted, UserError
from spectral_pod.fields import PositiveFloat

from . import exit_codes, lra_report, shell, status
from .lra_report import TASKS, Cell

_CONFIGS = {"path_x": ("pathfinder", "path_x")}  # a config and a preset; others have their own
_LOOK_SECONDS = 1.0  # between looks at a running cell
_SHOW_SECONDS = 60.0  # between lines of progress
_SAVE_SECONDS = 120.0  # for a trainer to save and end, after which it is killed
_TAIL = 15  # lines of a failed cell's output that are shown


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("lra", __doc__)
    every = ",".join(TASKS)
    parser.add_place("--out", required=True, metavar="DIR", help="a folder or a gs:// URL")
    parser.add_argument("--tasks", metavar="A,B", help=f"default: {every}")
    parser.add_argument("--models", metavar="A,B", help="presets; default: all")
    parser.add_argument("--seeds", metavar="0,1", help="default: 0")
    parser.add_argument("--size", choices=("cpu", "full"), default="full", help="preset (full)")
    help = "a field for the cells of a task or model"
    parser.add_argument("--set", action="append", default=[], metavar="NAME:FIELD=VALUE", help=help)
    help = "stop after this time; what runs is saved"
    parser.add_value("--budget_minutes", PositiveFloat, math.inf, help)
    parser.add_argument("--launcher", default="", metavar="COMMAND", help="starts each cell")
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there")
    parser.add_argument("flags", nargs="*", help="of the trainer, for every cell, after --")
    return shell.run(parser, _main, argv)


def _main(arguments: argparse.Namespace) -> int | None:
    storage.check_access(arguments.out, write=not (arguments.report or arguments.dry_run))
    if arguments.report:
        cells = _reported(arguments)
        for cell in cells:
            cell.read(arguments.out)
        print(lra_report.tables(lra_report.summary(cells)), end="")
        return None
    matrix = Matrix.of(arguments)
    for cell in matrix.cells:
        cell.read(matrix.out)
    matrix.check()
    if arguments.dry_run:
        for cell in matrix.missing:
            print(shlex.join(matrix.command(cell)))
        return None
    return Session(matrix, arguments.budget_minutes).run()


def _reported(arguments: argparse.Namespace) -> list[Cell]:
    """The cells that are there, and what is missing between them or of those that are named."""
    there = lra_report.found(arguments.out)
    tasks = _names("--tasks", arguments.tasks, TASKS) or _distinct(c.task for c in there)
    models = _distinct(c.model for c in there)
    if arguments.models is not None:
        models = _names("--models", arguments.models, models)
    seeds = _seeds(arguments.seeds) or sorted(_distinct(c.seed for c in there))
    return _product(tasks, models, seeds)


def _product(tasks: Sequence[str], models: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells, in the order in which they run."""
    return [Cell(t, m, s) for s, m, t in itertools.product(seeds, models, tasks)]


def _names(flag: str, text: str | None, known: Iterable[str]) -> list[str]:
    names = [] if text is None else _distinct(text.split(","))
    for name in names:
        fields.one_of(flag, name, known)
    return names


def _seeds(text: str | None) -> list[int]:
    texts = [] if text is None else text.split(",")
    return _distinct(fields.parse(fields.NonNegative, text, "--seeds") for text in texts)


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The cells of a command line, and how each is started."""

    out: str
    cells: list[Cell]
    size: str
    launcher: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]  # (task or model, flag)
    flags: tuple[str, ...]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Matrix":
        """All cells of the tasks, models and seeds that are asked for.

        Raises:
          ConfigError: a name is unknown, or the launcher cannot be found.
        """
        from spectral_pod.recipes import BASELINES  # imports JAX, which takes seconds

        known = ("spectral", *BASELINES)
        tasks = _names("--tasks", arguments.tasks, TASKS) or list(TASKS)
        models = _names("--models", arguments.models, known) or list(known)
        settings = []
        for text in arguments.set:
            name, colon, setting = text.partition(":")
            if not colon or "=" not in setting:
                raise ConfigError(f"--set={text}: write --set=NAME:FIELD=VALUE")
            fields.one_of("--set", name, [*TASKS, *known])
            settings.append((name, f"--config.{setting}"))
        try:
            launcher = tuple(shlex.split(arguments.launcher))
        except ValueError as error:
            raise ConfigError(f"--launcher={arguments.launcher}: {error}") from error
        if launcher and not shutil.which(launcher[0]):
            raise ConfigError(f"--launcher: there is no command {launcher[0]!r} here")
        return cls(
            out=arguments.out.rstrip("/"),
            cells=_product(tasks, models, _seeds(arguments.seeds) or [0]),
            size=arguments.size,
            launcher=launcher,
            settings=tuple(settings),
            flags=tuple(arguments.flags),
        )

    @property
    def missing(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.is_done]

    def workdir(self, cell: Cell) -> str:
        return f"{self.out}/{cell.name}"

    def trainer_flags(self, cell: Cell) -> list[str]:
        config, *presets = _CONFIGS.get(cell.task, (cell.task,))
        presets += [self.size, cell.model]
        return [
            f"--config=configs/lra_{config}.py:{','.join(presets)}",
            f"--workdir={self.workdir(cell)}",
            f"--config.seed={cell.seed}",
            *(flag for name, flag in self.settings if name in (cell.task, cell.model)),
            *self.flags,
        ]

    def command(self, cell: Cell) -> list[str]:
        trainer = (sys.executable, "-m", "spectral_pod.main")
        return [*(self.launcher or trainer), *self.trainer_flags(cell)]

    def check(self) -> None:
        """Parses and validates the configuration of every cell.

        Raises:
          ConfigError: one is invalid, or a cell's workdir belongs to another one.
        """
        from spectral_pod import command_line
        from spectral_pod.train import starts
        from spectral_pod.validation import validate

        for cell in self.cells:
            try:
                config = command_line.parse_trainer(self.trainer_flags(cell)).config.value
                validate(config)
            except UserError as error:
                raise ConfigError(f"{cell.name}: {error}") from error
            file = epath.Path(self.workdir(cell)) / "config.json"
            if not file.exists():
                continue
            if changed := starts.differences(project_files.RUN.read(file), config, str(file)):
                raise ConfigError(
                    f"{self.workdir(cell)} belongs to a run of another configuration ("
                    + "; ".join(changed)
                    + "); give the flags that it has, or another --out"
                )


class Session:
    """Runs the cells of a matrix that are not done."""

    def __init__(self, matrix: Matrix, budget_minutes: float):
        self.matrix = matrix
        self._deadline = time.monotonic() + 60 * budget_minutes
        self._code = 0  # the worst of the cells
        self._budget_ended = False
        self._without_data: set[str] = set()  # tasks
        # Seconds of cells that are done, by task and model.
        self._seconds = {
            (cell.task, cell.model): cell.facts["seconds"]
            for cell in matrix.cells
            if cell.is_done and cell.facts["seconds"] is not None
        }
        self._logs = pathlib.Path(matrix.out) / "logs"
        if storage.is_remote(matrix.out):
            self._logs = pathlib.Path(tempfile.mkdtemp(prefix="spectral_pod-lra-"))

    def run(self) -> int:
        """Runs them, and prints and writes the tables, whatever happens; returns the exit code."""
        missing = self.matrix.missing
        shell.say(f"{len(self.matrix.cells)} cell(s), {len(missing)} of them to run")
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
        if not self._budget_ended:
            return self._code
        shell.say(f"The budget ended; {len(self.matrix.missing)} cell(s) are not done")
        return exit_codes.worse(Preempted.exit_code, self._code)

    def _run(self, cell: Cell, rest: Sequence[Cell]) -> None:
        """Runs a cell to its end, or to that of the budget."""
        log = self._logs / f"{cell.name}.log"
        position = f"[{len(self.matrix.cells) - len(rest) + 1} of {len(self.matrix.cells)}]"
        shell.say(f"{position} {cell.name}: its output is in {log}")
        with open(log, "ab") as file:
            start = file.tell()
            code = self._wait(cell, rest, position, file)
        cell.read(self.matrix.out)
        if cell.is_done:
            self._seconds[cell.task, cell.model] = cell.facts["seconds"] or 0.0
            shell.say(f"{position} {cell.name}: {cell.facts['accuracy']:.2f}%")
        elif code == 0:
            shell.say(f"{position} {cell.name}: the launcher has ended, and there is no result yet")
        elif not (self._budget_ended and exit_codes.is_curable(code)):
            self._report_failure(cell, code, log, start)

    def _wait(self, cell: Cell, rest: Sequence[Cell], position: str, log: IO[bytes]) -> int:
        """Starts a cell, and returns its exit code."""
        # A session of its own: Ctrl-C in a terminal reaches it only through this tool.
        child = subprocess.Popen(
            self.matrix.command(cell), stdin=subprocess.DEVNULL, stdout=log,
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
            cell.read(self.matrix.out)
            raise
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def _end(self, child: subprocess.Popen[bytes]) -> int:
        """Lets a cell save and end. A launcher may need longer, to delete what it has rented."""
        child.terminate()
        limit = None if self.matrix.launcher else _SAVE_SECONDS
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
        if code == UserError.exit_code and faults and not has_begun:
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
        workdir = self.matrix.workdir(cell)
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
        left += sum(known.get((c.task, c.model), usual) for c in rest[1:])
        return f"{text}; all cells in about {status.duration(left)}"

    def _write_tables(self) -> None:
        summary = lra_report.summary(self.matrix.cells)
        text = lra_report.tables(summary)
        out = epath.Path(self.matrix.out)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
