"""Makes traces, which models of conversations are trained on, from logs of tool calls.

    python -m tools.traces LOG.jsonl --out=TRACES.jsonl

A log has one JSON object with the list `messages` a line, as chat programs write it, with
`tool_calls` and results of the role `tool`; `spectral_pod/agent/traces.py` says what becomes of
each message. A conversation that cannot be converted is left out, and stderr says which and why.
"""

import argparse
import sys
from collections.abc import Sequence

from spectral_pod.agent import traces
from spectral_pod.errors import DataError

from . import shell


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("traces", __doc__)
    parser.add_place("log", local=True, metavar="LOG", help="a file of lines, or .json")
    parser.add_output("--out", "the file of traces to write", required=True)
    return shell.run(parser, convert, argv)


def convert(arguments: argparse.Namespace) -> None:
    lines, left_out = [], 0
    for one in traces.convert(arguments.log):
        if one.fault:
            shell.say(f"{one.place}: {'' if one.trace else 'left out: '}{one.fault}")
        if one.trace:
            lines.append(traces.to_line(one.trace))
        else:
            left_out += 1
    if not lines:
        raise DataError(f"{arguments.log} has no conversation that can be converted")
    shell.write(arguments.out, "".join(lines))
    shell.say(f"{len(lines)} conversations written to {arguments.out}; {left_out} left out")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
