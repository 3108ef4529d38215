"""Pallas kernels for accelerators: methods of operations (README.md), for the sizes they serve."""

import warnings


class NotServed(UserWarning):
    """A kernel was asked for that cannot compute these sizes, or on this device."""


def instead_of(kernel: str, reason: str, method: str) -> str:
    """The method that is used in place of a kernel, which is said once, with the reason."""
    warnings.warn(f"{method!r} is used in place of {kernel!r}: {reason}", NotServed, stacklevel=3)
    return method
