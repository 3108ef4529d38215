"""The watchdog may report a stall as soon as it is started."""

import pytest

from spectral_pod.errors import StorageError
from spectral_pod.train import loop, watchdog
from spectral_pod.train.watchdog import Watchdog
from tests import trainer


class Stalled(Exception):
    pass


def test_a_stall_before_the_first_step_is_reported(tmp_path, monkeypatch):
    def stall(watchdog):
        watchdog._report({"stall/process_0": "stacks"})
        raise Stalled

    monkeypatch.setattr(Watchdog, "__enter__", stall)
    c = trainer.get_config()
    c.data.dir = str(trainer.home() / "data")
    with pytest.raises(Stalled):
        loop.run(c, str(tmp_path))
    assert trainer.event_points(tmp_path)["train", "stall/process_0"] == {0: "stacks"}


@pytest.mark.parametrize("fault", ["folder", "report"])
def test_stacks_that_cannot_be_stored_are_printed(tmp_path, caplog, fault):
    if fault == "folder":
        (tmp_path / "stalls").write_text("a file")

    def report(texts):
        if fault == "report":
            raise StorageError("the disk is full")

    dog = Watchdog(str(tmp_path), factor=1.0, seconds=9.0, report=report)
    dog._write("stacks of all threads")
    assert "stacks of all threads" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("waits", "ends"), [([1] * 5, True), ([1, 1, 1000, 1, 1], False)])
def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path, monkeypatch, waits, ends):
    """The watchdog's own thread cannot have slept for longer than it asked to."""
    clock, ended, waits = [0.0], [], [*waits]

    def wait(_):
        clock[0] += waits.pop(0) if waits else 0.0
        return not waits

    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog.runtime, "broadcast", lambda *_: None)
    dog = Watchdog(str(tmp_path), factor=1.0, seconds=3.5, report=lambda _: None)
    dog.beat()
    dog.beat()
    monkeypatch.setattr(dog._closed, "wait", wait)
    monkeypatch.setattr(dog, "_end", ended.append)
    dog._watch()
    assert bool(ended) == ends
