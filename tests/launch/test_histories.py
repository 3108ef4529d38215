"""Weeks of a launcher's life, in simulated time: nothing is left that bills, and runs finish."""

import dataclasses

import pytest

from tests.launch.histories import HOUR, MIXED, check, history, options

SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 40 else []) for seed in range(200)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_finishes_whatever_happens(seed):
    """As long as somebody starts the launcher again, and logs in again."""
    slices = ("--num_slices=2",) if seed % 3 == 0 else ()
    world, codes = history(seed, MIXED, options(*slices))
    told = check(world, codes)
    assert world.complete, told
    assert world.idle < 0.2 * world.billed + 2 * HOUR, told


@pytest.mark.parametrize("seed", SEEDS)
def test_what_cannot_go_on_ends_with_its_message(seed):
    """Bugs, Ctrl-C, somebody who deletes the node, a limit on the life of a slice."""
    troubles = dataclasses.replace(MIXED, bug=0.5, by_hand=60 * HOUR, interrupted=30 * HOUR)
    world, codes = history(seed, troubles, options("--max_run_hours=30"))
    told = check(world, codes)
    said = " ".join(line for _, line in world.said)
    if not world.complete:
        expected = {
            "somebody deleted": world.user_deleted,
            "ended with 3 (the numbers went bad)": world.bug_at is not None,
            "ended with 75": True,
            "its guard did": True,
            "could not be installed": True,
            "has not answered": True,
            "does not answer, and may train, for": True,
        }
        assert any(text in said and cause for text, cause in expected.items()), told


def test_nobody_returns():
    """The launcher is killed soon, and that was all: the slice ends itself."""
    troubles = dataclasses.replace(MIXED, killed=3 * HOUR)
    for seed in range(20):
        world, codes = history(seed, troubles, options(), starts=1)
        check(world, codes)


def test_faults_of_the_launcher_would_be_seen():
    """Without a guard, slices stay behind; a launcher that deletes too much is noticed."""
    troubles = dataclasses.replace(MIXED, killed=5 * HOUR)
    worlds = [history(seed, troubles, options("--keep"), starts=1)[0] for seed in range(9)]
    left = [world for world in worlds if world.active()]
    with pytest.raises(AssertionError):
        check(left[0], [])
    world, _ = history(0, MIXED, options(), work=HOUR)
    world.violations.append("deleted what trains")
    with pytest.raises(AssertionError, match="deleted what trains"):
        check(world, [])
