"""Goodput over several starts of a run, and what it says of a start."""

import types

import pytest

from spectral_pod import project_files
from spectral_pod.data.tasks.listops import ListOps
from spectral_pod.train import goodput, loop, starts, trainer
from spectral_pod.train.goodput import Goodput, Stopwatch
from tests import trainer as runs


class Clock:
    """Both clocks of a process that started 20 s ago; they only move when told to."""

    def __init__(self, monkeypatch, now):
        self.now = now
        process = types.SimpleNamespace(create_time=lambda: now - 20)
        monkeypatch.setattr(goodput, "psutil", types.SimpleNamespace(Process=lambda: process))
        monkeypatch.setattr(goodput, "time", types.SimpleNamespace(time=lambda: self.now))
        self.stopwatch = Stopwatch(lambda: self.now)

    def spend(self, seconds, phase=None):
        if phase is None:
            self.now += seconds
        else:
            with self.stopwatch.time(phase):
                self.now += seconds


def test_goodput_is_the_fraction_of_time_spent_in_steps(monkeypatch):
    clock = Clock(monkeypatch, 920.0)
    clock.spend(10)
    clock.spend(20, "compile")
    clock.spend(50, "step")
    line = Goodput({}, clock.stopwatch).scalars() | {"wall_time": clock.now, "train/loss": 1.0}
    assert line["goodput/fraction"] == pytest.approx(0.5)
    assert line["goodput/start_seconds"] == pytest.approx(20.0)
    assert line["goodput/other_seconds"] == pytest.approx(10.0)

    # That line is the last one kept; 40 s later another process continues from it.
    clock = Clock(monkeypatch, clock.now + 60)
    second = Goodput(line, clock.stopwatch)
    clock.spend(70, "step")
    clock.spend(10)
    later = second.scalars()
    assert later["goodput/restart_seconds"] == pytest.approx(40.0)
    assert later["goodput/start_seconds"] == pytest.approx(40.0)
    assert later["goodput/step_seconds"] == pytest.approx(120.0)
    assert later["goodput/other_seconds"] == pytest.approx(20.0)
    assert later["goodput/fraction"] == pytest.approx(120 / 240)
    seconds = [x for name, x in later.items() if name.endswith("_seconds")]
    assert sum(seconds) == pytest.approx(240.0)

    # A run that had ended was not waiting to be continued.
    later = Goodput(line, clock.stopwatch, ended=True).scalars()
    assert not later.get("goodput/restart_seconds")
    assert sum(x for name, x in later.items() if name.endswith("_seconds")) == pytest.approx(200.0)


def test_whether_a_run_had_ended(tmp_path):
    assert not starts.has_ended(str(tmp_path), 3)
    result = {"step": 3, "eval": {"split": "test", "loss": 1.0, "records": 1}}
    project_files.RESULT.write(tmp_path / "result.json", result)
    assert starts.has_ended(str(tmp_path), 3)
    assert not starts.has_ended(str(tmp_path), 4)
    (tmp_path / "result.json").write_text('{"step": 3, "ev')  # damaged: no reason not to continue
    assert not starts.has_ended(str(tmp_path), 3)


def slowed(call, clock, seconds):
    def slow(*args, **options):
        clock.now += seconds
        return call(*args, **options)

    return slow


def test_whatever_takes_long_at_a_start_has_a_name(tmp_path, monkeypatch):
    """By a clock that only moves in what is made slow here; so nothing is left for `other`."""
    clock = Clock(monkeypatch, 1e9)
    monkeypatch.setattr(loop, "Stopwatch", lambda: clock.stopwatch)
    slow = [
        (ListOps, "build", 1000, "data_preparation"),
        (starts, "facts", 1, "start"),
        (starts, "claim_workdir", 2, "setup"),
        (trainer, "init_state", 4, "setup"),
        (trainer, "Progress", 8, "setup"),
        (trainer, "jit_train_step", 500, "compile"),
        (trainer, "evaluate", 50, "eval"),
        (trainer.MetricWriter, "flush", 25, "checkpoint"),
    ]
    expected = {"start": 20.0}
    for place, name, seconds, phase in slow:
        expected[phase] = expected.get(phase, 0.0) + seconds

        monkeypatch.setattr(place, name, slowed(getattr(place, name), clock, seconds))
    config = runs.config(train__total_steps=4, train__eval_every_steps=2)
    config.data.dir, config.checkpoint.every_steps = str(tmp_path / "data"), 2
    loop.run(config, str(tmp_path / "run"))
    lines = runs.metrics(tmp_path / "run")

    def found(line):
        return {
            name.removeprefix("goodput/").removesuffix("_seconds"): seconds
            for name, seconds in line.items()
            if name.startswith("goodput/") and name.endswith("_seconds") and seconds
        }

    # The last line of training is written before the second validation and the second checkpoint,
    of_training = [line for line in lines if "train/loss" in line][-1]
    assert (of_training["step"], found(of_training)) == (4, pytest.approx(expected))
    # and that of the test split after both.
    of_test = [line for line in lines if "test/loss" in line][-1]
    assert found(of_test) == pytest.approx(expected | {"eval": 150.0, "checkpoint": 50.0})
