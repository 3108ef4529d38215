"""Goodput over several starts of a run."""

import time

import pytest

from spectral_pod.train.progress import Goodput


def test_goodput_is_the_fraction_of_time_spent_in_steps(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    first = Goodput({}, started=900.0)
    first.add("compile", 30.0)
    first.add("step", 50.0)
    line = first.scalars() | {"wall_time": now, "step": 10, "train/loss": 1.0}
    assert line["goodput/fraction"] == pytest.approx(0.5)
    assert line["goodput/other_seconds"] == pytest.approx(20.0)

    # The line of step 10 is the last one kept; 40 s later another process continues from it.
    now = 1140.0
    second = Goodput(line, started=1040.0)
    second.add("step", 70.0)
    later = second.scalars()
    assert later["goodput/restart_seconds"] == pytest.approx(40.0)
    assert later["goodput/step_seconds"] == pytest.approx(120.0)
    assert later["goodput/other_seconds"] == pytest.approx(50.0)
    assert later["goodput/fraction"] == pytest.approx(120 / 240)
    seconds = [x for name, x in later.items() if name.endswith("_seconds")]
    assert sum(seconds) == pytest.approx(240.0)
