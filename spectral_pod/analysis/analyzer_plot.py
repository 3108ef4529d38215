"""A picture of what `SpectralAnalyzer` found, by matplotlib, which is installed for this only."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from spectral_pod.errors import ConfigError

_BANDS = 64  # points of a filter's curve


def require_matplotlib() -> Any:
    """The class `matplotlib.figure.Figure`, which needs no display.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"plots need matplotlib ({error}): pip install 'spectral-pod[plots]'"
        ) from None
    return Figure


def plot(report: Mapping[str, Any], filters: Mapping[str, Any], file: str) -> None:
    """Draws the shares of components, the gain of filters and, if observed, bands of activations.

    Args:
      report: of `SpectralAnalyzer.analyze_architecture`, perhaps with 'monitor' and
        'removed_bands' as `tools/analyze.py` adds them.
      filters: of `SpectralAnalyzer.filters`.
      file: to be written; its suffix, such as .png or .svg, is the format.

    Raises:
      ConfigError: matplotlib is not installed, or does not know the format.
    """
    figure_class = require_matplotlib()
    panels: list[Any] = [_shares]
    if filters:
        panels.append(_gains)
    if "monitor" in report:
        panels.append(_activations)
    if "removed_bands" in report:
        panels.append(_removed)
    figure = figure_class(figsize=(9, 4.5 * len(panels)), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(len(panels))), panels):
        panel(axes, report, filters)
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise ConfigError(f"--plot is {file!r}: {error}") from None


def _shares(axes: Any, report: Mapping[str, Any], _: Any) -> None:
    components = report["components"]
    place = np.arange(len(components))
    for offset, kind, label in ((-0.2, "params", "parameters"), (0.2, "flops", "FLOPs")):
        whole = np.array([c[kind] for c in components.values()]) / report[kind]
        part = np.array([c[f"spectral_{kind}"] for c in components.values()]) / report[kind]
        (bars, *_) = axes.bar(place + offset, whole, 0.4, alpha=0.3, label=f"{label}, all")
        axes.bar(
            place + offset, part, 0.4, color=bars.get_facecolor(), alpha=1.0,
            label=f"{label}, spectral",
        )  # fmt: skip
    axes.set_xticks(place, list(components), rotation=90, fontsize=7)
    axes.set(ylabel="share of the model", title="Parameters and FLOPs")
    axes.legend()


def _gains(axes: Any, _: Any, filters: Mapping[str, Any]) -> None:
    for path, given in filters.items():
        given = np.asarray(given)
        w_FD = given if np.iscomplexobj(given) else np.fft.rfft(given, 2 * given.shape[1]).T
        power_F = np.mean(np.abs(w_FD) ** 2, axis=1)
        parts = np.array_split(power_F, min(_BANDS, len(power_F)))
        gain = [np.sqrt(part.mean()) for part in parts]
        axes.plot(np.linspace(0, 0.5, len(gain)), gain, label=path)
    axes.set(
        xlabel="frequency (cycles per position)", ylabel="gain, root mean square over channels",
        title="Learned filters", yscale="log",
    )  # fmt: skip
    axes.legend(fontsize=7)


def _activations(axes: Any, report: Mapping[str, Any], _: Any) -> None:
    mixers = report["monitor"]["mixers"]
    place = np.arange(len(mixers))
    bottom = {side: np.zeros(len(mixers)) for side in ("input", "output")}
    for band, colour in (("low", "C0"), ("middle", "C1"), ("high", "C2")):
        for offset, side in ((-0.2, "input"), (0.2, "output")):
            share = np.array([mixer[side][band] for mixer in mixers.values()])
            label = band if side == "input" else None
            axes.bar(place + offset, share, 0.36, bottom[side], color=colour, label=label)
            bottom[side] = bottom[side] + share
    axes.set_xticks(place, list(mixers), rotation=90, fontsize=7)
    axes.set(ylabel="share of the energy", title="Activations: input (left) and output (right)")
    axes.legend()


def _removed(axes: Any, report: Mapping[str, Any], _: Any) -> None:
    removed = report["removed_bands"]
    place = np.arange(len(removed["accuracy"]))
    for i, band in enumerate(("low", "middle", "high", "all")):
        accuracy = [row[band] for row in removed["accuracy"].values()]
        axes.bar(place + 0.2 * (i - 1.5), accuracy, 0.2, label=f"without {band}")
    axes.axhline(removed["with_all"], color="black", label="with all bands")
    axes.set_xticks(place, list(removed["accuracy"]), rotation=90, fontsize=7)
    axes.set(ylabel="accuracy", title=f"Bands removed from filters, on {removed['split']}")
    axes.legend()
