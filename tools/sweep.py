"""Searches the best values of fields of a configuration, with Optuna.

    python -m tools.sweep --config=configs/lra_listops.py:short --out=DIR --trials=20 --jobs=2 \\
        --vary=optimizer.learning_rate=1e-4..1e-2:log --vary=model.num_layers=2,4,6 \\
        -- --config.train.total_steps=2000
    python -m tools.sweep --out=DIR --report

--vary=FIELD=SPACE, repeatable, is what is searched: A,B,C are choices, LOW..HIGH is a range, of
whole numbers if both ends are, and LOW..HIGH:log one of orders of magnitude. Without any the space
is learning rate, width, number of layers, width of the channel mixer and dropout. Fields for all
trials follow --.

A trial is one run of the trainer, in the workdir DIR/trial-NUMBER, with its output in DIR/logs. It
is ranked on the validation split at its end, by the metric that ranks checkpoints. Values are
proposed by Optuna's TPE sampler, and a trial is pruned at an evaluation where it is worse than the
median of those before it (--pruner=none: never). A trial whose numbers go bad counts as pruned, and
one whose configuration is invalid as failed.

Several workers, on one machine (--jobs) or on several with the same --out, a folder or a gs:// URL,
share what they know. The same command continues what was interrupted: whoever comes next resumes
the trials whose workers have ended where they were saved. --trials counts those of all workers.

stdout has a table, which is also in DIR/table.md and as DIR/table.json; DIR/history.png and
DIR/importance.png are plots; DIR/best.py is the best trial's configuration: --config=DIR/best.py.
Ctrl-C, SIGTERM and the end of --budget_minutes let the running trials save. Exits with 0 when all
trials have ended or are those of other workers; 78 if the budget ended before; 130 after Ctrl-C; 2
if no trial has a result.
"""

import argparse
import math
import sys
from collections.abc import Sequence

from spectral_pod import fields, storage
from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive, PositiveFloat

from . import shell


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("sweep", __doc__)
    help = "a file in configs/"
    parser.add_argument("--config", dest="base", metavar="FILE[:PRESET]", help=help)
    parser.add_place("--out", required=True, metavar="DIR", help="a folder or a gs:// URL")
    help = "a field and its values"
    parser.add_argument("--vary", action="append", default=[], metavar="FIELD=SPACE", help=help)
    parser.add_value("--trials", Positive, 20, "of all workers together (20)")
    parser.add_value("--jobs", Positive, 1, "trials at a time, each on its share of the cores (1)")
    parser.add_argument("--pruner", choices=("median", "none"), default="median", help="(median)")
    parser.add_value("--seed", fields.NonNegative, 0, "of the sampler (0)")
    parser.add_value("--budget_minutes", PositiveFloat, math.inf, "stop after this time")
    parser.add_argument("--report", action="store_true", help="print the table of what is there")
    parser.add_argument("flags", nargs="*", help="of the trainer, for every trial, after --")
    return shell.run(parser, _main, argv)


def _main(arguments: argparse.Namespace) -> int | None:
    from . import sweep_report, sweep_worker  # import Optuna, which takes a second

    storage.check_access(arguments.out, write=not arguments.report)
    out = arguments.out.rstrip("/")
    if arguments.report:
        print(sweep_report.table(sweep_worker.existing(out)), end="")
        return None
    if not arguments.base:
        raise ConfigError("give --config=FILE, whose fields are varied")
    return sweep_worker.Worker(arguments, out).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
