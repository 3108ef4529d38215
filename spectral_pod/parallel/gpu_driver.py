"""NVIDIA's driver on this machine, and why JAX cannot use a GPU."""

import contextlib
import importlib.metadata
import os
import re
import subprocess

VERSION_FILE = "/proc/driver/nvidia/version"
# The oldest driver for each CUDA: docs.nvidia.com/cuda/cuda-toolkit-release-notes, table 2
OLDEST_DRIVER = {12: 525, 13: 580}


def version(file: str = VERSION_FILE) -> str | None:
    """The version of the loaded driver, such as '580.65.06'; None where there is none."""
    with contextlib.suppress(OSError), open(file) as text:
        if found := re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", text.read(), re.MULTILINE):
            return found[1]
    # Where the host is Windows there is no such file.
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return asked.stdout.split()[0] if asked.stdout.split() else None
    return None


def plugins() -> dict[int, str]:
    """The version of JAX's plugin for each CUDA, of those that are installed."""
    found = {}
    for cuda in OLDEST_DRIVER:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[cuda] = importlib.metadata.version(f"jax-cuda{cuda}-plugin")
    return found


def explain(driver: str | None, plugins: dict[int, str], jax_version: str) -> str:
    """Why JAX may not use the GPUs of this machine, and what to do.

    Args:
      driver: as of `version`.
      plugins: as of `plugins`.
    """
    if driver is None:
        return (
            f"there is no driver of NVIDIA ({VERSION_FILE}); install it on the host, and start "
            "containers with access to the GPUs (docker run --gpus=all)"
        )
    major = int(driver.split(".")[0])
    runs = [cuda for cuda, oldest in OLDEST_DRIVER.items() if major >= oldest]
    if not runs:
        return f"NVIDIA's driver is {driver}, and CUDA 12 needs 525 or newer; update it on the host"
    fitting = f"pip install 'jax[cuda{max(runs)}]=={jax_version}'"
    if not plugins:
        return f"NVIDIA's driver is {driver}, and JAX's CUDA plugin is not installed: {fitting}"
    if not plugins.keys() & set(runs):
        cuda = min(plugins)
        return (
            f"NVIDIA's driver is {driver}, and CUDA {cuda}, which is installed, needs "
            f"{OLDEST_DRIVER[cuda]} or newer; update the driver on the host, or use CUDA "
            f"{max(runs)}: {fitting} without jax-cuda{cuda}-plugin, in an image --build-arg "
            f"CUDA={max(runs)}"
        )
    installed = ", ".join(f"for CUDA {cuda} {version}" for cuda, version in plugins.items())
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f"; CUDA_VISIBLE_DEVICES is {devices!r}" if devices is not None else ""
    return (
        f"NVIDIA's driver is {driver}, JAX {jax_version}, its plugin {installed}{hidden}; are the "
        "plugin and JAX of the same version, and does nvidia-smi list the GPUs?"
    )
