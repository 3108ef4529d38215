"""The platform that JAX uses, and where it keeps compiled programs."""

import glob
import math
import os

import jax

from spectral_pod.errors import ConfigError
from spectral_pod.parallel import gpu_driver

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd")  # TPUs and GPUs


def leave_out_absent_tpus() -> None:
    """To be called before the first use of JAX: uses the CPU where there is no accelerator.

    libtpu, if installed to compile for absent TPUs, would search for one, log many errors and break
    JAX's profiler. A choice by JAX_PLATFORMS or `jax.config` stays.
    """
    if not jax.config.values["jax_platforms"] and not any(map(glob.glob, _ACCELERATORS)):
        jax.config.update("jax_platforms", "cpu")


def check_platform() -> None:
    """Checks that JAX runs on the platform that JAX_PLATFORMS names first.

    Raises:
      ConfigError: it does not; JAX itself falls back to the next one silently.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if not wanted:
        return
    try:
        found = f"has found {jax.default_backend()} only"
        if {"cuda": "gpu", "rocm": "gpu"}.get(wanted, wanted) == jax.default_backend():
            return
    except (RuntimeError, AssertionError) as error:  # the latter where it has no such plugin
        found = f"fails ({str(error) or 'it knows no such platform'})"
    why = "is it there, and has a container access to it?"
    if wanted in ("cuda", "gpu"):
        why = gpu_driver.explain(gpu_driver.version(), gpu_driver.plugins(), jax.__version__)
    raise ConfigError(f"JAX_PLATFORMS asks for {wanted}, and JAX {found}: {why}")


def enable_compilation_cache(workdir: str, *, read_only: bool = False) -> None:
    """Keeps compiled programs in the workdir, so that a restart does not compile again.

    With `read_only` those that are there are used.
    """
    jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, "compilation_cache"))
    seconds = math.inf if read_only else 1.0
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    # XLA's own caches would make the path a part of every key: a moved workdir compiled anew.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
