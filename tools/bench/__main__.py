"""Benchmarks: python -m tools.bench ops|step|generate|data|checkpoint [--json=FILE]

    python -m tools.bench ops --filter='delta|causal' --repeats=15
    python -m tools.bench ops --peers=DIR/bin/python     with PyTorch's side (tools/peers)
    python -m tools.bench data --big=10                  a store of 10 GB, and the memory it takes

Prints a row for each side of every comparison and the ratios that are worth following, with their
targets. Ratios compare medians of repetitions that took turns in this run; they hold on a machine
that others share, the milliseconds don't. On CPUs the process keeps to one core and the clock is
its CPU time, but for data and checkpoints, which wait; on accelerators it is wall time.

The report of --json holds {"machine": {...}, "ratios": {name: x}, "rows": [...]}.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
from typing import Any

from spectral_pod.errors import UserError
from tools.bench.errors import BenchError

BENCHMARKS = ("ops", "step", "generate", "data", "checkpoint")


def main(options: argparse.Namespace) -> None:
    if options.big:
        from tools.bench import big

        if options.benchmark != "data":
            raise BenchError(f"--big is of the benchmark data, not {options.benchmark}")
        return big.measure(options.big)
    # Imports of JAX wait for the pinning: it sizes its thread pools when it starts.
    from tools.bench import machine

    machine.pin(options.cores)
    import jax

    from spectral_pod.parallel import runtime
    from tools.bench import timing
    from tools.bench.peers import Peers
    from tools.bench.settings import Settings

    runtime.initialize(None, 1, 0)
    benchmark = importlib.import_module(f"tools.bench.{options.benchmark}")
    clock: timing.Clock = getattr(benchmark, "CLOCK", "cpu")
    if jax.default_backend() != "cpu":
        machine.unpin()
        clock = "wall"
    with contextlib.ExitStack() as stack:
        peers = Peers(options.peers, threads=options.cores) if options.peers else None
        if peers:
            stack.callback(peers.close)
        report = timing.measure(
            benchmark.groups(Settings(options.quick, peers, stack)),
            repeats=options.repeats or (2 if options.quick else 9),
            clock=clock,
            only=options.filter,
            say=timing.progress,
        )
    facts: dict[str, Any] = machine.describe() | {"clock": clock, "quick": options.quick}
    facts["peers"] = peers.versions if peers else {}
    print(timing.table(report.rows, clock))
    print(f"\n{timing.ratio_lines(report, verdicts=not options.quick)}")
    print(f"\n{', '.join(f'{name} {value}' for name, value in facts.items())}")
    if options.quick:
        print("--quick: sizes are cut down and the ratios mean nothing")
    if options.json:
        rows = [dataclasses.asdict(row) for row in report.rows]
        with open(options.json, "w") as file:
            json.dump({"machine": facts, "ratios": report.ratios, "rows": rows}, file, indent=1)
            file.write("\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--json", metavar="FILE", help="write the report there, too")
    parser.add_argument("--filter", metavar="REGEX", default="", help="of groups of rows to run")
    parser.add_argument("--repeats", type=int, metavar="N", help="of every case; 9 by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--cores", type=int, default=1, metavar="N", help="on CPUs; 1 by default")
    parser.add_argument("--big", type=float, metavar="GB", help="of data: only write and read it")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter with the peers' packages")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(_parse())
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
