"""What a run takes of its machine: TensorBoard's page "system"."""

import os
import shutil

import jax
import psutil

from spectral_pod import storage

_GB = 1e9  # bytes
_PROCESS = psutil.Process()
_PROCESS.cpu_percent()  # the time since this call is what the next one measures


def usage(workdir: str, data_dir: str) -> dict[str, float]:
    """What this process and its host use now, by the names of scalars.

    Of the local devices the fullest counts. `cpu_percent` is since the last call; 100 is one core
    at work. Devices that keep no statistics (CPUs) are left out, and folders on gs:// or not there.

    Args:
      workdir, data_dir: paths or gs:// URLs; free space is that of their disks.
    """
    values = {
        "system/host_memory_gb": _PROCESS.memory_info().rss / _GB,
        "system/host_memory_available_gb": psutil.virtual_memory().available / _GB,
        "system/cpu_percent": _PROCESS.cpu_percent(),
    }
    devices = [stats for d in jax.local_devices() if (stats := d.memory_stats()) is not None]
    for name, key in (
        ("system/device_memory_gb", "bytes_in_use"),
        ("system/device_memory_peak_gb", "peak_bytes_in_use"),
    ):
        if held := [stats[key] for stats in devices if key in stats]:
            values[name] = max(held) / _GB
    for name, folder in (
        ("system/disk_free_gb", workdir),
        ("system/data_disk_free_gb", data_dir),
    ):
        folder = os.path.expanduser(folder)
        if not storage.is_remote(folder) and os.path.isdir(folder):
            values[name] = shutil.disk_usage(folder).free / _GB
    return values
