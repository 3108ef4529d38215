"""Evaluation: every record of a split exactly once, on any number of processes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spectral_pod.data.pipeline import Source, load
from spectral_pod.parallel.sharding import batch_sharding


def evaluate(
    eval_step: Callable[[Any, Any], Any],
    params: Any,
    sets: Mapping[str, Source],
    mesh: Mesh,
    *,
    threads: int,
    prefetch: int,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Loss and accuracy over all sets together, and how many records or labelled positions these
    have. Of records also the confusion table.

    Of several sets, "sets" holds the same of each, by name. What `before_batch` raises ends it.
    """
    totals = {}
    for name, batches in sets.items():
        steps = load(
            batches,
            batch_sharding(mesh),
            0,
            batches.steps_per_epoch,
            threads=threads,
            prefetch=prefetch,
        )
        total = None
        for batch in steps:
            before_batch()
            part = eval_step(params, batch)
            total = part if total is None else total.merge(part)
        totals[name] = jax.device_get(total)
    total = functools.reduce(lambda total, part: total.merge(part), totals.values())
    values = _values(total.compute())
    if len(totals) > 1:
        values["sets"] = {name: _values(total.compute()) for name, total in totals.items()}
    return values


def _values(result: Mapping[str, Any]) -> dict[str, Any]:
    values = {"loss": float(result["loss"]), "accuracy": float(result["accuracy"])}
    if "positions" in result:
        return values | {"positions": int(result["positions"])}
    confusion = np.asarray(result["confusion"]).astype(int)
    return values | {"records": int(confusion.sum()), "confusion": confusion.tolist()}


def confusion_table(confusion: list[list[int]], classes: list[str]) -> str:
    """A table of true (rows) against predicted (columns) classes, with the recall of each row."""
    width = max(6, max(len(name) for name in classes) + 1)
    lines = [" " * width + "".join(f"{name[:6]:>7}" for name in classes) + "  recall"]
    for name, row in zip(classes, confusion):
        recall = row[classes.index(name)] / max(sum(row), 1)
        cells = "".join(f"{count:>7}" if count else f"{'.':>7}" for count in row)
        lines.append(f"{name:<{width}}{cells}  {recall:6.1%}")
    return "\n".join(lines)
