"""Trains models on the tasks of the Long Range Arena, and tables their accuracies.

    python -m tools.lra --out=DIR --size=cpu --tasks=listops,pathfinder --models=spectral,s5
    python -m tools.lra --out=DIR --size=full --seeds=0,1,2 --budget_minutes=600 \\
        --set=text:data.options.train=train.jsonl --set=text:data.options.test=test.jsonl
    python -m tools.lra --out=DIR --report

A cell is one run of the trainer: a task, a model and a seed, in the workdir DIR/TASK-MODEL-SEED,
with its output in DIR/logs. Cells run in this order: all of the first seed before those of the
next, and of a seed all tasks of a model before those of the next, so that whole rows are there
first; --jobs of them run at a time. The same command continues: a cell with a result is done, and
one that was interrupted goes on where it was saved.

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
budget let the running cells save. Exits with 0 if every cell is done, or left to a launcher; 78 if
the budget ended before; 130 after Ctrl-C; and otherwise with the code of the worst cell, as the
trainer has them (spectral_pod/errors.py).
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from spectral_pod import fields

from . import lra_report, shell, study
from .lra_report import TASKS, Cell

_CONFIGS = {"path_x": ("pathfinder", "path_x")}  # a config and a preset; others have their own


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("lra", __doc__)
    every = ",".join(TASKS)
    parser.add_argument("--tasks", metavar="A,B", help=f"default: {every}")
    parser.add_argument("--models", metavar="A,B", help="presets; default: all")
    parser.add_argument("--size", choices=("cpu", "full"), default="full", help="preset (full)")
    help = "a field for the cells of a task or model"
    parser.add_argument("--set", action="append", default=[], metavar="NAME:FIELD=VALUE", help=help)
    study.add_flags(parser)
    return shell.run(parser, _main, argv)


def _main(arguments: argparse.Namespace) -> int | None:
    return study.run(arguments, Matrix.found, Matrix.of)


def _product(tasks: Sequence[str], models: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells, in the order in which they run."""
    return [Cell(t, m, seed=s) for s, m, t in itertools.product(seeds, models, tasks)]


def _names(flag: str, text: str | None, known: Iterable[str]) -> list[str]:
    names = [] if text is None else study.distinct(text.split(","))
    for name in names:
        fields.one_of(flag, name, known)
    return names


@dataclasses.dataclass(kw_only=True)
class Matrix(study.Study[Cell]):
    """The cells of a command line, and how each is started."""

    size: str = "full"
    settings: tuple[tuple[str, str], ...] = ()  # (task or model, flag)

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
        return cls(
            out=arguments.out.rstrip("/"),
            cells=_product(tasks, models, study.seeds(arguments.seeds) or [0]),
            size=arguments.size,
            launcher=study.launcher(arguments.launcher),
            settings=tuple(study.setting(text, [*TASKS, *known]) for text in arguments.set),
            flags=tuple(arguments.flags),
        )

    @classmethod
    def found(cls, arguments: argparse.Namespace) -> "Matrix":
        """The cells that are there, and what is missing between them or of those that are named."""
        there = lra_report.found(arguments.out)
        tasks = _names("--tasks", arguments.tasks, TASKS) or study.distinct(c.task for c in there)
        models = study.distinct(c.model for c in there)
        if arguments.models is not None:
            models = _names("--models", arguments.models, models)
        seeds = study.seeds(arguments.seeds) or sorted(study.distinct(c.seed for c in there))
        return cls(out=arguments.out, cells=_product(tasks, models, seeds))

    def base_flags(self, cell: Cell) -> list[str]:
        config, *presets = _CONFIGS.get(cell.task, (cell.task,))
        presets += [self.size, cell.model]
        return [f"--config=configs/lra_{config}.py:{','.join(presets)}"]

    def cell_flags(self, cell: Cell) -> list[str]:
        return [flag for name, flag in self.settings if name in cell.kind]

    def summary(self) -> dict[str, Any]:
        return lra_report.summary(self.cells)

    def tables(self, summary: dict[str, Any]) -> str:
        return lra_report.tables(summary)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
