"""Objectives: the layout of the labels, the loss, the metrics, and how results are reported.

A task names its objective by class. A new metric of it is one entry in `training_metrics` or in
`evaluation_metrics`, and in `descriptions` a sentence on it; it is then reported wherever metrics
are: numbers in `metrics.jsonl`, in TensorBoard, in the printed lines and in `result.json`, arrays
in `result.json` and, as `details` of the last evaluation, in print and in TensorBoard.
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

MAX_TABLE = 32  # classes of which all pairs are counted and shown
WORST_PAIRS = 20
NUM_SHOWN = 16  # records of an evaluation that are shown with their predictions
_MAX_NAME = 24  # letters of a class's name in a report
_MEANS = (
    "In training: over the steps since the last point, with dropout and label smoothing where they "
    "are configured. In evaluations: over the whole split, without them"
)


@flax.struct.dataclass
class Count(metrics.Metric):
    """The number of valid labels."""

    total: jax.Array  # int32

    @classmethod
    def from_model_output(cls, mask: jax.Array, **_: Any) -> Self:
        return cls(jnp.sum(mask.astype(jnp.int32)))

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total)

    def compute(self) -> jax.Array:
        return self.total


@flax.struct.dataclass
class Confusion(metrics.Metric):
    """Which classes are taken for which, over valid rows: "confusion", the counts of [true class,
    predicted class]; of more than MAX_TABLE classes "confused", lists of true class, predicted
    class and count, for the WORST_PAIRS pairs of different classes that are most frequent.
    """

    # Up to MAX_TABLE classes the counts, int32 [C, C]. Of more, which might not fit into memory,
    # the true and the predicted class of every row, int32 [2, B] of each batch, -1 for no row.
    parts: tuple[jax.Array, ...]
    num_classes: int = flax.struct.field(pytree_node=False)

    @classmethod
    def from_model_output(
        cls, labels: jax.Array, logits: jax.Array, mask: jax.Array, **_: Any
    ) -> Self:
        num_classes = logits.shape[-1]
        predicted_B = jnp.argmax(logits, axis=-1)
        if num_classes > MAX_TABLE:
            pairs_2B = jnp.stack([labels, predicted_B.astype(labels.dtype)])
            return cls((jnp.where(mask, pairs_2B, -1),), num_classes)
        true_BC = jax.nn.one_hot(labels, num_classes) * mask[:, None].astype(jnp.float32)
        predicted_BC = jax.nn.one_hot(predicted_B, num_classes)
        counts = jnp.einsum("bt,bp->tp", true_BC, predicted_BC).astype(jnp.int32)
        return cls((counts,), num_classes)

    def merge(self, other: Self) -> Self:
        parts = self.parts + other.parts
        if self.num_classes <= MAX_TABLE:
            parts = (parts[0] + parts[1],)
        return type(self)(parts, self.num_classes)

    def compute(self) -> dict[str, list[list[int]]]:  # type: ignore[override]
        parts = list(map(np.asarray, self.parts))
        if self.num_classes <= MAX_TABLE:
            return {"confusion": parts[0].tolist()}
        true_N, predicted_N = np.concatenate(parts, axis=1)
        codes_N = true_N.astype(np.int64) * self.num_classes + predicted_N
        codes, counts = np.unique(codes_N[true_N != predicted_N], return_counts=True)
        worst = np.argsort(-counts, kind="stable")[:WORST_PAIRS]
        pairs = *np.divmod(codes[worst], self.num_classes), counts[worst]
        return {"confused": np.stack(pairs, axis=1).tolist()}


@flax.struct.dataclass
class FirstPredictions(metrics.Metric):
    """The predicted classes of the first rows of the first batch: int32 [NUM_SHOWN], whatever the
    size of the batch, as all devices exchange them; 0 beyond its rows."""

    predicted: jax.Array

    @classmethod
    def from_model_output(cls, logits: jax.Array, **_: Any) -> Self:
        predicted_B = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # A sum rather than a slice: rows are spread over devices, which would exchange them.
        is_row_Bn = jnp.eye(len(predicted_B), NUM_SHOWN, dtype=bool)
        return cls(jnp.sum(jnp.where(is_row_Bn, predicted_B[:, None], 0), axis=0))

    def merge(self, other: Self) -> Self:
        return self

    def compute(self) -> jax.Array:
        return self.predicted


class Objective:
    """What a model is trained for and how it is evaluated. The classes are used without instances.

    Attributes:
      by_position: labels are [B, L], one for every position, rather than [B], one for every row.
      for_causal_models: of labels by position: positions must not see later ones.
      is_language_model: the labels are the bytes that follow, in windows of a stream of documents.
      training_metrics: CLU metrics by name, computed from `loss` and `correct` (float32) and `mask`
        (bool), all of the labels' shape.
      evaluation_metrics: the same for evaluations, computed from `logits`, `tokens` and `labels`
        too.
      count: the evaluation metric that says how many labels there were; it is not plotted.
      ranked_by: the evaluation metric that ranks checkpoints.
      higher_is_better: of `ranked_by`.
      formats: how the printed lines show a metric. "" leaves it out; the default is "NAME VALUE".
      descriptions: what a plotted metric is, a sentence that TensorBoard shows beside its curve.
    """

    by_position: ClassVar[bool]
    for_causal_models: ClassVar[bool] = True
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
    descriptions: ClassVar[dict[str, str]] = {
        "loss": f"Mean cross-entropy of a label, in nats. {_MEANS}",
        "accuracy": f"Fraction of labels that are predicted, in [0, 1]. {_MEANS}",
    }

    def __init_subclass__(cls) -> None:
        # Copies of the dictionaries: new entries must not change the class it inherits from.
        for name in ("training_metrics", "evaluation_metrics", "formats", "descriptions"):
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
        "first_predictions": FirstPredictions,
    }

    @classmethod
    def details(cls, values: Mapping[str, Any], classes: list[str]) -> list[str]:
        if "confusion" in values:
            return [confusion_table(values["confusion"], classes)]
        return [worst_pairs(values["confused"], classes)]


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
    descriptions: ClassVar = Objective.descriptions | {
        "bits_per_byte": f"The loss in bits. {_MEANS}",
        "perplexity": "exp(loss), of a byte",
        "word_perplexity": "exp(nats of all labels / words), where an end of a line is a word too",
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


class NextToken(NextByte):
    """The token that follows, likewise, of a vocabulary larger than that of bytes.

    Perplexity is of a token. How many bytes and words its tokens stand for is known of a whole
    split only: evaluations are given its `totals`, and divide the nats of all labels by those of
    the original text, so that the figures compare with those of models of bytes and of words. (The
    first token of a split is not predicted, and its bytes are counted.)
    """

    evaluation_metrics: ClassVar = LabelledPositions.evaluation_metrics
    descriptions: ClassVar = NextByte.descriptions | {
        "bits_per_byte": "Bits of all labels / bytes of the original text, of whole splits",
        "perplexity": "exp(loss), of a token",
    }

    @classmethod
    def derived(cls, scalars: Mapping[str, float]) -> dict[str, float]:
        return {"perplexity": _exp(scalars["loss"])}

    @classmethod
    def scalars(cls, values: Mapping[str, Any]) -> dict[str, float]:
        """See `NextByte.scalars`; also bits per byte, of evaluations."""
        scalars = super().scalars({k: x for k, x in values.items() if k != "bytes"})
        if "bytes" in values:
            nats = values["loss"] * values[cls.count]
            scalars["bits_per_byte"] = nats / values["bytes"] / math.log(2)
        return scalars


def _exp(nats: float) -> float:
    return math.exp(min(nats, 80.0))  # a bad start must not overflow, nor as float32


def computed(collection: metrics.Collection) -> dict[str, Any]:
    """The metrics of a collection as Python numbers and nested lists."""
    values: dict[str, Any] = {}
    for name, x in collection.compute().items():
        values |= x if isinstance(x, dict) else {name: np.asarray(x).tolist()}
    return values


def confusion_table(confusion: list[list[int]], classes: list[str]) -> str:
    """A table of true (rows) against predicted (columns) classes, with the recall of each row."""
    names = list(map(_shown, classes))
    width = max(6, max(map(len, names)) + 1)
    lines = [" " * width + "".join(f"{name[:6]:>7}" for name in names) + "  recall"]
    for i, (name, row) in enumerate(zip(names, confusion)):
        recall = row[i] / max(sum(row), 1)
        cells = "".join(f"{count:>7}" if count else f"{'.':>7}" for count in row)
        lines.append(f"{name:<{width}}{cells}  {recall:6.1%}")
    return "\n".join(lines)


def worst_pairs(pairs: list[list[int]], classes: list[str]) -> str:
    """A line for each list of a true class, what was predicted, and how often."""
    lines = [f"most confused of {len(classes):,} classes:" + ("" if pairs else " none")]
    for true, predicted, count in pairs:
        lines.append(
            f"{count:>7,}  {_shown(classes[true])}, taken for {_shown(classes[predicted])}"
        )
    return "\n".join(lines)


def _shown(name: str) -> str:
    """A name in one line and of limited length."""
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"
