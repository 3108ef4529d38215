"""Evaluation: every record of a split exactly once, on any number of processes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from spectral_pod.data.pipeline import Source, load
from spectral_pod.objectives import computed
from spectral_pod.parallel.sharding import batch_sharding


def evaluate(
    eval_step: Callable[[Any, Any], Any],
    params: Any,
    sets: Mapping[str, Source],
    mesh: Mesh,
    before_batch: Callable[[], None] = lambda: None,
    **loading: int,
) -> dict[str, Any]:
    """The metrics of `eval_step` over all sets together, as Python numbers and nested lists.

    Of several sets, "sets" holds the metrics of each, by name. An exception that `before_batch`
    raises ends the evaluation; `loading` is as for `pipeline.load`.
    """
    totals = {}
    for name, batches in sets.items():
        total = None
        for batch in load(batches, batch_sharding(mesh), 0, batches.steps_per_epoch, **loading):
            before_batch()
            part = eval_step(params, batch)
            total = part if total is None else total.merge(part)
        totals[name] = jax.device_get(total)
    values = computed(functools.reduce(lambda total, part: total.merge(part), totals.values()))
    if len(totals) > 1:
        values["sets"] = {name: computed(total) for name, total in totals.items()}
    return values
