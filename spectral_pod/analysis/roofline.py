"""A roofline model: lower bounds on a step's time from FLOPs, memory traffic and collectives."""

import dataclasses
from collections.abc import Iterable

from spectral_pod.analysis.hardware import Chip
from spectral_pod.analysis.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds on the duration of a step, in seconds, each for one resource alone."""

    compute_s: float
    memory_s: float
    network_s: float
    step_s: float  # the largest of the three, as if everything overlapped
    mfu_ceiling: float  # analytic FLOPs divided by the chip's peak in `step_s`


def roofline(
    *,
    matrix_work: float,
    traffic: float,
    collectives: Iterable[Collective],
    analytic_flops: float,
    chip: Chip,
) -> Roofline:
    """The bounds for one chip, from the chip's peak figures.

    Args:
      matrix_work: FLOPs of the compiled step, weighted by passes (`hlo_cost.matrix_work`).
      traffic: bytes read from and written to HBM (`hlo_cost.traffic`).
      collectives: those of the step.
      analytic_flops: the chip's share of the step's model FLOPs.
      chip: peak figures. Every collective is assumed to use all ICI links, and the chips of a host
        to share its DCN bandwidth evenly.
    """
    ici = dcn = 0.0
    for one in collectives:
        if one.link == "DCN":
            dcn += one.count * one.sent / one.sharers
        else:
            ici += one.count * one.sent
    per_host = chip.chips_per_host * chip.devices
    network_s = ici / chip.ici_bandwidth + dcn * per_host / chip.dcn_bandwidth
    compute_s, memory_s = matrix_work / chip.peak_flops, traffic / chip.hbm_bandwidth
    step_s = max(compute_s, memory_s, network_s)
    ceiling = analytic_flops / (chip.peak_flops * step_s) if step_s else 0.0
    return Roofline(compute_s, memory_s, network_s, step_s, ceiling)
