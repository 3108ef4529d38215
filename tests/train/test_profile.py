"""Traces: which steps they hold, and how they are requested."""

import os
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from spectral_pod.train import profile
from tests import trainer
from tests.storage.conftest import bucket, server  # noqa: F401


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch):
    monkeypatch.setattr(profile, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(profile, "_POLL_SECONDS_REMOTE", 0.01)
    monkeypatch.setattr(profile, "_KEPT_POLLS", 0)


@pytest.fixture
def run(tmp_path):
    """Runs steps under a profiler, then closes it; returns {name of a trace: its steps}."""

    def run(steps, planned=(), before=lambda step, profiler: None):
        work = jax.jit(lambda x: jnp.sin(x @ x).sum())
        profiler = profile.Profiler(str(tmp_path), planned, 0)
        for step in steps:
            before(step, profiler)
            with profiler.step(step):
                work(jnp.ones((8, 8))).block_until_ready()
        profiler.close()
        return traces(tmp_path)

    return run


def traces(workdir):
    files = sorted((workdir / "plugins" / "profile").glob("*/*.xplane.pb"))
    return {file.parent.name: steps_of(file) for file in files}


def steps_of(file):
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    return [dict(event.stats)["step_num"] for event in events if event.name == "train"]


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("steps", "traced"),
    [
        (range(1, 9), [3, 4, 5]),
        (range(4, 9), [4, 5]),  # a run that resumes within the window
        (range(1, 5), [3, 4]),  # one that ends within it
        (range(6, 9), []),
    ],
)
def test_planned_steps(run, steps, traced):
    assert run(steps, planned=(3, 5)) == ({"steps_3-5": traced} if traced else {})


def test_each_request_is_taken_once(run, tmp_path):
    request = tmp_path / "PROFILE"

    def ask(step, profiler):
        if step in (2, 20):
            before = len(traces(tmp_path))
            request.touch()
            os.utime(request, (1e9 + step, 1e9 + step))
            until(lambda: not request.exists())  # process 0 has deleted it
            assert len(traces(tmp_path)) == before
        if step == 10:  # while the first is being stored
            until(lambda: len(traces(tmp_path)) == 1)

    found = run(range(1, 30), before=ask)
    assert found == {
        "2001_09_09_01_46_42": [2, 3, 4, 5, 6],
        "2001_09_09_01_47_00": [20, 21, 22, 23, 24],
    }


def test_other_processes_leave_the_request(tmp_path, monkeypatch):
    looks, modified = [], profile.storage.modified
    monkeypatch.setattr(
        profile.storage, "modified", lambda file: looks.append(file) or modified(file)
    )
    (tmp_path / "PROFILE").touch()
    profiler = profile.Profiler(str(tmp_path), (), 1)
    until(lambda: len(looks) > 3)
    for step in range(1, 20):
        with profiler.step(step):
            pass
    profiler.close()
    assert (tmp_path / "PROFILE").exists()
    assert list(traces(tmp_path).values()) == [[1, 2, 3, 4, 5]]


def test_a_trace_that_cannot_start_is_a_warning(run, tmp_path, caplog):
    with jax.profiler.trace(str(tmp_path / "other")):
        assert run(range(1, 9), planned=(3, 5)) == {}
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "no trace steps_3-5" in warning.getMessage()


def test_a_trace_that_cannot_be_stored_is_a_warning(run, tmp_path, caplog):
    (tmp_path / "plugins").write_text("in the way")
    assert run(range(1, 9), planned=(3, 5)) == {}
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "steps_3-5" in warning.getMessage()
    assert "is lost" in warning.getMessage()


IN_STORAGE = """
import sys, time
from etils import epath
from spectral_pod.train import profile

profile._POLL_SECONDS_REMOTE, profile._KEPT_POLLS = 0.05, 0
request = epath.Path(sys.argv[1]) / "PROFILE"
profiler = profile.Profiler(sys.argv[1], (), 0)
while request.exists():
    time.sleep(0.01)
for step in range(1, 9):
    with profiler.step(step):
        pass
profiler.close()
"""


def test_a_request_in_storage(server, bucket, tmp_path):  # noqa: F811
    bucket.write("runs/a/PROFILE", b"")
    command = [sys.executable, "-c", IN_STORAGE, f"{bucket.url}/runs/a"]
    trainer.run(server.used_by(command))
    (steps,) = traces(bucket.download("runs/a", tmp_path)).values()
    assert steps == [1, 2, 3, 4, 5]
    assert "runs/a/PROFILE" not in bucket.names()
