"""Figures of the probes of a run: what layers show of themselves, step by step.

Colours go with the step or with the layer, as each figure says. Of more layers than a figure has
room for, some are drawn, evenly spread, and the title counts them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Probes = Mapping[int, Mapping[str, np.ndarray]]  # by step, arrays by name: `train/probes.py`

_PANELS = 8  # that a figure has room for
_COLUMNS = 4
_LABELS = 12  # of lines, that a panel has room for
_DPI = 80

# Figures with a line for each layer: the last parts of the names that each of their panels draws.
_LINES = {
    "gates": ("energy_gate_mean", "gate_mean", "gate_rms", "convolution_share", "band_share"),
    "frequencies": ("frequency_share",),
    "memory": ("beta_mean", "clip_share", "memory_norm"),
}


def figures(history: Probes) -> dict[str, "Figure"]:
    """The figures of all probes so far, by name; those that would show nothing are left out."""
    drawn = {
        "activations": _activations(history),
        "gradients": _norms(history, "grad_norm", "gradients"),
        "updates": _relative_updates(history),
        "responses": _responses(history),
        "decays": _decays(history),
    }
    drawn |= {name: _lines(history, name, kinds) for name, kinds in _LINES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def pixels(figure: "Figure") -> np.ndarray:
    """A figure as uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def series(history: Probes, name: str) -> tuple[list[int], np.ndarray]:
    """The steps at which `name` was probed, and its values there, stacked."""
    steps = sorted(step for step, found in history.items() if name in found)
    return steps, np.stack([history[step][name] for step in steps])


def named(history: Probes, pattern: str) -> list[str]:
    """The names that match a pattern as a whole, by layer."""
    names = {name for found in history.values() for name in found if re.fullmatch(pattern, name)}
    return sorted(names, key=lambda name: (layer_of(name), name))


def layer_of(name: str) -> int:
    """The number of the layer that a name begins with; -1 for what is in none."""
    found = re.match(r"layer_(\d+)/", name)
    return int(found[1]) if found else -1


# ---- one function a figure; each returns None where it would be empty


def _activations(history: Probes) -> "Figure | None":
    """The residual stream and what mixers add to it by depth, a line for each step."""
    layers = named(history, r"layer_\d+/rms")
    if not layers:
        return None
    figure, (stream, branches) = _grid(2, "Root mean square by depth, from first step to last")
    steps = sorted(history)
    of_step = _colours(len(steps))
    kinds = sorted({name.partition("/")[2] for name in named(history, r"layer_\d+/\w+_rms")})
    markers = dict(zip(kinds, "osv^Dx+*"))
    for colour, step in zip(of_step, steps):
        found = history[step]
        rows = [name for name in ("input_rms", *layers) if name in found]
        depth = [layer_of(name) + 1 for name in rows]
        stream.plot(depth, [float(found[name]) for name in rows], color=colour)
        for kind, marker in markers.items():
            rows = [name for name in named({0: found}, rf"layer_\d+/{kind}")]
            depth = [layer_of(name) + 1 for name in rows]
            values = [float(found[name]) for name in rows]
            label = kind.removesuffix("_rms") if step == steps[-1] else None
            branches.plot(depth, values, marker, color=colour, markersize=4, label=label)
    for axes, title in ((stream, "residual stream"), (branches, "added by")):
        axes.set(title=title, xlabel="block", yscale="log")
    branches.legend(fontsize=7)
    return figure


def _norms(history: Probes, kind: str, title: str) -> "Figure | None":
    """A panel for each optimizer group, a line for each layer."""
    names = named(history, rf"[^/]+/{kind}/\w+")
    groups = sorted({name.rpartition("/")[2] for name in names})
    if not groups:
        return None
    figure, panels = _grid(len(groups), f"Euclidean norms of {title} by layer, dark to light")
    for axes, group in zip(panels, groups):
        rows = [name for name in names if name.endswith(f"/{group}")]
        for colour, name in zip(_colours(len(rows)), rows):
            steps, values = series(history, name)
            axes.plot(steps, values, color=colour, label=name.partition("/")[0])
        axes.set(title=group, xlabel="step", yscale="log")
        _legend(axes)
    return figure


def _relative_updates(history: Probes) -> "Figure | None":
    """Norms of updates as a share of the norms of the parameters."""

    def shares(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        pairs = {name: name.replace("/update_norm/", "/param_norm/") for name in found}
        return {
            name: found[name] / np.maximum(found[other], 1e-12)
            for name, other in pairs.items()
            if name != other
        }

    relative = {step: shares(found) for step, found in history.items()}
    return _norms(relative, "update_norm", "updates, as a share of the parameters")


def _responses(history: Probes) -> "Figure | None":
    """The gain of each layer's filters over frequency and training, averaged over channels."""
    names, note = _some(named(history, r".*/response"))
    if not names:
        return None
    figure, panels = _grid(len(names), f"Gain of filters in dB, by frequency and step{note}")
    for axes, name in zip(panels, names):
        steps, gain_SDF = series(history, name)
        power_SF = np.mean(np.square(gain_SDF), axis=1)
        image = axes.pcolormesh(
            np.linspace(0, 0.5, power_SF.shape[1] + 1),
            np.append(steps, steps[-1] + max(1, np.ptp(steps) // max(1, len(steps) - 1))),
            10 * np.log10(np.maximum(power_SF, 1e-12)),
        )
        figure.colorbar(image, ax=axes)
        axes.set(xlabel="cycles per position", ylabel="step")
        axes.set_title(name.removesuffix("/response"), fontsize=8)
    return figure


def _decays(history: Probes) -> "Figure | None":
    """How far filters, states and memories reach: quantiles over their channels."""
    names, note = _some(named(history, r".*/decay"))
    if not names:
        return None
    title = "Positions after which a filter or state has faded by e: least, quartiles, largest"
    figure, panels = _grid(len(names), title + note)
    for axes, name in zip(panels, names):
        steps, decay_SD = series(history, name)
        reach_SD = -1 / np.log(np.clip(decay_SD, 1e-12, 1 - 1e-7))
        for q, colour in zip((0, 25, 50, 75, 100), _colours(5)):
            axes.plot(steps, np.percentile(reach_SD, q, axis=1), color=colour)
        axes.set(xlabel="step", ylabel="positions", yscale="log")
        axes.set_title(name.removesuffix("/decay"), fontsize=8)
    return figure


def _lines(history: Probes, title: str, kinds: Sequence[str]) -> "Figure | None":
    """A panel for each kind; for each layer the mean over channels or heads, and their range."""
    by_kind = {kind: named(history, rf".*/{kind}") for kind in kinds}
    by_kind = {kind: names for kind, names in by_kind.items() if names}
    if not by_kind:
        return None
    figure, panels = _grid(len(by_kind), f"{title}: mean and range over channels or heads")
    for axes, (kind, names) in zip(panels, by_kind.items()):
        for colour, name in zip(_colours(len(names)), names):
            steps, values = series(history, name)
            values = values.reshape(len(steps), -1)
            label = name.removesuffix(f"/{kind}")
            axes.plot(steps, values.mean(axis=1), color=colour, label=label)
            axes.fill_between(
                steps, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15
            )
        axes.set(title=kind, xlabel="step")
        _legend(axes)
    return figure


# ---- layout


def _grid(count: int, title: str) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    width = max(4 * columns, 8)  # inches; the title needs some room
    figure = Figure(figsize=(width, 3 * rows + 0.5), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, panels


def _legend(axes: Any) -> None:
    """Names the lines, if there is room; their colours go from dark to light by layer."""
    if len(axes.get_lines()) <= _LABELS:
        axes.legend(fontsize=6)


def _some(names: list[str]) -> tuple[list[str], str]:
    """At most as many names as there are panels, and what the title says of the others."""
    if len(names) <= _PANELS:
        return names, ""
    chosen = np.unique(np.linspace(0, len(names) - 1, _PANELS).round().astype(int))
    return [names[i] for i in chosen], f" ({len(chosen)} of {len(names)})"


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    viridis: Callable[[float], Any] = colormaps["viridis"]
    return [viridis(i / max(1, count - 1) * 0.9) for i in range(count)]
