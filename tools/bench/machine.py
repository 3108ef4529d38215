"""Facts about the machine, and the pinning that makes figures comparable."""

import importlib.metadata
import os
import platform
import re
import time
from typing import Any

import jax

from spectral_pod.errors import ConfigError

_WATCH_S = 0.5


def pin(cores: int) -> None:
    """Pins this process, and those it will start, to its `cores` idlest cores.

    Call it before JAX starts: XLA and PyTorch size their thread pools by it. With more threads than
    idle cores both spend a varying number of milliseconds waiting for threads.

    Raises:
      ConfigError: the process has fewer cores.
    """
    allowed = os.sched_getaffinity(0)
    if not 1 <= cores <= len(allowed):
        raise ConfigError(f"--cores={cores}: this process may use 1 to {len(allowed)} cores")
    before = _idle()
    time.sleep(_WATCH_S)
    after = _idle()
    os.sched_setaffinity(0, sorted(allowed, key=lambda core: before[core] - after[core])[:cores])


def unpin() -> None:
    """Unpins all threads: an accelerator must not wait for its host."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), range(os.cpu_count() or 1))


def _idle() -> dict[int, int]:
    """The idle time of every core so far."""
    with open("/proc/stat") as file:
        fields = [line.split() for line in file if re.match(r"cpu\d", line)]
    return {int(name.removeprefix("cpu")): int(times[3]) for name, *times in fields}


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX)."""
    return "amx_bf16" in _cpuinfo()


def describe() -> dict[str, Any]:
    """Facts about this machine and the library versions, for a report."""
    model = re.search(r"model name\s*:\s*(.*)", _cpuinfo())
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cpu": model[1] if model else platform.processor(),
        "amx": has_amx(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def _cpuinfo() -> str:
    with open("/proc/cpuinfo") as file:
        return file.read()
