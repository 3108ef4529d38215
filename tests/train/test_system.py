"""The resource usage of a run."""

import json
import os
import shutil
import sys

from spectral_pod.train import system
from tests import trainer


class Device:
    """The memory statistics of a jax.Device."""

    def __init__(self, **stats):
        self.memory_stats = lambda: stats or None


HOLDING = """
import json, numpy as np
from spectral_pod.train import system
before = system.usage(".", ".")
held = np.ones(200_000_000, np.uint8)
print(json.dumps([before, system.usage(".", ".")]))
"""


def test_memory_is_of_this_process():
    """In a process that frees nothing meanwhile, and was not forked after importing `system`."""
    done = trainer.run([sys.executable, "-c", HOLDING], forked=False)
    before, after = json.loads(done.stdout)
    grown = after["system/host_memory_gb"] - before["system/host_memory_gb"]
    assert 0.15 < grown < 0.4
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    assert 0 < after["system/host_memory_available_gb"] < total
    assert after["system/cpu_percent"] >= 0


def test_the_fullest_device_counts(tmp_path, monkeypatch):
    devices = [
        Device(bytes_in_use=int(3e9), peak_bytes_in_use=int(4e9)),
        Device(bytes_in_use=int(1e9), peak_bytes_in_use=int(7e9)),
    ]
    monkeypatch.setattr(system.jax, "local_devices", lambda: devices)
    values = system.usage(str(tmp_path), "gs://bucket/data")
    assert values["system/device_memory_gb"] == 3
    assert values["system/device_memory_peak_gb"] == 7


def test_what_cannot_be_known_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(system.jax, "local_devices", lambda: [Device(), Device()])
    values = system.usage("gs://bucket/run", str(tmp_path))
    assert not any("device" in name for name in values)
    assert "system/disk_free_gb" not in values
    free = shutil.disk_usage(tmp_path).free / 1e9
    assert abs(values["system/data_disk_free_gb"] - free) < 1
    assert "system/data_disk_free_gb" not in system.usage("gs://b/run", f"{tmp_path}/none")
