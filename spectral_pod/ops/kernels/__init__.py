"""Pallas kernels for accelerators: methods of operations (README.md), for the sizes they serve."""

import types
import warnings
from typing import Any

from spectral_pod.ops.choice import Choice
from spectral_pod.parallel.sharding import platform


class NotServed(UserWarning):
    """A kernel was asked for that cannot compute these sizes, or on this device."""


def unserved(kernels: dict[str, types.ModuleType], *sizes: Any) -> str | None:
    """Why a kernel, a module for each platform, cannot compute these sizes; None if it can."""
    kernel = kernels.get(platform())
    if kernel is None:
        served = " and ".join(f"{name.upper()}s" for name in kernels)
        return f"it is a kernel for {served}, and this is a {platform()}"
    return kernel.unserved(*sizes)


def instead_of(kernel: str, reason: str, chosen: Choice) -> Choice:
    """What is used in place of a kernel, which is said once, with the reason."""
    text = f"{chosen.method!r} is used in place of {kernel!r}: {reason}"
    warnings.warn(text, NotServed, stacklevel=3)
    return Choice(chosen.method, f"in place of {kernel!r}: {reason}")
