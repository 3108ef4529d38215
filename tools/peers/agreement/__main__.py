"""Does our code agree with the published programs of the same methods and data?

    python -m venv DIR && DIR/bin/pip install -r requirements.txt -r tools/peers/requirements.txt
    DIR/bin/python -m tools.peers.agreement --fla=FOLDER --s5=FOLDER --zoology=FOLDER --lra=FOLDER

Each FOLDER is a checkout of a peer's repository, whose own files are run beside ours:

    --fla      fla-org/flash-linear-attention: its tests of the delta rule and of the gated delta
               rule, with their inputs and tolerances. Our functions stand in for its GPU kernels,
               and the expected results and gradients are those of its own naive recurrences.
    --s5       lindermanlab/S5: for every recipe the initial state space, and with equal parameters
               the outputs and gradients of one layer.
    --zoology  HazyResearch/zoology: sequences of multi-query associative recall.
    --lra      google-research/long-range-arena: the expressions of ListOps, and the program's own
               values of our expressions.

Random draws are compared by the largest distance of their distribution functions; the tolerance is
what equal distributions exceed with a probability of 1e-4 (Kolmogorov-Smirnov). Takes about ten
minutes on two idle cores, most of it for --fla.

stdout is a table in Markdown. The exit code is 0 if all agree, and 2 if one does not or is missing.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from tools import shell
from tools.peers.agreement import delta_rule, listops, mqar, s5
from tools.peers.agreement.rows import Row

PEERS = {
    "fla": ("flash-linear-attention", delta_rule.compare),
    "s5": ("S5", s5.compare),
    "zoology": ("Zoology", mqar.compare),
    "lra": ("LRA ListOps", listops.compare),
}


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    for flag, (peer, compare) in PEERS.items():
        folder = getattr(options, flag)
        if folder is None:
            yield Row(peer, "", verdict=f"missing: no --{flag}=FOLDER")
            continue
        try:
            yield from compare(Path(folder).absolute())
        except (FileNotFoundError, ModuleNotFoundError) as error:
            yield Row(peer, "", verdict=f"missing: {error}")


def _compare(options: argparse.Namespace) -> int:
    jax.config.update("jax_platforms", "cpu")  # whose float32 products are of float32
    print("| peer | compared | cases | worst | difference | tolerance | |")
    print("|---|---|---|---|---|---|---|")
    failed = False
    for row in _rows(options):
        print(row.line(), flush=True)
        failed |= row.failed
    return 2 if failed else 0


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("peers.agreement", __doc__)
    for flag, (peer, _) in PEERS.items():
        parser.add_argument(f"--{flag}", metavar="FOLDER", help=f"a checkout of {peer}")
    return shell.run(parser, _compare, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
