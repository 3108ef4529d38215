"""What a classification task is worth without a model that knows order.

    python -m tools.baseline --config=configs/quickstart.py [--config.field=value ...]
    ... --json=FILE

Prints the accuracy on the test split of the most frequent class, and of logistic regression on
byte histograms: how often each byte occurs in each document of a record. Where a record is two
documents, a third figure adds how far their histograms differ, byte by byte. The regression is
fitted to the training split, the strength of its L2 penalty is the best on the validation split.
The data are those of the run: the same store, written if there is none, or stores, their records
taken together without weights; and the same cut to config.data.seq_len.
"""

import contextlib
import dataclasses
import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from spectral_pod import command_line
from spectral_pod.data import pipeline, tasks
from spectral_pod.data.progress import Progress
from spectral_pod.errors import ConfigError, UserError
from spectral_pod.parallel import runtime
from spectral_pod.train.sources import Sources, open_sources
from spectral_pod.validation import validate

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file, too.")
flags.mark_flag_as_required("config")

SPLITS = ("train", "validation", "test")
PENALTIES = (
    1.0,
    1e-1,
    1e-2,
    1e-3,
    1e-4,
)  # L2, on the mean loss; the strong ones, which fit fast, first
_MAX_ITERATIONS = 1000


class Histograms(NamedTuple):
    """Byte frequencies of a split: float32 [n, documents, 256], and labels int32 [n]."""

    frequencies: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One line of the table; accuracies are fractions, of the test split and of validation."""

    name: str
    test: float
    validation: float
    penalty: float | None = None
    converged: bool = True


def histograms(source: pipeline.Source, documents: int, name: str) -> Histograms:
    """Counts the bytes of a split, batch by batch, and says of `name` how far it is.

    A document without bytes has frequencies of 0.
    """
    frequencies = np.zeros((source.num_records, documents, 256), np.float32)
    labels = np.zeros(source.num_records, np.int32)
    progress = Progress(f"Counting {name}", source.num_records, "records")
    done = 0
    for step in range(source.steps_per_epoch):
        batch = source.rows(step, np.arange(source.batch_size))
        valid = batch["valid"]
        here = slice(done, done := done + int(valid.sum()))
        lines = batch["tokens"][valid].reshape(-1, source.seq_len)
        counts = np.stack([np.bincount(line[line < 256], minlength=256) for line in lines])
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        frequencies[here] = shares.reshape(-1, documents, 256)
        labels[here] = batch["labels"][valid]
        progress.at(done)
    progress.end()
    return Histograms(frequencies, labels)


def majority(splits: dict[str, Histograms]) -> Baseline:
    """The most frequent class of the training split, always."""
    guess = np.bincount(splits["train"].labels).argmax()
    test, validation = (
        float(np.mean(splits[split].labels == guess)) for split in ("test", "validation")
    )
    return Baseline("majority class", test, validation)


def regression(
    name: str, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Baseline:
    """Multinomial logistic regression on features float32 [n, m], standardised on training data."""
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
        say(f"{name}: penalty {penalty:g}, validation {validation:.2%}, {left:.0f} s or more left")
    assert best is not None
    return best


def baselines(sources: Sources) -> tuple[list[Baseline], dict[str, int]]:
    """All lines of the table, and the records of each split.

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
    labels = {split: held.labels for split, held in splits.items()}
    if len(np.unique(labels["train"])) < 2:
        raise ConfigError(
            f"the training records of config.data.task = {sources.config.data.task!r} are all of "
            "one class; raise config.data.train_records"
        )
    flat = {split: x.frequencies.reshape(len(x.labels), -1) for split, x in splits.items()}
    lines = [majority(splits), regression("byte histograms", flat, labels)]
    if documents == 2:
        apart = {
            split: np.abs(x.frequencies[:, 0] - x.frequencies[:, 1]) for split, x in splits.items()
        }
        both = {split: np.concatenate([flat[split], apart[split]], axis=1) for split in SPLITS}
        lines.append(regression("byte histograms and their differences", both, labels))
    return lines, {split: len(x) for split, x in labels.items()}


def table(task: str, lines: Sequence[Baseline], records: dict[str, int], classes: int) -> str:
    """What is printed."""
    counts = ", ".join(f"{count:,} {split}" for split, count in records.items())
    width = max(len(line.name) for line in lines)
    rows = [f"{task}: {classes} classes, records {counts}", f"{'':{width}}  {'test':>7}"]
    for line in lines:
        notes = f"  penalty {line.penalty:g}" if line.penalty is not None else ""
        notes += "" if line.converged else f", not converged after {_MAX_ITERATIONS} iterations"
        rows.append(f"{line.name:{width}}  {line.test:>7.2%}{notes}")
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}; every option starts with --")
    runtime.initialize(None, 1, 0)
    config = _CONFIG.value
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
    print(table(config.data.task, lines, records, sources.num_classes))
    if _JSON.value:
        data = {
            "task": config.data.task,
            "digest": sources.digest,
            "num_classes": sources.num_classes,
            "records": records,
            "baselines": [dataclasses.asdict(line) for line in lines],
        }
        with open(_JSON.value, "w") as file:
            file.write(json.dumps(data, indent=1) + "\n")


def say(line: str) -> None:
    """Progress goes to stderr: the table is all that is on stdout."""
    print(line, file=sys.stderr, flush=True)


def run() -> None:
    """Runs `main`; an error that the user can cure is one message and exit code 2."""
    logging.getLogger().setLevel(logging.WARNING)
    try:
        app.run(main, flags_parser=command_line.parser(_CONFIG))
    except (UserError, OSError) as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(getattr(error, "exit_code", UserError.exit_code))


if __name__ == "__main__":
    run()
