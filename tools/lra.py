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
TFDS, Retrieval from a substitute, unless their options name files (see configs/lra_text.py); a task
without data says so, and its other cells are left out.

--launcher=COMMAND gives each cell's flags to a launcher, in place of `python -m spectral_pod.main`:

    --launcher="sbatch --wait launch/slurm.sh"
    --launcher="launch/tpu_pod.sh --name=lra --zone=ZONE --type=v5e-8 --" --out=gs://BUCKET/DIR

One that returns before its run ends, such as sbatch without --wait, is given all cells at once, and
must be given none of them again before they end; --report shows how far they are.

stdout has the tables, and DIR/table.md and DIR/table.json. Ctrl-C, SIGTERM and the end of the
budget let the running cell save. Exits with 0 if every cell is done, or left to a launcher; 78 if
the budget ended before; 130 after Ctrl-C; and otherwise with the code of the worst cell, as the
trainer has them (spectral_pod/errors.py).
"""

import argparse
import dataclasses
import itertools
import math
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from spectral_pod import fields, project_files, storage
from spectral_pod.errors import ConfigError, UserError
from spectral_pod.fields import PositiveFloat

from . import lra_report, shell
from .lra_report import TASKS, Cell
from .lra_session import Session

_CONFIGS = {"path_x": ("pathfinder", "path_x")}  # a config and a preset; others have their own


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
        for cell in matrix.cells:
            if not cell.is_done:
                print(shlex.join(matrix.command(cell)))
        return None
    return Session(
        matrix.out, matrix.cells, matrix.command,
        budget_minutes=arguments.budget_minutes, waits=bool(matrix.launcher),
    ).run()  # fmt: skip


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
