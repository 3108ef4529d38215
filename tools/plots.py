"""Plots of tools, by matplotlib, which is optional."""

import io
from typing import Any

from . import shell


def new_figure(width: float, height: float) -> Any:
    """A `matplotlib.figure.Figure` of a size in inches, which needs no display.

    None, and a line that says so, if matplotlib is not installed: the tool's other results count.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        shell.say("No plots: they need matplotlib; pip install 'spectral-pod[plots]'")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    """The file of a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    return file.getvalue()
