"""The model card of an exported model: Markdown, filled from the records of its run.

Nothing in it is typed by hand. What the records do not say is said to be unknown.
"""

import html
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from spectral_pod import models
from spectral_pod.config import Config, row_len
from spectral_pod.data import tasks
from spectral_pod.data.tasks import DrawnTask
from spectral_pod.generate.restore import Trained
from spectral_pod.generate.run_records import NO_RECORDS, RunRecords

_SHOWN_CLASSES = 64
_JOULES = 3.6e6  # of a kilowatt-hour
_TEXT = """---
{fields}
---

# {cls}, task {task}

A {cls} that reads {unit}s and predicts {predicts}. Trained with spectral_pod, which wrote this
card from the records of the run.

- {num_params:,} float32 parameters
- {model.num_layers} layers of width {model.hidden_dim}, the blocks repeating {pattern}
- trained for {step:,} steps of {rows} x {row_len} {unit}s, of {total_steps:,} that were planned

## Intended use

{intended}

## Out of scope

{out_of_scope}

## Training data

{data}

## Results

{results}

## Limits

{limits}

## Biases

{biases}

## Footprint

{footprint}

## Use

```python
from spectral_pod import {cls}

model = {cls}.from_export("this folder")
{use}
```

## License

Of the parameters: {license}
"""


def card(
    trained: Trained,
    records: RunRecords = NO_RECORDS,
    license: str | None = None,
    watts: float | None = None,
) -> str:
    """The model card, with the metadata that the Hugging Face Hub reads.

    Args:
      trained: the model.
      records: those of its run.
      license: an identifier, such as 'apache-2.0'; None omits it.
      watts: the power of a device of the training, as its owner states it; None is unknown.
    """
    config, unit = trained.config, trained.vocabulary.unit
    cls = models.MODELS[config.model.name].__name__  # as in spectral_pod.api
    fields = ["library_name: spectral_pod", "tags: [byte-level, spectral, jax]"]
    if license:
        fields.insert(0, f"license: {license}")
    if trained.objective.is_language_model:
        fields.append("pipeline_tag: text-generation")
        predicts = f"the {unit} that follows, or the end of a document"
        use = 'print(model.generate("To be", max_length=200))'
        intended = f"Continuing {unit}s like those of its training data."
        risk = f"Facts and advice: it writes likely {unit}s, which need be neither true nor safe."
    elif not trained.objective.by_position:
        predicts = f"one of {trained.num_classes} classes"
        names = ", ".join(map(_plain, trained.classes[:_SHOWN_CLASSES]))
        more = ", ..." if len(trained.classes) > _SHOWN_CLASSES else ""
        predicts += f": {names}{more}" if names else ""
        use = 'print(model.classes[model.classify(b"some bytes").argmax()])'
        intended = "Classifying records like those of its training data by the classes above."
        risk = "Records of none of its classes: it names one of them for whatever it reads."
    else:
        predicts = f"one of {trained.num_classes} symbols at every position"
        use = "print(model(tokens).argmax(-1))  # int tokens [batch, length]"
        intended = "Predicting the symbols that its task asks for, in sequences like those it read."
        risk = (
            "Sequences of other tasks: it predicts a symbol at every position of whatever it reads."
        )
    return _TEXT.format(
        fields="\n".join(fields),
        cls=cls,
        task=config.data.task,
        predicts=predicts,
        unit=unit,
        num_params=sum(x.size for x in jax.tree.leaves(trained.params)),
        model=config.model,
        pattern=", ".join(models.pattern(config)),
        step=trained.step,
        total_steps=config.train.total_steps,
        rows=config.train.global_batch_size,
        row_len=row_len(config),
        intended=f"{intended} To be completed by whoever trained it.",
        out_of_scope=_list(
            [
                risk,
                f"Sequences of more than {row_len(config):,} {unit}s, as training had none.",
                "Decisions about people: nothing was done to make it fit for them.",
            ]
        ),
        data="\n".join(_data(trained, records)),
        results="\n".join(_results(records.figures(trained.step))),
        limits=_list(_limits(config)),
        biases="\n".join(_biases(trained, records)),
        footprint=_list(_footprint(trained, records, watts)),
        use=use,
        license=license or "none is stated.",
    )


def _data(trained: Trained, records: RunRecords) -> Iterator[str]:
    data = trained.config.data
    task = tasks.TASKS[data.task]
    about = (inspect.getdoc(task) or "").partition("\n\n")[0].replace("\n", " ")
    options = _plain(", ".join(f"{k}={value!r}" for k, value in data.options.items()))
    yield f"Task `{data.task}`{f' with {options}' if options else ''}: {_plain(about)}"
    yield f"The sha256 of the data is `{trained.data_digest}`."
    if data.train_records:
        yield f"Only the first {data.train_records:,} records were trained on."
    yield ""
    if issubclass(task, DrawnTask):
        yield "Its examples are drawn while it trains."
    elif not records.stores:
        yield f"Sources and sizes are unknown: {_plain(records.no_stores)}."
    else:
        yield "| store | split | records | bytes | longest |"
        yield "|---|---|---|---|---|"
        for name, manifest in records.stores.items():
            for split, held in manifest["splits"].items():
                sizes = f"{held['records']:,} | {held['bytes']:,} | {held['longest']:,}"
                yield f"| {_plain(name)} | {_plain(split)} | {sizes} |"
        yield ""
        origins = (_sources(manifest["provenance"]) for manifest in records.stores.values())
        yield (
            _list(itertools.chain(*origins)) or "The stores name no files that they were made from."
        )
    yield ""
    yield "License and consent of those who made the data: unknown."


def _sources(provenance: Any, name: str = "", depth: int = 3) -> Iterator[str]:
    """A line for every source that a store was made from, as `data/origin.py` describes them."""
    if not isinstance(provenance, Mapping) or not depth:
        return
    files, size = provenance.get("files"), provenance.get("bytes")
    if isinstance(files, int) and isinstance(size, int):
        source = _plain(str(provenance.get("source") or "files"))
        content = provenance.get("sha256")
        digest = f", sha256 {_plain(str(content))}" if content else ""
        yield f"{_plain(name)}: {source}, {files:,} file(s) of {size:,} bytes{digest}"
        return
    for key, value in provenance.items():
        yield from _sources(value, key, depth - 1)


def _results(figures: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    if not figures:
        yield "None are recorded of this step."
        return
    names = dict.fromkeys(itertools.chain(*figures.values()))  # in order
    yield f"| | {' | '.join(map(_plain, figures))} |"
    yield "|---" * (len(figures) + 1) + "|"
    for name in names:
        values = (f"{split[name]:.6g}" if name in split else "" for split in figures.values())
        yield f"| {_plain(name.replace('_', ' '))} | {' | '.join(values)} |"


def _limits(config: Config) -> Iterator[str]:
    yield f"One run, of seed {config.seed}: how its results vary between runs is unknown."
    if config.data.truncate:
        yield f"Of longer documents it has read the first {config.data.seq_len:,} bytes only."
    yield "Calibration, and results on data of other origins: unknown, as neither was measured."


def _biases(trained: Trained, records: RunRecords) -> Iterator[str]:
    """How often classes occur in training, and how many of each are recognised."""
    num_classes, result = len(trained.classes), records.result_of(trained.step)
    splits = [store["splits"].get("train") for store in records.stores.values()]
    counts = [sum(n) for n in zip(*(split["class_counts"] for split in splits if split))]
    evaluation: Mapping[str, Any] = result["eval"] if result else {}
    confusion: Any = evaluation.get("confusion")
    counted = len(counts) == num_classes
    evaluated = _is_confusion(confusion, num_classes)
    if 0 < num_classes <= _SHOWN_CLASSES and (counted or evaluated):
        where = f" on {_plain(evaluation['split'])}" if evaluation else ""
        yield f"| class | share of the training records | recognised{where} |"
        yield "|---|---|---|"
        for i, name in enumerate(trained.classes):
            share = _ratio(counts[i], sum(counts)) if counted else "unknown"
            recall = _ratio(confusion[i][i], sum(confusion[i])) if evaluated else "unknown"
            yield f"| {_plain(name)} | {share} | {recall} |"
        yield ""
    yield (
        "Which groups of people, languages and topics the data hold, and how well it does on each: "
        "unknown."
    )


def _is_confusion(counts: Any, num_classes: int) -> bool:
    """Whether these are counts [true class, predicted class]; results have no schema for them."""
    return (
        isinstance(counts, list)
        and len(counts) == num_classes
        and all(isinstance(row, list) and len(row) == num_classes for row in counts)
        and all(type(n) is int and n >= 0 for row in counts for n in row)
    )


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.1%} of {whole:,}" if whole else "of none"


def _footprint(trained: Trained, records: RunRecords, watts: float | None) -> Iterator[str]:
    rows, step = trained.config.train.global_batch_size, trained.step
    total, unit = step * rows * row_len(trained.config), trained.vocabulary.unit
    yield f"{step:,} steps of {rows:,} rows: {total:,} {unit}s, padding included"
    if records.starts and (origin := records.starts[0].get("start_from")):
        whence = f"step {origin['step']:,} of the run {_plain(origin['run'])}"
        yield f"its first parameters are those of {whence}, which is not counted here"
    spent = records.footprint(step)
    if spent is None:
        yield "devices, time and energy: unknown, the run's records do not say"
        return
    for (devices, processes), starts in itertools.groupby(spent.devices, lambda start: start[1:]):
        first = next(starts)[0]
        yield f"devices from step {first:,} on: {_plain(devices)}, of {processes:,} process(es)"
    yield f"time: {_hours(spent.seconds)}, of which steps took {_hours(spent.step_seconds)}"
    if spent.restart_seconds:
        yield (
            f"between its {len(spent.devices)} starts: {_hours(spent.restart_seconds)}, in an "
            "unknown part of which it ran as well"
        )
    if watts is None:
        yield "energy: unknown, as the power of its devices was not stated when it was exported"
    else:
        yield (
            f"energy: {spent.device_seconds * watts / _JOULES:.3g} kWh, an estimate of "
            f"{_hours(spent.device_seconds)} of one device at {watts:g} W, as stated when it was "
            "exported; hosts, cooling and what was lost between starts are not in it"
        )
    yield "emissions: unknown, as the origin of the electricity is"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours"


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _plain(text: str) -> str:
    """Text from data or users, so that Markdown and HTML show it as it is, on one line."""
    one_line = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", html.escape(one_line, quote=False))
