"""Weeks of a launcher's life, in simulated time: nothing is left that bills, and runs finish."""

import pytest

from tests.launch.simulation import HOUR, Troubles, history
from tools.tpu_pod import options

MIXED = Troubles(
    preempted=9 * HOUR, broken=20 * HOUR, reboot=25 * HOUR, stockout=20 * HOUR, api=6 * HOUR,
    credentials=30 * HOUR, index=8 * HOUR, ssh=4 * HOUR, killed=15 * HOUR,
)  # fmt: skip


def parsed(*flags):
    command = ["--name=tpu", "--zone=us-central2-b", "--type=v4-16", *flags]
    return options.parse([*command, "--", "--config=a.py", "--workdir=gs://bucket/run"])


def check(world, codes):
    said = "\n".join(f"{at / 3600:8.2f} h  {line}" for at, line in world.said[-40:])
    events = "\n".join(f"{at / 3600:8.2f} h  {what}" for at, what in world.events[-20:])
    told = f"{codes}\n{said}\n{events}"
    assert world.request is None or world.request.state in ("FAILED", "SUSPENDED"), told
    assert world.violations == [], told
    return told


@pytest.mark.parametrize("seed", range(200))
def test_a_month(seed):
    """Whatever happens, the run finishes, as somebody starts the launcher again."""
    slices = ("--num_slices=2",) if seed % 3 == 0 else ()
    world, codes = history(seed, MIXED, parsed(*slices))
    told = check(world, codes)
    assert world.complete, told
    assert world.idle < 0.5 * world.billed + 2 * HOUR, told
