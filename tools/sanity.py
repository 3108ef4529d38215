"""Whether a training of this configuration can be believed: a verdict, with its reasons and plots.

    python -m tools.sanity --config=configs/quickstart.py --out=DIR [--quick] [--steps=300] \\
        [--config.field=value ...]

Trains the model twice, with the trainer itself and without dropout, weight decay and label
smoothing: first 100 examples, to be learned by heart, then --steps steps of the training split. The
checks are

    memorises        the loss on the 100 examples falls to a tenth of that of label frequencies
    labels           the second model is better than label frequencies on held-out examples.
                     Shuffled labels can be memorised, but not predicted. This costs one short
                     training; to compare it with one on permuted labels would cost another
    layers           every layer adds to the residual stream, gets gradients, and is updated
    gates, decays    are in [0, 1]; activations keep their size from layer to layer
    gradients        equal finite differences of the loss, by optimizer group, in float32
    causality        of causal models: later bytes change no earlier logits
    padding          of encoders: padding changes no logits

Each says what it found and needs; the reasons of the thresholds are in DIR/sanity.json. Exit code 0
if all are sound, 1 if not. DIR also gets the plots as PNG: activations, gradients, updates, filter
responses, decays, gates and memories by layer over the first training; and both workdirs, whose
pictures TensorBoard shows. --quick takes 16 examples and 100 steps.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from spectral_pod import config as config_lib
from spectral_pod import storage
from spectral_pod.config import Config
from spectral_pod.data import pipeline
from spectral_pod.errors import ConfigError, NonFiniteError
from spectral_pod.fields import Positive
from spectral_pod.generate.restore import Trained, restore_for_inference
from spectral_pod.parallel import backend, runtime
from spectral_pod.shapes import PAD
from spectral_pod.train import loop, probe_plots
from spectral_pod.train.probes import History, read_history
from spectral_pod.train.sources import Sources, open_sources

from . import sanity_checks as checks
from . import shell
from .sanity_checks import Check

EXAMPLES, STEPS = 100, 300
QUICK_EXAMPLES, QUICK_STEPS = 16, 100
_PROBES = 10  # of the first training
_ROWS = 8  # of the trained models' probes
_HELD_OUT = 256  # examples; as many training examples give the label frequencies


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("sanity", __doc__)
    parser.add_config()
    parser.add_place(
        "--out", local=True, required=True, metavar="DIR", help="a new or empty folder"
    )
    parser.add_argument("--quick", action="store_true", help="fewer examples and steps")
    parser.add_value("--steps", Positive, help=f"of each training; by default {STEPS}")
    return shell.run(parser, _main, argv)


def _main(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if os.path.isdir(out) and os.listdir(out):
        raise ConfigError(f"--out is {out!r}, which is not empty; give a new folder")
    os.makedirs(out, exist_ok=True)
    runtime.initialize(None, 1, 0)
    backend.enable_compilation_cache(out)  # both trainings have the same programs
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    examples = QUICK_EXAMPLES if arguments.quick else EXAMPLES
    found = []
    for check in run(arguments.config, out, examples=examples, steps=steps):
        found.append(check)
        print(check.line(), flush=True)
    sound = all(check.sound for check in found)
    report = {"sound": sound, "checks": [check._asdict() for check in found]}
    storage.write_whole(epath.Path(out) / "sanity.json", json.dumps(report, indent=1) + "\n")
    unsound = [check.name for check in found if not check.sound]
    print(f"{'sound' if sound else 'NOT SOUND: ' + '; '.join(unsound)}; see {out}/sanity.json")
    for check in found:
        if not check.sound:
            print(f"  {check.name} needs {check.why}")
    return 0 if sound else 1


def run(config: Config, out: str, *, examples: int, steps: int) -> Iterator[Check]:
    """Trains and checks a configuration; yields each check when it is made.

    Args:
      config: the configuration; its steps, regularization and evaluations are replaced.
      out: an existing local folder.
      examples: how many are to be memorised.
      steps: of each training.
    """
    config = prepared(config, steps)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the checks
        sources = open_sources(config)
    try:
        yield from _memorise(config, sources, examples, f"{out}/memorise")
        yield from _learn(config, sources, f"{out}/learn")
    except NonFiniteError as error:
        yield Check("training", False, str(error), "a finite loss, and finite gradients")
    finally:
        figures = probe_plots.figures(read_history(f"{out}/memorise"))
        for name, figure in figures.items():
            figure.savefig(f"{out}/{name}.png")


def prepared(config: Config, steps: int) -> Config:
    """The configuration of both trainings: as given, without what keeps a model from learning its
    training examples by heart."""
    config = config_lib.copy(config)
    config.model.dropout = config.train.label_smoothing = config.optimizer.weight_decay = 0.0
    config.model.spectral.kernel_dropout = 0.0
    config.optimizer.average = 0.0
    config.optimizer.warmup_steps = max(1, steps // 10)
    config.data.train_records = 0
    train = config.train
    train.total_steps = train.eval_every_steps = config.checkpoint.every_steps = steps
    train.log_every_steps = max(1, steps // 10)
    train.probe_every_steps = max(1, steps // _PROBES)
    train.eval_split = "train"
    train.sample_bytes = 0
    train.profile_steps = ()
    train.wandb_project = ""
    train.on_bad_step, train.spike_factor = "stop", 0.0
    config.checkpoint.keep_best = 0
    return config


class Given(Sources):
    """The sources of a run whose training and evaluation are on given examples."""

    given: tuple[pipeline.Source, pipeline.Source]

    def training(self) -> pipeline.Source:
        return self.given[0]

    def evaluation(self, split: str) -> dict[str, pipeline.Source]:
        return {self.task.name: self.given[1]}


def given(sources: Sources, training: pipeline.Source, evaluation: "Repeated") -> Given:
    """The same sources with other examples: endless ones for training, and some to evaluate."""
    batch_size = sources.config.train.eval_batch_size
    once = dataclasses.replace(evaluation, batch_size=batch_size, endless=False)
    few = f"{training.num_records} and {evaluation.num_records} examples"
    replaced = Given(*sources)._replace(digest=f"{sources.digest}, {few}")
    replaced.given = training, once
    return replaced


@dataclasses.dataclass
class Repeated:
    """Batches of the same few examples, see `pipeline.Source`.

    Attributes:
      stored: the examples.
      batch_size, seq_len: as of the source that they are from.
      endless: whether they come again and again, or once.
    """

    stored: pipeline.Batch
    batch_size: int
    seq_len: int
    endless: bool = True

    @classmethod
    def of(cls, source: pipeline.Source, count: int) -> "Repeated":
        """The first examples of a source; fewer than `count` if it has no more."""
        count = min(count, source.num_records or count)
        batches = first_batches(source, count)
        stored = {name: np.concatenate([b[name] for b in batches])[:count] for name in batches[0]}
        return cls(stored, source.batch_size, source.seq_len)

    @property
    def num_records(self) -> int:
        return len(self.stored["tokens"])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_records // self.batch_size)

    def rows(self, step: int, rows: np.ndarray) -> pipeline.Batch:
        position = step * self.batch_size + rows
        batch = {name: x[position % self.num_records] for name, x in self.stored.items()}
        if not self.endless:
            padded = position >= self.num_records
            batch["tokens"][padded], batch["valid"][padded] = PAD, False
        return batch


def first_batches(source: pipeline.Source, count: int) -> list[pipeline.Batch]:
    """The first batches of a source, with at least `count` rows together."""
    rows = np.arange(source.batch_size)
    return [source.rows(step, rows) for step in range(-(-count // source.batch_size))]


def _memorise(config: Config, sources: Sources, examples: int, workdir: str) -> Iterator[Check]:
    """Trains on few examples, and checks the probes of this training.

    Raises:
      ConfigError: all of these examples have the same label.
    """
    few = Repeated.of(sources.training(), examples)
    labels = few.stored["labels"][few.stored["valid"]]
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    if len(shares) < 2:
        raise ConfigError(
            f"the first {few.num_records} training examples of config.data.task = "
            f"{config.data.task!r} have one label, so there is nothing to learn"
        )
    shell.say(f"Training on {few.num_records} examples, in {workdir}")
    result = _train(config, workdir, given(sources, few, few))
    trivial = float(-np.sum(shares * np.log(shares)))
    yield checks.memorised(result["eval"]["loss"], trivial, few.num_records)
    history: History = read_history(workdir)
    yield checks.finite(history)
    yield checks.reached(history)
    yield checks.moved(history)
    yield from checks.bounded(history)


def _learn(config: Config, sources: Sources, workdir: str) -> Iterator[Check]:
    """Trains on the training split, and checks the trained model."""
    training = sources.training()
    held_out = Repeated.of(next(iter(sources.evaluation("validation").values())), _HELD_OUT)
    shell.say(f"Training on the training split, in {workdir}")
    _train(config, workdir, given(sources, training, held_out))
    trained: Trained = restore_for_inference(workdir)
    batches = first_batches(training, _HELD_OUT)
    frequencies_C = checks.label_frequencies(batches, sources.num_classes)
    yield checks.learns(checks.held_out(trained, held_out.stored, frequencies_C))
    few = {name: x[:_ROWS] for name, x in batches[0].items()}
    yield checks.gradients(trained, few)
    probe = checks.causality if trained.module.causal else checks.padding
    yield probe(trained, few["tokens"])


def _train(config: Config, workdir: str, sources: Sources) -> dict[str, Any]:
    with contextlib.redirect_stdout(sys.stderr):
        return loop.run(config, workdir, sources=sources)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
