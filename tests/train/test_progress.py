"""What is logged of the steps since the last line: their means, their speed and where time went."""

import functools
import json
import types

import jax
import numpy as np
import pytest
from clu.metrics import Collection
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_pod.objectives import Classification
from spectral_pod.parallel.mesh import make_mesh
from spectral_pod.train import progress
from spectral_pod.train.goodput import Stopwatch
from tests import trainer

DISPATCH, DEVICE, DATA = 0.5, 10.0, 2.0  # seconds of every step


class Machine:
    """Runs steps by a clock of its own: the device computes one after the other, while the host
    goes on until it reads what is computed."""

    def __init__(self, monkeypatch, first_step=0, window=(), **fields):
        self.now, self.ready = 1000.0, 0.0
        self.lines = []
        config = trainer.get_config()
        config.train.log_every_steps, config.checkpoint.every_steps = 4, 1000
        config.update_from_flattened_dict(fields)
        mesh = make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}, jax.devices()[:1])
        writer = types.SimpleNamespace(
            last_line={}, scalars=lambda step, x: self.lines.append({"step": step} | x)
        )
        monkeypatch.setattr(progress.system, "usage", lambda *_: {})
        self.stopwatch = Stopwatch(lambda: self.now)
        monkeypatch.setattr(progress.jax, "device_get", self.read)
        self.progress = progress.Progress(
            config, "", mesh, None, types.SimpleNamespace(objective=Classification), writer,
            first_step, window, self.stopwatch,
        )  # fmt: skip
        self.progress.restart_timers(first_step)
        self.step = first_step

    def read(self, metrics):
        ready, values = metrics
        self.now = max(self.now, ready)
        return values

    def run(self, to):
        while self.step < to:
            self.step += 1
            with self.stopwatch.time("data"):
                self.now += DATA
            with self.progress.time_step():
                self.now += DISPATCH
                self.ready = max(self.ready, self.now) + DEVICE
                self.progress.add(self.step, (self.ready, metrics(self.step)))

    def elsewhere(self, phase, seconds):
        self.progress.flush_pending()
        with self.stopwatch.time(phase):
            self.now += seconds


@functools.cache
def metrics(step, rows=5, bad=None):
    rng = np.random.default_rng(step)
    averages = Collection.create(**Classification.training_metrics).single_from_model_output(
        loss=rng.normal(3, 1, rows).astype(np.float32),
        correct=(rng.random(rows) < 0.3).astype(np.float32),
        mask=np.arange(rows) < 1 + step % rows,
    )
    scalars = {"grad_norm/all": np.float32(1 / step)} | ({} if bad is None else {"bad_steps": bad})
    return jax.tree.map(np.asarray, averages), scalars


def test_every_logged_speed_is_that_of_the_device(monkeypatch):
    machine = Machine(monkeypatch)
    machine.run(21)
    _, second, *others = machine.lines
    assert [line["step"] for line in machine.lines] == [1, 4, 8, 12, 16, 20]
    # The device waits for the second batch, as the first step is read at once.
    expected = 3 / (DATA + DISPATCH + 3 * DEVICE)
    assert second["speed/steps_per_second"] == pytest.approx(expected)
    assert all(x["speed/steps_per_second"] == pytest.approx(1 / DEVICE) for x in others)


@pytest.mark.parametrize("data", [0.1, 100.0])
@pytest.mark.parametrize("device", [0.1, 10.0])
def test_the_first_line_is_of_the_first_step_alone(monkeypatch, data, device):
    """Nothing before it counts, such as compilation, and nothing that is done for the second."""
    monkeypatch.setattr(f"{__name__}.DATA", data)
    monkeypatch.setattr(f"{__name__}.DEVICE", device)
    machine = Machine(monkeypatch, **{"train.log_every_steps": 100})
    restarts = []
    monkeypatch.setattr(progress.system, "restart", lambda: restarts.append(machine.now))
    with machine.stopwatch.time("compile"):
        machine.now += 500
    machine.now += 50
    machine.progress.restart_timers(0)
    machine.run(3)
    (first,) = machine.lines
    time = data + DISPATCH + device
    assert first["step"] == 1
    assert not [name for name in first if name.startswith("speed/")]
    assert machine.progress.bytes_per_second() == pytest.approx(8 * 256 / time)
    assert first["time_share/data"] == pytest.approx(data / time)
    assert first["time_share/step"] == pytest.approx((DISPATCH + device) / time)
    assert {name for name in first if name.startswith("time_share/")} == {
        "time_share/data", "time_share/step",
    }  # fmt: skip
    assert restarts == [1550]  # from which the use of processors is counted
    assert not [name for name in first if name.startswith("host/")]  # there is no step before
    assert first["goodput/compile_seconds"] == pytest.approx(500)
    assert first["goodput/step_seconds"] == pytest.approx(DISPATCH + device)
    averages, scalars = metrics(1)
    assert first["train/loss"] == float(averages.compute()["loss"])
    assert first["train/accuracy"] == float(averages.compute()["accuracy"])
    assert first["grad_norm/all"] == scalars["grad_norm/all"]


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(["eval", "checkpoint"]), st.floats(0, 1e4)),
        max_size=5,
    )
)
@settings(max_examples=15, deadline=None)
def test_shares_of_time_are_shares(stretches):
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch)
        for steps, phase, seconds in stretches:
            machine.run(machine.step + steps)
            machine.elsewhere(phase, seconds)
            with machine.stopwatch.time("eval"), machine.stopwatch.time("sample"):  # one within
                machine.now += 3
        machine.run(machine.step + 9)
        machine.progress.flush_pending()
    assert machine.lines
    for line in machine.lines:
        shares = [x for name, x in line.items() if name.startswith("time_share/")]
        assert all(0 <= share <= 1 for share in shares)
        assert sum(shares) == pytest.approx(1)  # as nothing here is outside of the phases
        assert 0 <= line["goodput/fraction"] <= 1


@given(log_every=st.sampled_from([1, 3, 7, 50]), stops=st.sets(st.integers(0, 15), max_size=6))
@settings(max_examples=20, deadline=None)
def test_lines_of_a_run_that_stopped_anywhere_are_the_same(log_every, stops):
    fields = {"train.log_every_steps": log_every}
    with pytest.MonkeyPatch.context() as patch:
        whole = Machine(patch, **fields)
        whole.run(16)
        whole.progress.flush_pending()
        lines, step, window = [], 0, {}
        for stop in [*sorted(stops), 16]:
            part = Machine(patch, step, window, **fields)
            part.run(stop)
            part.progress.flush_pending()
            window = json.loads(json.dumps(part.progress.window()))
            step = stop
            lines += part.lines

    def points(lines):
        return [{k: x for k, x in p.items() if not trainer.is_timing(k)} for p in lines]

    assert points(lines) == points(whole.lines)


def test_a_bad_step_after_a_stop_does_not_lose_the_steps_before(monkeypatch):
    monkeypatch.setattr(progress, "print_once", lambda line: None)

    def run(machine, steps, bad):
        for step in steps:
            machine.progress.add(step, (0.0, metrics(step, bad=int(step == bad))))
        machine.progress.flush_pending()

    fields = {"train.on_bad_step": "skip"}
    whole, before = Machine(monkeypatch, **fields), Machine(monkeypatch, **fields)
    run(whole, range(1, 5), bad=3)
    run(before, range(1, 3), bad=3)
    after = Machine(monkeypatch, 2, before.progress.window(), **fields)
    run(after, range(3, 5), bad=3)
    assert after.lines[-1]["train/loss"] == whole.lines[-1]["train/loss"]
    # Two of three: what only the last step holds is another mean.
    assert after.lines[-1]["train/loss"] != float(metrics(4)[0].compute()["loss"])


@pytest.mark.parametrize(
    "window", [{"of_another_version/total": [1.0]}, {"loss/total": [1.0]}, {"loss/total": []}]
)
def test_a_window_of_other_metrics_is_left_out(monkeypatch, window):
    machine = Machine(monkeypatch, 2, window)
    machine.run(5)
    assert machine.lines[-1]["step"] == 4
