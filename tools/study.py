"""Studies: runs of the trainer that differ in a few fields and in their seeds.

`tools.lra` and `tools.ablate` say what the cells of a study are; here is what they share: the
command line, how a cell is started, and what is known of its run.
"""

import abc
import argparse
import dataclasses
import math
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from etils import epath

from spectral_pod import fields, project_files, storage
from spectral_pod.errors import ConfigError, DataError, UserError
from spectral_pod.fields import Positive, PositiveFloat

from . import shell

# Neither JAX nor TensorFlow is imported here, directly or indirectly: they take seconds.

_MEMORY = ("device_memory_peak_gb", "host_memory_gb")  # the first that a run has recorded
_SPEED, _VALIDATION = "speed/steps_per_second", "validation/accuracy"


@dataclasses.dataclass(kw_only=True)
class Cell(abc.ABC):
    """One run: something that varies, and a seed.

    Attributes:
      state: "done", or why there is no figure: "step 350 of 700", "not run", "failed (1)".
      facts: of a run that is done: what `read` finds.
    """

    seed: int
    state: str = "not run"
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    @abc.abstractmethod
    def kind(self) -> tuple[str, ...]:
        """What it is apart from its seed; cells of a kind take the same time."""

    @property
    @abc.abstractmethod
    def data(self) -> str:
        """The name of its data; cells without data are left out together."""

    @property
    def name(self) -> str:
        """Of its workdir."""
        return "-".join((*self.kind, str(self.seed)))

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    def read(self, out: str) -> None:
        """Sets `state` and `facts` from the cell's workdir.

        Raises:
          DataError: a file there is damaged.
        """
        folder = epath.Path(out) / self.name
        self.state, self.facts = "not run", {}
        if (folder / "result.json").exists():
            self.state = "done"
            self.facts = facts(project_files.RESULT.read(folder / "result.json"), folder)
        elif (folder / "config.json").exists():
            log = project_files.Log(folder / "metrics.jsonl", project_files.METRICS)
            step = max((line["step"] for line in log.lines), default=0)
            self.state = f"step {step:,.0f} of {config(folder)['train']['total_steps']:,}"


def config(folder: epath.Path) -> Any:
    """The configuration of a run."""
    return project_files.RUN.read(folder / "config.json")["config"]


def facts(result: Any, folder: epath.Path) -> dict[str, Any]:
    """Of a result: accuracy in percent, memory in GB, time in seconds; None where not recorded.

    `memory` is the peak of a device, or without that (on CPUs) the highest of the process's memory
    whenever metrics were written; `memory_of` says which. `metrics` are all numbers of the
    evaluation, `training` is the last accuracy of training, `curve` has pairs of step and accuracy
    of the evaluations during it, and `notes` say what makes the accuracy another one than the
    published.
    """
    evaluation = result["eval"]
    if "accuracy" not in evaluation:
        raise DataError(f"{folder}/result.json has no accuracy; delete it to evaluate again")
    log = project_files.Log(folder / "metrics.jsonl", project_files.METRICS)
    memory = {
        name: max(line[f"system/{name}"] for line in log.lines if f"system/{name}" in line)
        for name in _MEMORY
        if any(f"system/{name}" in line for line in log.lines)
    }
    kind = next(iter(memory), None)
    training = [line["train/accuracy"] for line in log.lines if "train/accuracy" in line]
    speeds = [line[_SPEED] for line in log.lines if _SPEED in line]
    return {
        "split": evaluation["split"],
        "accuracy": 100 * evaluation["accuracy"],
        "metrics": {k: x for k, x in evaluation.items() if isinstance(x, int | float)},
        "training": 100 * training[-1] if training else None,
        "curve": [
            (line["step"], 100 * line[_VALIDATION]) for line in log.lines if _VALIDATION in line
        ],
        "ladder": result.get("ladder"),
        "parameters": result.get("num_params"),
        "steps": result["step"],
        "milliseconds": 1e3 / statistics.median(speeds) if speeds else None,  # a step
        "bytes_per_second": result.get("bytes_per_second"),
        "memory": memory.get(kind) if kind else None,
        "memory_of": kind and kind.partition("_")[0],
        "seconds": result.get("wall_seconds"),
        "notes": ["process-supervised"]
        if result.get("supervision", "answers") != "answers"
        else [],
    }


C = TypeVar("C", bound=Cell)


@dataclasses.dataclass(kw_only=True)
class Study(abc.ABC, Generic[C]):
    """The cells of a command line, and how each is started.

    Attributes:
      launcher: a command that is given the flags of a cell, in place of the trainer.
      flags: of the trainer, for every cell.
    """

    out: str
    cells: list[C]
    launcher: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @abc.abstractmethod
    def base_flags(self, cell: C) -> list[str]:
        """--config, and flags that those of all cells override."""

    @abc.abstractmethod
    def cell_flags(self, cell: C) -> list[str]:
        """What distinguishes a cell, but for its seed: flags that override all others."""

    @abc.abstractmethod
    def summary(self) -> dict[str, Any]:
        """Everything that the tables show, as JSON."""

    @abc.abstractmethod
    def tables(self, summary: dict[str, Any]) -> str:
        """The Markdown of a `summary`."""

    def pictures(self, summary: dict[str, Any]) -> dict[str, bytes]:
        """Plots of a `summary`, PNGs by the name of their file."""
        return {}

    def workdir(self, cell: C) -> str:
        return f"{self.out}/{cell.name}"

    def trainer_flags(self, cell: C) -> list[str]:
        file, *rest = self.base_flags(cell)
        places = (f"--workdir={self.workdir(cell)}", f"--config.seed={cell.seed}")
        return [file, *places, *rest, *self.flags, *self.cell_flags(cell)]

    def command(self, cell: C) -> list[str]:
        trainer = (sys.executable, "-m", "spectral_pod.main")
        return [*(self.launcher or trainer), *self.trainer_flags(cell)]

    def read(self) -> None:
        """Reads the state of every cell."""
        for cell in self.cells:
            cell.read(self.out)

    def check(self) -> None:
        """Parses and validates the configuration of every cell.

        Raises:
          ConfigError: one is invalid, or a cell's workdir belongs to another one.
        """
        from spectral_pod import command_line  # imports JAX, which takes seconds
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


def add_flags(parser: shell.Parser) -> None:
    """Adds the flags that all studies have."""
    parser.add_place("--out", required=True, metavar="DIR", help="a folder or a gs:// URL")
    parser.add_argument("--seeds", metavar="0,1", help="default: 0")
    help = "stop after this time; what runs is saved"
    parser.add_value("--budget_minutes", PositiveFloat, math.inf, help)
    parser.add_value("--jobs", Positive, 1, "cells at a time, each on its share of the CPU's cores")
    parser.add_argument("--launcher", default="", metavar="COMMAND", help="starts each cell")
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there")
    parser.add_argument("flags", nargs="*", help="of the trainer, for every cell, after --")


def run(
    arguments: argparse.Namespace,
    found: Callable[[argparse.Namespace], Study[Any]],
    made: Callable[[argparse.Namespace], Study[Any]],
) -> int | None:
    """Reports on a study, or prints its commands, or runs it; returns the exit code.

    Args:
      found: what --report shows: the cells that are there.
      made: the study that the flags ask for.
    """
    from .session import Session

    storage.check_access(arguments.out, write=not (arguments.report or arguments.dry_run))
    if arguments.report:
        study = found(arguments)
        study.read()
        print(study.tables(study.summary()), end="")
        return None
    study = made(arguments)
    study.read()
    study.check()
    if arguments.dry_run:
        for cell in study.cells:
            if not cell.is_done:
                print(shlex.join(study.command(cell)))
        return None
    return Session(study, budget_minutes=arguments.budget_minutes, jobs=arguments.jobs).run()


def launcher(command: str) -> tuple[str, ...]:
    """The words of --launcher.

    Raises:
      ConfigError: it cannot be parsed or found.
    """
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise ConfigError(f"--launcher={command}: {error}") from error
    if words and not shutil.which(words[0]):
        raise ConfigError(f"--launcher: there is no command {words[0]!r} here")
    return words


def seeds(text: str | None) -> list[int]:
    """The value of --seeds; empty if it is not given."""
    texts = [] if text is None else text.split(",")
    return distinct(fields.parse(fields.NonNegative, text, "--seeds") for text in texts)


def setting(text: str, names: Iterable[str]) -> tuple[str, str]:
    """The name and the trainer's flag of --set=NAME:FIELD=VALUE.

    Raises:
      ConfigError: it is written otherwise, or the name is not among `names`.
    """
    name, colon, assignment = text.partition(":")
    if not colon or "=" not in assignment:
        raise ConfigError(f"--set={text}: write --set=NAME:FIELD=VALUE")
    fields.one_of("--set", name, names)
    return name, f"--config.{assignment}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; None for a single value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def table(rows: Sequence[Sequence[str]]) -> str:
    """The Markdown of a table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def missing(cells: Iterable[Any]) -> str:
    """The Markdown that says which of a summary's cells have no result, and why."""
    lines = [f"- {c['name']}: {c['state']}" for c in cells if c["state"] != "done"]
    return "\n".join(["Cells without a result:", "", *lines]) if lines else ""


def count(value: float | None) -> str:
    return "—" if value is None else f"{value:,.0f}"


def memory(figures: dict[str, Any]) -> str:
    """The memory of `facts`, or of their summary."""
    if figures["memory"] is None:
        return "—"
    return f"{figures['memory']:.2f} GB ({figures['memory_of']})"


def distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
