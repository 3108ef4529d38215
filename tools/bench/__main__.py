"""Benchmarks: python -m tools.bench NAME [--json=FILE]

    python -m tools.bench ops --filter='delta|causal' --repeats=15
    python -m tools.bench ops --peers=DIR/bin/python     compared with PyTorch (tools/peers)
    python -m tools.bench data --big=10                  a store of 10 GB, and its peak memory
    python -m tools.bench kernels --topology=v5e:2x2     compiled schedules, without a TPU
    python -m tools.bench gpu --peers=python             what a GPU has to show, in minutes

Prints a row for each case and the ratios of interest, with their targets. Ratios compare medians of
interleaved repetitions of one run: they are reproducible on a shared machine, the milliseconds are
not. On CPUs the process is pinned to one core and the clock is CPU time, except for data and
checkpoint, which wait for I/O; on accelerators the clock is wall time.

The report of --json holds {"machine": {...}, "ratios": {name: x}, "rows": [...]}. It is written
after every group, so a run that is ended leaves what it has measured.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive, PositiveFloat

from .. import shell

BENCHMARKS = ("ops", "step", "generate", "agent", "data", "checkpoint", "kernels", "gpu")


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("bench", __doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_output("--json", "write the report to this file as well")
    parser.add_argument(
        "--filter", type=_regex, metavar="REGEX", default="", help="run the matching groups"
    )
    parser.add_value("--repeats", Positive, None, "of every case (9)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_value("--cores", Positive, 1, "to use, on CPUs (1)")
    parser.add_value("--big", PositiveFloat, None, "data only: write and read so many GB instead")
    parser.add_argument("--topology", help="kernels only: the slice to compile for")
    parser.add_place(
        "--peers", local=True, metavar="PYTHON", help="interpreter with the peers' packages"
    )
    return shell.run(parser, benchmark, argv)


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"--filter is {text!r}, which is no regular expression: {error}"
        ) from error
    return text


def benchmark(options: argparse.Namespace) -> None:
    if options.big:
        from . import big

        if options.benchmark != "data":
            raise ConfigError(f"--big is of the benchmark data, not {options.benchmark}")
        return big.measure(options.big)
    if (options.benchmark == "kernels") != bool(options.topology):
        raise ConfigError("--topology is of the benchmark kernels, which needs it")
    if options.topology:
        from . import kernels

        return kernels.measure(options.topology, options.json, options.quick)
    # JAX is imported after the pinning: it sizes its thread pools when it starts.
    from . import machine

    machine.pin(options.cores)
    import jax

    from spectral_pod.parallel import runtime

    from . import timing
    from .peers import Peers
    from .settings import Settings

    runtime.initialize(None, 1, 0)
    module = importlib.import_module(f".{options.benchmark}", __package__)
    clock: timing.Clock = getattr(module, "CLOCK", "cpu")
    if jax.default_backend() != "cpu":
        machine.unpin()
        clock = "wall"
    with contextlib.ExitStack() as stack:
        peers = Peers(options.peers, threads=options.cores) if options.peers else None
        if peers:
            stack.callback(peers.close)
        facts: dict[str, Any] = machine.describe() | {"clock": clock, "quick": options.quick}
        facts["peers"] = peers.versions if peers else {}

        def keep(report: timing.Report) -> None:
            if options.json:
                rows = [dataclasses.asdict(row) for row in report.rows]
                found = {"machine": facts, "ratios": report.ratios, "rows": rows}
                shell.write(options.json, json.dumps(found, indent=1) + "\n")

        report = timing.measure(
            module.groups(Settings(options.quick, peers, stack)),
            repeats=options.repeats or (2 if options.quick else 9),
            clock=clock,
            only=options.filter,
            say=shell.say,
            compilers=getattr(module, "COMPILERS", 1),
            keep=keep,
        )
    print(timing.table(report.rows, clock))
    print(f"\n{timing.ratio_lines(report, verdicts=not options.quick)}")
    print(f"\n{', '.join(f'{name} {value}' for name, value in facts.items())}")
    if options.quick:
        print("--quick: sizes are cut down and the ratios mean nothing")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
