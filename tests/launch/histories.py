"""Runs of the launcher from their first start to their end, in the world of simulation.py.

python -m tests.launch.histories    # prints what became of 200 of them
"""

import contextlib
import io

from launch.tpu_pod import checks
from launch.tpu_pod.cloud import Cloud
from launch.tpu_pod.launcher import Launcher
from launch.tpu_pod.options import parse
from launch.tpu_pod.phases import End
from spectral_pod.errors import ConfigError
from tests.launch.simulation import BROKEN, DAY, HOUR, MINUTE, Killed, Troubles, World

MIXED = Troubles(
    preempted=9 * HOUR, broken=20 * HOUR, reboot=25 * HOUR, stockout=20 * HOUR, api=6 * HOUR,
    credentials=30 * HOUR, index=8 * HOUR, ssh=4 * HOUR, killed=15 * HOUR, deaf=60 * HOUR,
)  # fmt: skip


def options(*flags):
    command = ["--name=tpu", "--zone=us-central2-b", "--type=v4-16", *flags]
    return parse([*command, "--", "--config=configs/quickstart.py", "--workdir=gs://bucket/run"])


def check(world, codes):
    """Nothing bills any more, and nothing that trained was deleted; what happened, as a text."""
    said = "\n".join(f"{at / 3600:8.2f} h  {line}" for at, line in world.said[-40:])
    events = "\n".join(f"{at / 3600:8.2f} h  {what}" for at, what in world.events[-20:])
    told = f"{codes} {world.violations}\n{said}\n{events}"
    assert world.request is None or world.request.state in ("FAILED", "SUSPENDED"), told
    assert world.violations == [], told
    return told


class FixedCode:
    """The code of a run, which does not change."""

    revision, changes = "1", ()

    @contextlib.contextmanager
    def archive(self):
        yield "/tmp/archive"


def launch(world):
    """One start of the launcher: its exit code, or None if it was killed or interrupted."""
    cloud, code = Cloud(world.options, world), FixedCode()
    world.killed_at = next((at for at in world.kills if at > world.t), float("inf"))
    world.interrupt_at = next((at for at in world.interrupts if at > world.t), float("inf"))
    launcher = Launcher(world.options, cloud, world, code)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            checks.before_renting(world.options, cloud, world, code)
            try:
                return launcher.up()
            except End as end:
                world.say(str(end))
                return end.code
            finally:
                launcher.leave()
    except ConfigError as error:
        world.say(str(error))
        return 2
    except (Killed, KeyboardInterrupt):
        return None


def history(seed, troubles, options, work=20 * HOUR, starts=60):
    """A run whose user starts the launcher again whenever it is gone, until the run has ended.

    Returns:
      The world at the end, a day after the last launcher, and the exit codes of the launchers.
    """
    world, codes = World(seed, troubles, options, work), []
    while len(codes) < starts:
        code = launch(world)
        codes.append(code)
        if code is not None and (world.complete or not _again(world)):
            break
        world.advance(world.rng.expovariate(1 / (20 * MINUTE)))
        while world.t in world.no_credentials:  # as they say that one is to log in first
            world.advance(HOUR)
    world.killed_at = float("inf")
    world.advance(2 * DAY)
    return world, codes


def _again(world):
    """Whether a user would start the same command again after reading the last message."""
    last = " ".join(line for _, line in world.said[-3:])
    passing = ("UNAVAILABLE", "auth tokens", "could not be installed", "has not answered",
               "no TPUs within", "its guard did")  # fmt: skip
    return any(text in last for text in passing) and not world.user_deleted


def table():
    """What became of 200 histories, as a table in Markdown."""
    worlds = []
    for seed in range(200):
        slices = ("--num_slices=2",) if seed % 3 == 0 else ()
        world, codes = history(seed, MIXED, options(*slices))
        check(world, codes)
        worlds.append((world, codes))

    def count(kind):
        return sum(kind in what for world, _ in worlds for _, what in world.events)

    rows = [
        ("histories", len(worlds)),
        ("runs that finished", sum(world.complete for world, _ in worlds)),
        ("requests that were left, billed or waiting", sum(w.active() for w, _ in worlds)),
        ("slices deleted while their run could go on", sum(len(w.violations) for w, _ in worlds)),
        ("requests made", sum(world.creations for world, _ in worlds)),
        ("preemptions", count("preempted")),
        ("nodes that broke", sum(count(s) for s in BROKEN)),
        ("workers rebooted", count("rebooted")),
        ("workers out for good", count("out for good")),
        ("launchers killed", sum(codes.count(None) for _, codes in worlds)),
        ("slices that deleted themselves", count("by guard")),
        ("hours from start to end, median", f"{_median(w.finished / HOUR for w, _ in worlds):.1f}"),
        ("share of the billed time in which nothing trained",
         f"{sum(w.idle for w, _ in worlds) / sum(w.billed for w, _ in worlds):.1%}"),
    ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _median(values):
    return sorted(values)[100]


if __name__ == "__main__":
    print(table())
