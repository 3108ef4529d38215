"""Usage of the machine by a run, for the "system" section in TensorBoard."""

import os
import shutil

import jax
import psutil

from spectral_pod import storage

_GB = 1e9  # bytes
_PROCESS = psutil.Process()


def restart() -> None:
    """Starts the time that `cpu_percent` of the next `usage` covers."""
    _PROCESS.cpu_percent()


def usage(workdir: str, data_dir: str) -> dict[str, float]:
    """The current usage of this process and its host, by the names of scalars.

    Of the local devices, the one with the most memory in use counts. `cpu_percent` covers the time
    since the last call or `restart`, with 100 for one busy core. Devices without statistics (CPUs)
    are omitted, as are remote or missing folders.

    Args:
      workdir, data_dir: paths or gs:// URLs, for the free space of their disks.
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
        if used := [stats[key] for stats in devices if key in stats]:
            values[name] = max(used) / _GB
    for name, folder in (
        ("system/disk_free_gb", workdir),
        ("system/data_disk_free_gb", data_dir),
    ):
        folder = storage.place(folder, "config.data.dir", root=True)
        if not storage.is_remote(folder) and os.path.isdir(folder):
            values[name] = shutil.disk_usage(folder).free / _GB
    return values
