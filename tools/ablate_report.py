"""What `tools.ablate` prints and plots."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from . import plots, study

# Neither JAX nor TensorFlow is imported here, directly or indirectly: they take seconds.

_ERRORS = 2  # standard errors that a difference must have


@dataclasses.dataclass
class Cell(study.Cell):
    """A variant of the configuration from a seed."""

    variant: str

    @property
    def kind(self) -> tuple[str, ...]:
        return (self.variant,)

    @property
    def data(self) -> str:
        return self.variant  # may change the data, too


def found(out: str) -> list[Cell]:
    """The cells that have a folder in `out`, in alphabetical order."""
    folder = epath.Path(out)
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    parts = [name.rpartition("-") for name in names]
    return [Cell(variant, seed=int(s)) for variant, _, s in parts if variant and s.isdecimal()]


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything that the table and the plots show, as JSON."""
    variants = study.distinct(cell.variant for cell in cells)
    done = {(cell.variant, cell.seed): cell.facts for cell in cells if cell.is_done}
    base = {seed: facts for (variant, seed), facts in done.items() if variant == variants[0]}
    return {
        "variants": {
            variant: _of_variant(
                {s: facts for (v, s), facts in done.items() if v == variant},
                {} if variant == variants[0] else base,
                sum(cell.variant == variant for cell in cells),
            )
            for variant in variants
        },
        "cells": [{"name": c.name, "state": c.state} | c.facts for c in cells],
    }


def _of_variant(
    done: Mapping[int, Any], base: Mapping[int, Any], asked: int
) -> dict[str, Any] | None:
    """The figures of a variant; None without a result.

    Args:
      done, base: the facts of its cells and of those that it is compared with, by seed.
    """
    if not done:
        return None
    of_all = {
        name: [facts[name] for facts in done.values() if facts[name] is not None]
        for name in ("training", "milliseconds", "seconds", "memory")
    }
    memory = of_all.pop("memory")
    names = study.distinct(name for facts in done.values() for name in facts["metrics"])
    parts = [name for name in names if name.startswith("accuracy_")]
    first = next(iter(done.values()))
    mean, error = study.mean_and_error([facts["accuracy"] for facts in done.values()])
    pairs = [done[s]["accuracy"] - base[s]["accuracy"] for s in done if s in base]
    return {
        "seeds": len(done),
        "asked": asked,
        "split": first["split"],
        "accuracy": mean,
        "standard_error": error,
        "difference": study.mean_and_error(pairs) if pairs else None,
        "parts": {
            name.removeprefix("accuracy_"): 100 * _mean(
                [facts["metrics"][name] for facts in done.values() if name in facts["metrics"]]
            )
            for name in parts
        },
        "curve": _mean_curve([facts["curve"] for facts in done.values()]),
        "parameters": first["parameters"],
        "steps": first["steps"],
        "memory": max(memory, default=None),
        "memory_of": first["memory_of"],
        **{name: _mean(values) if values else None for name, values in of_all.items()},
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """The mean of curves at the steps that all of them have."""
    of_seeds = [{step: value for step, value in curve} for curve in curves]
    steps = [s for s in of_seeds[0] if all(s in curve for curve in of_seeds)]
    return [(s, _mean([curve[s] for curve in of_seeds])) for s in steps]


def tables(found: Mapping[str, Any]) -> str:
    """The Markdown of a `summary`."""
    if not found["cells"]:
        return "There are no cells.\n"
    rows = {name: row for name, row in found["variants"].items() if row is not None}
    sections = [_table(rows), *_notes(found["variants"], rows), study.missing(found["cells"])]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    parts = study.distinct(part for row in rows.values() for part in row["parts"])
    head = ["variant", "accuracy", "difference", "training", *parts]
    lines = [[*head, "parameters", "steps", "ms a step", "minutes", "peak memory"]]
    for name, row in rows.items():
        lines.append([
            name, _accuracy(row), _difference(row["difference"]), _number(row["training"], 1),
            *(_number(row["parts"].get(part), 1) for part in parts),
            study.count(row["parameters"]), study.count(row["steps"]),
            _number(row["milliseconds"], 1),
            _number(row["seconds"] and row["seconds"] / 60, 1), study.memory(row),
        ])  # fmt: skip
    return study.table(lines)


def _accuracy(row: Mapping[str, Any]) -> str:
    text = _number(row["accuracy"], 2)
    if row["standard_error"] is not None:
        text += f" ± {row['standard_error']:.2f}"
    return text if row["seeds"] == row["asked"] else f"{text} ({row['seeds']} of {row['asked']})"


def _difference(difference: Sequence[Any] | None) -> str:
    if difference is None:
        return "—"
    mean, error = difference
    if error is None:
        return f"{mean:+.2f} (one seed)"
    within = " (within error)" if abs(mean) < _ERRORS * error else ""
    return f"{mean:+.2f} ± {error:.2f}{within}"


def _notes(variants: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    splits = " and ".join(study.distinct(row["split"] for row in rows.values()))
    seeds = sorted({row["seeds"] for row in rows.values()})
    return [
        f"Accuracy in percent on the {splits} split, ± the standard error of the mean over "
        f"{' to '.join(map(str, study.distinct([seeds[0], seeds[-1]])))} seed(s). Differences are "
        f"from {next(iter(variants))}, seed by seed; within error is less than {_ERRORS} standard "
        "errors. Minutes are those of each run's last start."
    ]


def pictures(found: Mapping[str, Any]) -> dict[str, bytes]:
    """Plots of a `summary`: accuracies with their standard errors, and those during training."""
    rows = {name: row for name, row in found["variants"].items() if row is not None}
    if not rows:
        return {}
    bars = plots.new_figure(7, 1 + 0.3 * len(rows))
    if bars is None:
        return {}
    axes = bars.subplots()
    means = [row["accuracy"] for row in rows.values()]
    errors = [row["standard_error"] or 0.0 for row in rows.values()]
    axes.errorbar(means, list(rows), xerr=errors, fmt="o", capsize=3)
    axes.axvline(means[0], color="grey", linewidth=0.5)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy in %, ± standard error")

    curves = plots.new_figure(7, 5)
    axes = curves.subplots()
    for name, row in rows.items():
        if row["curve"]:
            axes.plot(*zip(*row["curve"]), marker=".", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy in % on the validation split")
    if axes.lines:
        axes.legend(fontsize="small")
    return {"accuracy.png": plots.png(bars), "curves.png": plots.png(curves)}


def _number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"
