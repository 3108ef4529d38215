"""Compiles the real training and evaluation step for a slice, on a machine without one, and says
whether it fits, what it communicates, and how long a step must take at least.

    python -m tools.preflight --config=configs/lra_listops.py --topology=v4-128
    ... --topology=v5p:8x8x8 --num_slices=2 --config.mesh.fsdp=8 --price_per_chip_hour=4.2

Topologies are named as Google Cloud does: v4-N and v5p-N count TensorCores (v4-128 has 64 chips),
v5e-N (v5litepod-N) and v6e-N count chips; v4:4x4x4 gives the shape; cpu-8 is eight fake CPUs.

Exit codes: 0 it fits; 1 it doesn't, and what to change; 2 a collective's bytes per chip grow when
the slice and the batch grow together (found by compiling for another size, too); 3 the
configuration or the topology is invalid.
"""

import json
import logging
import sys

from absl import app, flags
from ml_collections import config_flags

from spectral_pod import command_line
from spectral_pod.analysis import hardware
from spectral_pod.errors import ConfigError, UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "A slice, such as v4-128, v5e:16x16 or cpu-8.")
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Such slices, joined by DCN along mesh.data.")
_JSON = flags.DEFINE_string("json", None, "Write the report to this file, too.")
_HLO = flags.DEFINE_string("hlo", None, "Write the compiled training step to this file.")
_PRICE = flags.DEFINE_float("price_per_chip_hour", None, "Adds what the whole run costs at least.")
flags.mark_flags_as_required(["config", "topology"])

FITS, TOO_BIG, GROWS, INVALID = range(4)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}; every option starts with --")
    topology = hardware.parse(_TOPOLOGY.value or "", _NUM_SLICES.value)
    hardware.prepare(topology)
    from tools import compiled_step, preflight_report  # which import JAX

    setup = compiled_step.set_up(_CONFIG.value, topology)
    say(f"{topology}: {topology.num_chips} chips, mesh {preflight_report.axes(setup.mesh.shape)}")
    neighbour = compiled_step.neighbour(setup)
    if neighbour is None:
        (compiled,), other = compiled_step.compile_all([setup], say), None
    else:
        other_setup = compiled_step.set_up(*neighbour)
        compiled, other_compiled = compiled_step.compile_all([setup, other_setup], say)
        other = other_setup, other_compiled
    report = preflight_report.make(setup, compiled, other, _PRICE.value)
    for path, text in (
        (_JSON.value, json.dumps(report.data, indent=1) + "\n"),
        (_HLO.value, compiled["train"].text),
    ):
        if path:
            with open(path, "w") as file:
                file.write(text)
    print(report.text)
    if not report.data["fits"]:
        return TOO_BIG
    return GROWS if report.grows else FITS


def say(line: str) -> None:
    """Progress goes to stderr: the report is all that is on stdout."""
    sys.stderr.write(f"{line}\n")  # in one piece: compilations report from their own threads
    sys.stderr.flush()


def run() -> None:
    """Runs `main`; an error that the user can cure is one message and exit code 3."""
    logging.getLogger().setLevel(logging.WARNING)
    try:
        app.run(main, flags_parser=command_line.parser(_CONFIG))
    except (UserError, OSError) as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(INVALID)


if __name__ == "__main__":
    run()
