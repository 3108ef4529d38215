"""Byte-level spectral sequence models. What is named here is in `api.py`, imported at first use."""

import importlib
from typing import Any

from spectral_pod import errors

errors.check_packages(__name__)

_PLACES = {"Agent": "agent.loop", "SpectralTrainer": "spectral_trainer"}  # what is not in `api.py`

__all__ = [
    "Agent",
    "Config",
    "SpectralAnalyzer",
    "SpectralGPT",
    "SpectralLLM",
    "SpectralModel",
    "SpectralTrainer",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # of PEP 562, so that the operations can be imported by themselves
        return getattr(importlib.import_module(f"spectral_pod.{_PLACES.get(name, 'api')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
