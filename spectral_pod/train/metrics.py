"""What is measured: CLU collections for averages over examples, norms by parameter group."""

import math
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from clu import metrics


@flax.struct.dataclass
class Averages(metrics.Collection):
    """Means over valid examples; merges over steps and evaluation batches."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: metrics.Average.from_output("correct")  # type: ignore[valid-type]


@flax.struct.dataclass
class Confusion(metrics.Metric):
    """Counts of [true class, predicted class] over valid examples."""

    count_CC: jax.Array

    @classmethod
    def from_model_output(
        cls, labels: jax.Array, logits: jax.Array, mask: jax.Array, **_: Any
    ) -> "Confusion":
        num_classes = logits.shape[-1]
        true_BC = jax.nn.one_hot(labels, num_classes) * mask[:, None].astype(jnp.float32)
        predicted_BC = jax.nn.one_hot(jnp.argmax(logits, axis=-1), num_classes)
        return cls(jnp.einsum("bt,bp->tp", true_BC, predicted_BC))

    def merge(self, other: "Confusion") -> "Confusion":
        return Confusion(self.count_CC + other.count_CC)

    def compute(self) -> jax.Array:
        return self.count_CC


@flax.struct.dataclass
class Evaluation(metrics.Collection):
    """The averages and the confusion table of an evaluation."""

    # Stated again: CLU reads a collection's own annotations only.
    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: metrics.Average.from_output("correct")  # type: ignore[valid-type]
    confusion: Confusion


@flax.struct.dataclass
class Count(metrics.Metric):
    """How many valid examples there were."""

    total: jax.Array

    @classmethod
    def from_model_output(cls, mask: jax.Array, **_: Any) -> "Count":
        return cls(jnp.sum(mask.astype(jnp.int32)))

    def merge(self, other: "Count") -> "Count":
        return Count(self.total + other.total)

    def compute(self) -> jax.Array:
        return self.total


@flax.struct.dataclass
class Predictions(metrics.Collection):
    """The averages over the labelled positions of an evaluation, and how many they are."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: metrics.Average.from_output("correct")  # type: ignore[valid-type]
    positions: Count


def derived(objective: str, values: Mapping[str, float]) -> dict[str, float]:
    """`loss` and `accuracy`, and what follows from the loss of a language model per byte."""
    if objective != "next":
        return {name: values[name] for name in ("loss", "accuracy")}
    nats = values["loss"]
    return {
        "loss": nats,
        "accuracy": values["accuracy"],
        "bits_per_byte": nats / math.log(2),
        "perplexity": math.exp(min(nats, 100.0)),  # a bad start must not overflow
    }


def scores_of(objective: str, result: Mapping[str, float]) -> dict[str, float]:
    """What a checkpoint records of its validation; the best has the highest `score`."""
    score = -result["loss"] if objective == "next" else result["accuracy"]
    return {"score": score, "loss": result["loss"], "accuracy": result["accuracy"]}


def summary(objective: str, values: Mapping[str, float]) -> str:
    """What a line to the user says of `derived` values."""
    if objective != "next":
        return f"loss {values['loss']:.4f}  accuracy {values['accuracy']:.2%}"
    return (
        f"{values['loss']:.4f} nats  {values['bits_per_byte']:.4f} bits per byte  "
        f"perplexity {values['perplexity']:.3f}"
    )


def norms(tree: Any, groups: Any) -> dict[str, jax.Array]:
    """The Euclidean norms of parameters or gradients, by top-level module, dynamics apart.

    Args:
      groups: the optimizer group of every parameter.
    """
    squares: dict[str, jax.Array] = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), kind in zip(leaves, jax.tree.leaves(groups), strict=True):
        total = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        group = str(path[0].key) + (".dynamics" if kind == "dynamics" else "")
        squares[group] = squares[group] + total if group in squares else total
    return {group: jnp.sqrt(total) for group, total in squares.items()}
