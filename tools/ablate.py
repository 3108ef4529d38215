"""Measures what fields of a configuration do: variants x seeds, with a table and plots.

    python -m tools.ablate --config=configs/lra_listops.py:short --out=DIR --seeds=0,1,2 \\
        --variants=base,stride_4,noise,stride_4+noise
    python -m tools.ablate --config=FILE --out=DIR --levers=gate,memory   the levers of two groups
    python -m tools.ablate --config=FILE --out=DIR --variants=base,wide \\
        --lever=wide:model.hidden_dim=128 --lever=wide:model.embed_dim=128
    python -m tools.ablate --out=DIR --report

A variant is the configuration with one lever pulled, or several joined by +. Levers have names in
tools/levers.py, by groups; --lever=NAME:FIELD=VALUE makes another one. The first variant is what
the others are compared with. Differences are taken seed by seed; one that is less than twice its
standard error is marked as within error, which a few seeds estimate only roughly.

A cell is one run of the trainer: a variant and a seed, in the workdir DIR/VARIANT-SEED, with its
output in DIR/logs. All of the first seed run before those of the next, --jobs of them at a time.
The same command continues: a cell with a result is done, and one that was interrupted goes on where
it was saved. Unless the flags after -- say otherwise cells are evaluated on the validation split,
so that no choice between variants has seen the test split.

Fields for all cells follow --, as in `-- --config.train.total_steps=3000`; those of levers override
them. Fields of one variant are --set=VARIANT:FIELD=VALUE, as in
--set=stride_4:train.total_steps=11000 for the same time.

stdout has the table, which is also in DIR/table.md and DIR/table.json; DIR/accuracy.png and
DIR/curves.png are plots of it and of the evaluations during training. Ctrl-C, SIGTERM and the end
of the budget let the running cells save. Exits as tools.lra does.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from spectral_pod.errors import ConfigError

from . import ablate_report, levers, shell, study
from .ablate_report import Cell


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("ablate", __doc__)
    help = "a file in configs/"
    parser.add_argument("--config", dest="base", metavar="FILE[:PRESET]", help=help)
    parser.add_argument("--variants", metavar="A,A+B", help="levers, alone and joined by +")
    groups = ",".join(levers.LEVERS)
    parser.add_argument("--levers", metavar="GROUP,GROUP", help=f"base and all of: {groups}")
    help = "a lever of your own"
    parser.add_argument(
        "--lever", action="append", default=[], metavar="NAME:FIELD=VALUE", help=help
    )
    help = "a field of one variant"
    parser.add_argument(
        "--set", action="append", default=[], metavar="VARIANT:FIELD=VALUE", help=help
    )
    study.add_flags(parser)
    return shell.run(parser, _main, argv)


def _main(arguments: argparse.Namespace) -> int | None:
    return study.run(arguments, Ablation.found, Ablation.of)


@dataclasses.dataclass(kw_only=True)
class Ablation(study.Study[Cell]):
    """The variants and seeds of a command line.

    Attributes:
      config: --config's value.
      own: levers of the command line.
      settings: (variant, flag), of --set.
    """

    config: str = ""
    own: dict[str, levers.Fields] = dataclasses.field(default_factory=dict)
    settings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Ablation":
        """All cells that are asked for.

        Raises:
          ConfigError: a variant is unknown, or there is none.
        """
        if not arguments.base:
            raise ConfigError("give --config=FILE, whose fields the variants change")
        own = levers.parse(arguments.lever)
        variants = levers.of_groups(arguments.levers.split(",")) if arguments.levers else []
        variants = study.distinct([*variants, *_variants(arguments)])
        if not variants:
            raise ConfigError("give --variants=base,..., or --levers=GROUP; --help lists groups")
        for variant in variants:
            levers.fields_of(variant, own)
        return cls(
            out=arguments.out.rstrip("/"),
            cells=_product(variants, study.seeds(arguments.seeds) or [0]),
            launcher=study.launcher(arguments.launcher),
            flags=tuple(arguments.flags),
            config=arguments.base,
            own=own,
            settings=tuple(study.setting(text, variants) for text in arguments.set),
        )

    @classmethod
    def found(cls, arguments: argparse.Namespace) -> "Ablation":
        """The cells that are there, of the variants that are named or of all."""
        there = ablate_report.found(arguments.out)
        variants = _variants(arguments) or study.distinct(cell.variant for cell in there)
        seeds = study.seeds(arguments.seeds) or sorted(study.distinct(c.seed for c in there))
        return cls(out=arguments.out.rstrip("/"), cells=_product(variants, seeds))

    def base_flags(self, cell: Cell) -> list[str]:
        return [f"--config={self.config}", "--config.train.eval_split=validation"]

    def cell_flags(self, cell: Cell) -> list[str]:
        fields = levers.fields_of(cell.variant, self.own)
        return [
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *(flag for variant, flag in self.settings if variant == cell.variant),
        ]

    def summary(self) -> dict[str, Any]:
        return ablate_report.summary(self.cells)

    def tables(self, summary: dict[str, Any]) -> str:
        return ablate_report.tables(summary)

    def pictures(self, summary: dict[str, Any]) -> dict[str, bytes]:
        return ablate_report.pictures(summary)


def _product(variants: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells, in the order in which they run."""
    return [Cell(v, seed=s) for s, v in itertools.product(seeds, variants)]


def _variants(arguments: argparse.Namespace) -> list[str]:
    return arguments.variants.split(",") if arguments.variants else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
