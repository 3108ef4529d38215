"""Objectives: the layout of the labels, the loss, the metrics, and how results are reported.

A task names its objective by class. A new metric is one entry in `training_metrics` or in
`evaluation_metrics`; it is then reported wherever metrics are: numbers in `metrics.jsonl`, in
TensorBoard, in the printed lines and in `result.json`, arrays in `result.json`.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from spectral_pod.ops.cross_entropy import cross_entropy


@flax.struct.dataclass
class _Sum(metrics.Metric):
    total: jax.Array  # int32

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total)

    def compute(self) -> jax.Array:
        return self.total


@flax.struct.dataclass
class Count(_Sum):
    """The number of valid labels."""

    @classmethod
    def from_model_output(cls, mask: jax.Array, **_: Any) -> Self:
        return cls(jnp.sum(mask.astype(jnp.int32)))


@flax.struct.dataclass
class Confusion(_Sum):
    """Counts of [true class, predicted class] over valid rows."""

    @classmethod
    def from_model_output(
        cls, labels: jax.Array, logits: jax.Array, mask: jax.Array, **_: Any
    ) -> Self:
        num_classes = logits.shape[-1]
        true_BC = jax.nn.one_hot(labels, num_classes) * mask[:, None].astype(jnp.float32)
        predicted_BC = jax.nn.one_hot(jnp.argmax(logits, axis=-1), num_classes)
        return cls(jnp.einsum("bt,bp->tp", true_BC, predicted_BC).astype(jnp.int32))


class Objective:
    """What a model is trained for and how it is evaluated. The classes are used without instances.

    Attributes:
      by_position: labels are [B, L], one for every position, rather than [B], one for every row.
      is_language_model: the labels are the bytes that follow, in windows of a stream of documents.
      training_metrics: CLU metrics by name, computed from `loss` and `correct` (float32) and `mask`
        (bool), all of the labels' shape.
      evaluation_metrics: the same for evaluations, computed from `logits`, `tokens` and `labels`
        too.
      count: the evaluation metric that says how many labels there were; it is not plotted.
      ranked_by: the evaluation metric that ranks checkpoints.
      higher_is_better: of `ranked_by`.
      formats: how the printed lines show a metric. "" leaves it out; the default is "NAME VALUE".
    """

    by_position: ClassVar[bool]
    is_language_model: ClassVar[bool] = False
    training_metrics: ClassVar[dict[str, type[metrics.Metric]]] = {
        "loss": metrics.Average.from_output("loss"),
        "accuracy": metrics.Average.from_output("correct"),
    }
    evaluation_metrics: ClassVar[dict[str, type[metrics.Metric]]]
    count: ClassVar[str]
    ranked_by: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    formats: ClassVar[dict[str, str]] = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.2%}"}

    def __init_subclass__(cls) -> None:
        # Copies of the dictionaries: new entries must not change the class it inherits from.
        for name in ("training_metrics", "evaluation_metrics", "formats"):
            setattr(cls, name, dict(getattr(cls, name, {})))

    @classmethod
    def outputs(
        cls, logits: jax.Array, labels: jax.Array, valid: jax.Array, smoothing: float = 0.0
    ) -> dict[str, jax.Array]:
        """The loss in nats and whether the prediction is right, of every label; and which count.

        Args:
          logits: float32 [B, C] or [B, L, C].
          labels, valid: int32 and bool [B] or [B, L].
          smoothing: of the labels, towards the uniform distribution.
        """
        return {
            "loss": cross_entropy(logits, labels, smoothing),
            "correct": (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32),
            "mask": valid,
        }

    @classmethod
    def derived(cls, scalars: Mapping[str, float]) -> dict[str, float]:
        """Further scalars that follow from the metrics."""
        return {}

    @classmethod
    def scalars(cls, values: Mapping[str, Any]) -> dict[str, float]:
        """What is plotted of `computed` metrics: numbers, and what is derived from them."""
        numbers = {k: x for k, x in values.items() if isinstance(x, int | float) and k != cls.count}
        return numbers | cls.derived(numbers)

    @classmethod
    def scores(cls, values: Mapping[str, float]) -> dict[str, float]:
        """What a checkpoint records of its validation; the best has the highest `score`."""
        score = values[cls.ranked_by] if cls.higher_is_better else -values[cls.ranked_by]
        return {"score": score} | {k: values[k] for k in cls.training_metrics if k in values}

    @classmethod
    def line(cls, values: Mapping[str, Any]) -> str:
        """`computed` metrics for the printed lines."""
        scalars = cls.scalars(values).items()
        parts = (cls.formats.get(name, name + " {:.4f}").format(x) for name, x in scalars)
        return "  ".join(filter(None, parts))

    @classmethod
    def eval_line(cls, split: str, values: Mapping[str, Any]) -> str:
        """The result of an evaluation in a line."""
        return f"{split}: {cls.line(values)}  on {values[cls.count]:,} {cls.count}"

    @classmethod
    def details(cls, values: Mapping[str, Any], classes: list[str]) -> list[str]:
        """What is printed of the last evaluation besides its line."""
        return []


class Classification(Objective):
    """One label a record."""

    by_position = False
    count = "records"
    evaluation_metrics: ClassVar = Objective.training_metrics | {
        "records": Count,
        "confusion": Confusion,
    }

    @classmethod
    def details(cls, values: Mapping[str, Any], classes: list[str]) -> list[str]:
        return [confusion_table(values["confusion"], classes)]


class LabelledPositions(Objective):
    """Labels at some of the positions of an example."""

    by_position = True
    count = "positions"
    evaluation_metrics: ClassVar = Objective.training_metrics | {"positions": Count}


@flax.struct.dataclass
class Words(Count):
    """The number of words and line ends among valid labels, which are the bytes after `tokens`.

    A word is a run of bytes that are no ASCII white space, and counts where it ends.
    """

    @classmethod
    def from_model_output(cls, mask: jax.Array, **outputs: Any) -> Self:
        tokens, labels = outputs["tokens"], outputs["labels"]
        in_word = (tokens < 256) & ~_is_space(tokens)
        ends = in_word & ((labels >= 256) | _is_space(labels))  # 256: the end of a document
        counts = ends.astype(jnp.int32) + (labels == ord("\n")).astype(jnp.int32)
        return cls(jnp.sum(jnp.where(mask, counts, 0)))


def _is_space(byte: jax.Array) -> jax.Array:
    return (byte == ord(" ")) | ((byte >= ord("\t")) & (byte <= ord("\r")))


class NextByte(LabelledPositions):
    """The byte that follows, everywhere in a stream of documents.

    Bits per byte and perplexity are of all labels: the end of a document counts as a byte. Word
    perplexity is exp(nats of all labels / words), where every end of a line is a word too. That is
    how WikiText counts (Merity et al. 2016, "Pointer sentinel mixture models": 217,646 and 245,569
    for validation and test), so the figure compares with those of word-level models on that corpus.
    """

    is_language_model = True
    ranked_by = "loss"
    higher_is_better = False
    evaluation_metrics: ClassVar = LabelledPositions.evaluation_metrics | {"words": Words}
    formats: ClassVar = {
        "loss": "{:.4f} nats",
        "accuracy": "",
        "bits_per_byte": "{:.4f} bits per byte",
        "perplexity": "perplexity {:.3f}",
        "word_perplexity": "word perplexity {:.5g}",
    }

    @classmethod
    def derived(cls, scalars: Mapping[str, float]) -> dict[str, float]:
        nats = scalars["loss"]
        return {"bits_per_byte": nats / math.log(2), "perplexity": _exp(nats)}

    @classmethod
    def scalars(cls, values: Mapping[str, Any]) -> dict[str, float]:
        """See `Objective.scalars`; also of evaluations, of a text with words, their perplexity."""
        words = values.get("words", 0)
        scalars = super().scalars({k: x for k, x in values.items() if k != "words"})
        if words:
            nats = values["loss"] * values[cls.count]
            scalars["word_perplexity"] = _exp(nats / words)
        return scalars


def _exp(nats: float) -> float:
    return math.exp(min(nats, 80.0))  # a bad start must not overflow, nor as float32


def computed(collection: metrics.Collection) -> dict[str, Any]:
    """The metrics of a collection as Python numbers and nested lists."""
    return {name: np.asarray(x).tolist() for name, x in collection.compute().items()}


def confusion_table(confusion: list[list[int]], classes: list[str]) -> str:
    """A table of true (rows) against predicted (columns) classes, with the recall of each row."""
    width = max(6, max(len(name) for name in classes) + 1)
    lines = [" " * width + "".join(f"{name[:6]:>7}" for name in classes) + "  recall"]
    for name, row in zip(classes, confusion):
        recall = row[classes.index(name)] / max(sum(row), 1)
        cells = "".join(f"{count:>7}" if count else f"{'.':>7}" for count in row)
        lines.append(f"{name:<{width}}{cells}  {recall:6.1%}")
    return "\n".join(lines)
