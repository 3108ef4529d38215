"""Evaluation: every record of a split exactly once, on any number of processes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from spectral_pod.data.pipeline import Source, load
from spectral_pod.data.windows import Windows
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

    Of several sets, "sets" holds the metrics of each, by name. Windows of tokens add the `totals`
    of their text. An exception that `before_batch` raises ends the evaluation; `loading` is as for
    `pipeline.load`.
    """
    parts: dict[str, Any] = {}
    facts: dict[str, Mapping[str, int]] = {}
    for name, batches in sets.items():
        total = None
        for batch in load(batches, batch_sharding(mesh), 0, batches.steps_per_epoch, **loading):
            before_batch()
            part = eval_step(params, batch)
            total = part if total is None else total.merge(part)
        parts[name] = jax.device_get(total)
        facts[name] = batches.totals if isinstance(batches, Windows) else {}
    values = computed(functools.reduce(lambda total, part: total.merge(part), parts.values()))
    of_all = set.intersection(*map(set, facts.values()))
    values.update({name: sum(x[name] for x in facts.values()) for name in of_all})
    if len(parts) > 1:
        values["sets"] = {name: computed(part) | dict(facts[name]) for name, part in parts.items()}
    return values
