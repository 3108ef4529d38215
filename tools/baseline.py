"""The accuracy of baselines that ignore the order of bytes, on a classification task.

    python -m tools.baseline --config=configs/quickstart.py [--config.field=value ...]
    ... --json=FILE

Prints the test accuracy of the most frequent class and of logistic regression on byte histograms:
the frequency of each byte in each document of a record. Where a record has two documents, a third
row adds the absolute difference of their histograms, byte by byte. The regression is fitted to the
training split, with the L2 penalty that is best on the validation split. The data are those of
the run: the same store, which is written if it does not exist, or the same stores, their records
pooled without weights, cut to the same config.data.seq_len.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spectral_pod.data import pipeline, tasks
from spectral_pod.data.progress import Progress
from spectral_pod.errors import ConfigError
from spectral_pod.parallel import runtime
from spectral_pod.train.sources import Sources, open_sources
from spectral_pod.validation import validate

from . import shell

SPLITS = ("train", "validation", "test")
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # L2, on the mean loss; strong ones fit fast: first
_MAX_ITERATIONS = 1000


class Histograms(NamedTuple):
    """Byte frequencies of a split: float32 [n, documents, 256], and labels int32 [n]."""

    frequencies: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One row of the table; accuracies are fractions, on the test and validation splits."""

    name: str
    test: float
    validation: float
    penalty: float | None = None
    converged: bool = True


def histograms(source: pipeline.Source, documents: int, name: str) -> Histograms:
    """Counts the bytes of a split, batch by batch, and reports progress under `name`.

    An empty document has frequencies of 0.
    """
    frequencies = np.zeros((source.num_records, documents, 256), np.float32)
    labels = np.zeros(source.num_records, np.int32)
    progress = Progress(f"Counting {name}", source.num_records, "records")
    done = 0
    for step in range(source.steps_per_epoch):
        batch = source.rows(step, np.arange(source.batch_size))
        valid = batch["valid"]
        rows = slice(done, done := done + int(valid.sum()))
        lines = batch["tokens"][valid].reshape(-1, source.seq_len)
        counts = np.stack([np.bincount(line[line < 256], minlength=256) for line in lines])
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        frequencies[rows] = shares.reshape(-1, documents, 256)
        labels[rows] = batch["labels"][valid]
        progress.at(done)
    progress.end()
    return Histograms(frequencies, labels)


def majority(splits: dict[str, Histograms]) -> Baseline:
    """Always predicts the most frequent class of the training split."""
    guess = np.bincount(splits["train"].labels).argmax()
    test, validation = (
        float(np.mean(splits[split].labels == guess)) for split in ("test", "validation")
    )
    return Baseline("majority class", test, validation)


def regression(
    name: str, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Baseline:
    """Multinomial logistic regression on features float32 [n, m], standardised on training data."""
    # Of the development requirements: `--help` works without it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    train = features["train"]
    scale = np.where(np.ptp(train, axis=0) > 0, train.std(axis=0), 1)
    scaled = {split: (x - train.mean(axis=0)) / scale for split, x in features.items()}
    best: Baseline | None = None
    started = time.monotonic()
    for i, penalty in enumerate(PENALTIES):
        strength = 1 / (penalty * len(labels["train"]))
        model = LogisticRegression(C=strength, max_iter=_MAX_ITERATIONS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(scaled["train"], labels["train"])
        converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        test, validation = (
            float(model.score(scaled[split], labels[split])) for split in ("test", "validation")
        )
        if best is None or validation > best.validation:
            best = Baseline(name, test, validation, penalty, converged)
        left = (time.monotonic() - started) / (i + 1) * (len(PENALTIES) - i - 1)
        shell.say(
            f"{name}: penalty {penalty:g}, validation {validation:.2%}, {left:.0f} s or more left"
        )
    assert best is not None
    return best


def baselines(sources: Sources) -> tuple[list[Baseline], dict[str, int]]:
    """All rows of the table, and the number of records of each split.

    Raises:
      ConfigError: the training records are all of one class.
    """
    documents = sources.config.data.documents
    splits = {}
    for split in SPLITS:
        parts = [
            histograms(source, documents, f"{name}, {split}")
            for name, source in sources.evaluation(split).items()
        ]
        splits[split] = Histograms(*map(np.concatenate, zip(*parts)))
    labels = {split: x.labels for split, x in splits.items()}
    if len(np.unique(labels["train"])) < 2:
        raise ConfigError(
            f"the training records of config.data.task = {sources.config.data.task!r} are all of "
            "one class; raise config.data.train_records"
        )
    flat = {split: x.frequencies.reshape(len(x.labels), -1) for split, x in splits.items()}
    lines = [majority(splits), regression("byte histograms", flat, labels)]
    if documents == 2:
        distances = {
            split: np.abs(x.frequencies[:, 0] - x.frequencies[:, 1]) for split, x in splits.items()
        }
        both = {split: np.concatenate([flat[split], distances[split]], axis=1) for split in SPLITS}
        lines.append(regression("byte histograms and their differences", both, labels))
    return lines, {split: len(x) for split, x in labels.items()}


def table(task: str, lines: Sequence[Baseline], records: dict[str, int], classes: int) -> str:
    """The table as printed."""
    counts = ", ".join(f"{count:,} {split}" for split, count in records.items())
    width = max(len(line.name) for line in lines)
    rows = [f"{task}: {classes} classes, records {counts}", f"{'':{width}}  {'test':>7}"]
    for line in lines:
        notes = f"  penalty {line.penalty:g}" if line.penalty is not None else ""
        notes += "" if line.converged else f", not converged after {_MAX_ITERATIONS} iterations"
        rows.append(f"{line.name:{width}}  {line.test:>7.2%}{notes}")
    return "\n".join(rows)


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("baseline", __doc__)
    parser.add_config()
    parser.add_output("--json", "write the figures to this file as well")
    return shell.run(parser, measure, argv)


def measure(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    config = arguments.config
    validate(config)
    objective = tasks.TASKS[config.data.task].objective
    if objective.by_position:
        raise ConfigError(
            f"config.data.task is {config.data.task!r}, whose objective is {objective.__name__}; "
            "baselines are of tasks that classify records"
        )
    with contextlib.redirect_stdout(sys.stderr):
        sources = open_sources(config)
    lines, records = baselines(sources)
    sources.wait_verified()
    print(table(config.data.task, lines, records, sources.num_classes))
    if arguments.json:
        data = {
            "task": config.data.task,
            "digest": sources.digest,
            "num_classes": sources.num_classes,
            "records": records,
            "baselines": [dataclasses.asdict(line) for line in lines],
        }
        shell.write(arguments.json, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
