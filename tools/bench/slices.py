"""What a config takes on several slices: a table of `tools.preflight --quick`, in Markdown.

    python -m tools.bench.slices --configs=configs/lm_pod.py:125m,configs/lm_pod.py:1b \\
        --topologies=v4-128,v5e-256 --prices=v4=3.22,v5e=1.2 [-- --config.model.remat=dots]

The training step is compiled for each slice, one after the other, in minutes each; what was
compiled before is not compiled again. What follows `--` is for every preflight. Prices are of a
chip and hour, by generation; the cost is that of reading 100 GB of text, by the estimate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from spectral_pod import fields
from spectral_pod.analysis import hardware
from spectral_pod.errors import ConfigError
from spectral_pod.fields import PositiveFloat

from .. import preflight, shell

_TEXT = 100e9  # bytes
_COLUMNS = (
    "config", "slice", "chips", "mesh", "HBM used", "at least", "about", "MFU at most", "MFU about",
    "bytes/s", "100 GB",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("bench.slices", __doc__)
    parser.add_argument(
        "--configs", required=True, metavar="A,B", help="config files, with presets"
    )
    parser.add_argument("--topologies", required=True, metavar="A,B", help="slices")
    parser.add_argument("--prices", default="", metavar="v4=X,v5e=Y", help="of a chip and hour")
    parser.add_argument("flags", nargs="*", help="for every preflight, after --")
    return shell.run(parser, table, argv)


def table(arguments: argparse.Namespace) -> None:
    prices = _prices(arguments.prices)
    names = arguments.topologies.split(",")
    for name in names:
        hardware.parse(name)
    print("| " + " | ".join(_COLUMNS) + " |\n|" + "---|" * len(_COLUMNS))
    for config in arguments.configs.split(","):
        for name in names:
            report = _report(config, name, arguments.flags)
            row = _row(report, prices.get(hardware.parse(name).chip.family))
            print("| " + " | ".join([os.path.basename(config), name, *row]) + " |", flush=True)


def _prices(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    for family, _, _ in pairs:
        fields.one_of("--prices", family, hardware.CHIPS)
    return {family: fields.parse(PositiveFloat, x, "--prices") for family, _, x in pairs}


def _report(config: str, topology: str, flags: Sequence[str]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable, "-m", preflight.__name__, "--quick", f"--config={config}",
            f"--topology={topology}", f"--json={file.name}", *flags,
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=None, text=True, check=False)
        if done.returncode not in (preflight.FITS, preflight.TOO_BIG):
            raise ConfigError(f"preflight of {config} on {topology} ended with {done.returncode}")
        found: dict[str, Any] = json.load(file)
    return found


def _row(report: dict[str, Any], price: float | None) -> list[str]:
    """The cells of a row from `chips` on; what is unknown is a question mark."""
    hbm, bound, expected = report["hbm"], report["roofline"], report["estimate"]
    mesh = " ".join(f"{axis}={n}" for axis, n in report["mesh"].items() if n > 1)
    memory = "?" if hbm["headroom"] is None else f"{1 - hbm['headroom'] / hbm['capacity']:.0%}"
    cells = [str(report["chips"]), mesh, memory if report["fits"] else f"{memory}, does not fit"]
    if bound["step_s"] is None:
        return cells + ["?"] * (len(_COLUMNS) - 2 - len(cells))
    tokens = report["tokens_per_second"] * bound["step_s"]
    cells += [f"{bound['step_s']:.3g} s"]
    if expected["step_s"] is None:
        return [*cells, "?", f"{bound['mfu_ceiling']:.1%}", "?", "?", "?"]
    rate = tokens / expected["step_s"]
    hours = _TEXT / rate / 3600
    mfu = bound["mfu_ceiling"] * bound["step_s"] / expected["step_s"]
    return [
        *cells, f"{expected['step_s']:.3g} s", f"{bound['mfu_ceiling']:.1%}", f"{mfu:.1%}",
        f"{rate:,.0f}", "?" if price is None else f"${hours * report['chips'] * price:,.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
