"""Training from Python, in a script or a notebook: `from spectral_pod import SpectralTrainer`.

It writes a configuration and runs it: what `python -m spectral_pod.main` does is done here too, and
the tools read the workdir (`python -m tools.status WORKDIR`).
"""

import io
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from etils import epath

from spectral_pod import config as config_lib
from spectral_pod import fields, project_files, storage
from spectral_pod.api import Model, SpectralModel
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import NonNegativeFloat, Positive, shown
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.train import loop
from spectral_pod.train.sources import open_sources

_PAIR = ("text_1", "text_2")  # the columns of two documents
_POINTS = 20  # evaluations of a training, at most one an epoch


class SpectralTrainer:
    """Trains a new model on a data set; then the model has the trained parameters.

        model = SpectralLLM(Config(num_layers=4, hidden_dim=128, data={"seq_len": 256}))
        trainer = SpectralTrainer(model=model, dataset="texts/*.txt", spectral_loss_weight=0.1)
        trainer.train(epochs=10)
        trainer.plot()
        model.generate("The signal processing approach", max_length=50)

    Attributes:
      model: the model.
      config: the configuration of the training; its fields may be set before `train`.
      workdir: of the run, with metrics and checkpoints.
    """

    def __init__(
        self,
        *,
        model: Model,
        dataset: str | Sequence[Any],
        validation: str | Sequence[Any] = "",
        learning_rate: float = 1e-3,
        spectral_loss_weight: float = 0.0,
        batch_size: int = 32,
        workdir: str = "",
        start_from: str = "",
    ):
        """A training of `model`, whose configuration is copied.

        Args:
          model: one that has not been trained.
          dataset: for a language model documents, each a str or bytes; for a classifier pairs of a
            document (or a tuple of documents) and its class, which is a number, or text. Or where
            there are such documents or records: a file, a folder or a glob, on disk or gs://, or
            `tfds:NAME/SPLIT`, as for the tasks `lm` and `records`.
          validation: the same for the validation; without it a tenth of the data is held out.
          learning_rate: the highest, of all parameters.
          spectral_loss_weight: of the consistency loss of `SpectralLLM`.
          batch_size: records, or windows of a language model, in a step.
          workdir: a folder or a gs:// URL; a temporary folder by default. A training that was
            interrupted goes on in its workdir.
          start_from: the workdir of a run of a model of the same sizes, whose parameters are
            trained further; by default they are random.

        Raises:
          ConfigError: the model has been trained, or an argument is out of its range.
          DataError: the data set is of another kind.
        """
        if not isinstance(model, Model):
            raise ConfigError(f"model is {shown(model)}; it must be a model of spectral_pod")
        if model.is_trained:
            raise ConfigError(
                "model has been trained; make a new one, which starts from its seed, or from a "
                "run's parameters with start_from=WORKDIR"
            )
        fields.check(NonNegativeFloat, spectral_loss_weight, "spectral_loss_weight")
        fields.check(NonNegativeFloat, learning_rate, "learning_rate")
        fields.check(Positive, batch_size, "batch_size")
        self.model = model
        self.workdir = workdir or tempfile.mkdtemp(prefix="spectral_pod-")
        self.config = config_lib.copy(model.config)
        self._classifies = isinstance(model, SpectralModel)
        self.config.data.task = "records" if self._classifies else "lm"
        self.config.data.dir = f"{self.workdir}/data"
        options: dict[str, Any] = {"train": self._source(dataset, "train")}
        if validation:
            options["validation"] = self._source(validation, "validation")
        if self.config.data.documents == len(_PAIR) and not isinstance(dataset, str):
            options["data"] = _PAIR
        self.config.data.options = config_lib.ConfigDict(options)
        self.config.optimizer.learning_rate = float(learning_rate)
        self.config.optimizer.dynamics_learning_rate = float(learning_rate)
        self.config.model.consistency_weight = float(spectral_loss_weight)
        self.config.train.global_batch_size = batch_size
        if start_from:
            self.config.train.start_from = storage.place(start_from, "start_from")
        self.config.train.eval_split = "validation"

    def _source(self, dataset: str | Sequence[Any], split: str) -> str:
        """Where the task finds a data set, which is written if it is in memory."""
        if isinstance(dataset, str):
            return dataset
        if not len(dataset):
            raise DataError(f"the {split} data set is empty")
        columns = {"text": _documents(dataset)} if not self._classifies else self._labelled(dataset)
        if local := not self.workdir.startswith("gs://"):
            os.makedirs(self.workdir, exist_ok=True)
        file = f"{self.workdir if local else tempfile.mkdtemp()}/{split}.parquet"
        pa.parquet.write_table(pa.table(columns), file)
        return file

    def _labelled(self, dataset: Sequence[Any]) -> dict[str, list[Any]]:
        """The columns of a classifier's data set: of each document of a record, and its class."""
        number = self.config.data.documents
        for i, record in enumerate(dataset):
            is_pair = isinstance(record, (tuple, list)) and len(record) == 2
            one_or_two = (number == 1) != (is_pair and isinstance(record[0], (tuple, list)))
            if not (is_pair and one_or_two and (number == 1 or len(record[0]) == number)):
                first = "document" if number == 1 else "(document, document)"
                raise DataError(f"record {i} is {shown(record)}; it must be ({first}, class)")
        labels = [str(label) for _, label in dataset]
        if number == 1:
            return {"text": _documents([one for one, _ in dataset]), "label": labels}
        texts = {
            name: _documents([record[i] for record, _ in dataset]) for i, name in enumerate(_PAIR)
        }
        return texts | {"label": labels}

    def train(self, epochs: int = 1) -> dict[str, Any]:
        """Trains for a number of passes over the data; returns the metrics of the validation.

        Prints its progress, as the trainer does. The learning rate rises for the first tenth of the
        steps, and falls to zero by a cosine at the end.

        Raises:
          UserError: the data or the configuration cannot be used; the message says why.
        """
        fields.check(Positive, epochs, "epochs")
        if self.model.is_trained:
            raise ConfigError("the model has been trained; make a new one and a new trainer")
        sources = open_sources(self.config)
        if self._classifies and sources.num_classes != self.model.num_classes:
            raise DataError(
                f"the data set has {sources.num_classes} classes, and the model "
                f"{self.model.num_classes}; make it with num_classes={sources.num_classes}"
            )
        steps = epochs * sources.training().steps_per_epoch
        train = self.config.train
        train.total_steps = steps
        train.eval_every_steps = max(1, steps // min(epochs, _POINTS))
        train.log_every_steps = max(1, min(train.log_every_steps, steps // 10))
        self.config.checkpoint.every_steps = train.eval_every_steps
        self.config.optimizer.warmup_steps = max(1, steps // 10)
        result = loop.run(self.config, self.workdir)
        trained = restore_for_inference(self.workdir, mesh=self.model.mesh, dtype="float32")
        self.model.use(trained)
        evaluation: dict[str, Any] = result["eval"]
        return evaluation

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of the training and its validations, by step, as in metrics.jsonl."""
        file = epath.Path(self.workdir) / "metrics.jsonl"
        return project_files.Log(file, project_files.METRICS).lines

    def plot(self, metric: str = "loss") -> Any:
        """A figure of matplotlib with the curves of a metric, which a notebook shows.

        Raises:
          ConfigError: there is no such metric.
        """
        from matplotlib.figure import Figure

        class Curves(Figure):
            def _repr_png_(self) -> bytes:  # notebooks know figures of pyplot only
                file = io.BytesIO()
                self.savefig(file, format="png")
                return file.getvalue()

        figure = Curves(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for split in ("train", "validation"):
            name = f"{split}/{metric}"
            points = [(line["step"], line[name]) for line in self.history if name in line]
            if points:
                axes.plot(*zip(*points), marker=".", label=split)
        if not axes.lines:
            raise ConfigError(f"{self.workdir} has no metric {metric!r}; train first, or ask for "
                              "'loss' or 'accuracy'")  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel(metric)
        axes.legend()
        return figure


def _documents(dataset: Sequence[Any]) -> list[bytes]:
    for i, document in enumerate(dataset):
        if not isinstance(document, (str, bytes)):
            raise DataError(f"document {i} is {shown(document)}; it must be str or bytes")
    return [x.encode() if isinstance(x, str) else x for x in dataset]
