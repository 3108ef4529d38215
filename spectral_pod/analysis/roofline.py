"""How long a step must take at least, from what it computes, moves and communicates."""

import dataclasses
from collections.abc import Iterable

from spectral_pod.analysis.hardware import Chip
from spectral_pod.analysis.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds on the seconds of a step, each as if nothing else took time."""

    compute_s: float
    memory_s: float
    network_s: float
    step_s: float  # the largest of the three: everything overlaps
    mfu_ceiling: float  # analytic FLOPs over what the matrix units could do in `step_s`


def roofline(
    *,
    matrix_work: float,
    traffic: float,
    collectives: Iterable[Collective],
    analytic_flops: float,
    chip: Chip,
) -> Roofline:
    """The bounds for one chip, at the chip's peak figures.

    Args:
      matrix_work: FLOPs of the compiled step, counted by passes (`hlo_cost.matrix_work`).
      traffic: bytes to and from HBM (`hlo_cost.traffic`).
      collectives: of the step.
      analytic_flops: model FLOPs of the step, the chip's share.
      chip: peak figures. All ICI links are taken to carry every collective, and the chips of a
        host to share its DCN bandwidth evenly.
    """
    ici = dcn = 0.0
    for one in collectives:
        if one.link == "DCN":
            dcn += one.count * one.sent
        else:
            ici += one.count * one.sent
    network_s = ici / chip.ici_bandwidth + dcn * chip.chips_per_host / chip.dcn_bandwidth
    compute_s, memory_s = matrix_work / chip.peak_flops, traffic / chip.hbm_bandwidth
    step_s = max(compute_s, memory_s, network_s)
    ceiling = analytic_flops / (chip.peak_flops * step_s) if step_s else 0.0
    return Roofline(compute_s, memory_s, network_s, step_s, ceiling)
