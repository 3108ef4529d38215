"""The watchdog may report a stall as soon as it is started."""

import pytest

from spectral_pod.train import loop, writers
from spectral_pod.train.watchdog import Watchdog
from tests import trainer


class Stalled(Exception):
    pass


def test_a_stall_before_the_first_step_is_reported(tmp_path, monkeypatch):
    def stall(watchdog):
        watchdog._report({"stall/process_0": "stacks"})
        raise Stalled

    monkeypatch.setattr(Watchdog, "__enter__", stall)
    monkeypatch.setattr(writers, "_open_events", writers._TensorBoardWriter)  # no TensorFlow
    c = trainer.get_config()
    c.data.dir = str(trainer.home() / "data")
    with pytest.raises(Stalled):
        loop.run(c, str(tmp_path))
    assert trainer.event_points(tmp_path)["stall/process_0"] == {0: "stacks"}
