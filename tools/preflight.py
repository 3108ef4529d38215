"""Compiles the real training and evaluation steps for a slice, without having one, and reports
whether they fit in memory, what they communicate, and how long a step takes: a lower bound, and for
TPUs and GPUs an estimate with the layers that take most of it. For TPUs it adds up what the
compiler says of each instruction and kernel. Waits for memory are mostly missing from it, and it
has never been compared with a TPU. For GPUs it adds up the launches, at rates measured on one H100.

    python -m tools.preflight --config=configs/lra_listops.py --topology=v4-128
    ... --topology=v5p:8x8x8 --num_slices=2 --config.mesh.fsdp=8 --price_per_chip_hour=4.2
    ... --topology=h100-8 --num_slices=2

Topologies are named as Google Cloud does: v4-N and v5p-N count TensorCores (v4-128 has 64 chips),
v5e-N (v5litepod-N) and v6e-N count chips; v4:4x4x4 gives the shape; cpu-8 is eight fake CPUs.
tpu7x-N counts TensorCores as well, and JAX has a device for each of them: two a chip. Slices that
Google Cloud does not offer are refused.
h100-N, h200-N and a100-N are hosts of N GPUs, --num_slices of them. ICI is NVLink there, and DCN
the network between hosts. JAX's CUDA plugin compiles for them, without a GPU.

--quick compiles the training step alone, for the slice itself: a quarter of the work. Memory and
time of training are then the same, and what was not compiled is reported as unknown.

Exit codes: 0 it fits; 1 it does not, with suggestions; 2 a collective's bytes per chip grow when
the slice and the batch grow together (found by compiling for a second size as well); 3 the
configuration or the topology is invalid.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from spectral_pod.analysis import hardware
from spectral_pod.fields import NonNegativeFloat, Positive

from . import shell

FITS, TOO_BIG, GROWS, INVALID = range(4)


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("preflight", __doc__)
    parser.add_config()
    parser.add_argument(
        "--topology", required=True, help="a slice, such as v4-128, v5e:16x16, h100-8 or cpu-8"
    )
    parser.add_value(
        "--num_slices", Positive, 1, "such slices or hosts, joined by DCN along mesh.data (1)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="no evaluation step, and no second size of slice"
    )
    parser.add_output("--json", "write the report to this file as well")
    parser.add_output("--hlo", "write the compiled training step here")
    parser.add_value(
        "--price_per_chip_hour", NonNegativeFloat, None, "adds the cost of the whole run"
    )
    return shell.run(parser, preflight, argv, failure=INVALID)


def preflight(arguments: argparse.Namespace) -> int:
    topology = hardware.parse(arguments.topology, arguments.num_slices)
    hardware.prepare(topology)
    from . import compiled_step, preflight_report  # which import JAX

    names = ("train",) if arguments.quick else compiled_step.STEPS
    setup = compiled_step.set_up(arguments.config, topology, names)
    mesh = preflight_report.axes(setup.mesh.shape)
    shell.say(f"{topology}: {topology.num_chips} chips, mesh {mesh}")
    neighbour = None if arguments.quick else compiled_step.neighbour(setup)
    if neighbour is None:
        (compiled,), other = compiled_step.compile_all([setup], shell.say), None
    else:
        other_setup = compiled_step.set_up(*neighbour)
        compiled, other_compiled = compiled_step.compile_all([setup, other_setup], shell.say)
        other = other_setup, other_compiled
    on_tpus = topology.chip.platform == "tpu" and compiled["train"].text
    schedules = compiled_step.schedules(setup, shell.say) if on_tpus else {}
    report = preflight_report.make(setup, compiled, schedules, other, arguments.price_per_chip_hour)
    for path, text in (
        (arguments.json, json.dumps(report.data, indent=1) + "\n"),
        (arguments.hlo, compiled["train"].text),
    ):
        if path:
            shell.write(path, text)
    print(report.text)
    if not report.data["fits"]:
        return TOO_BIG
    return GROWS if report.grows else FITS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
