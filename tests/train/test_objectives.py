"""The metrics of the objectives, and where they are reported."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.objectives import Classification, LabelledPositions, NextByte, computed
from spectral_pod.train import step
from tests import trainer


class Echo:
    """A model that predicts each token itself, or the first token of a row."""

    def __init__(self, by_position):
        self.by_position = by_position

    def apply(self, _, tokens_BL, mask_BL):
        logits_BLC = jnp.log(jnp.eye(4)[tokens_BL] * 0.6 + 0.1)
        return logits_BLC if self.by_position else logits_BLC[:, 0]


def evaluation(objective, labels, valid):
    tokens = np.asarray([[0, 1, 2], [3, 2, 1]], np.int32)
    batch = {"tokens": jnp.asarray(tokens), "labels": labels, "valid": valid}
    metrics = step.eval_step({}, batch, model=Echo(labels.ndim == 2), objective=objective)
    with jax.numpy_dtype_promotion("standard"):  # CLU divides floats by integers
        return computed(metrics)


def test_classification():
    values = evaluation(Classification, jnp.asarray([0, 1]), jnp.asarray([True, True]))
    loss = pytest.approx(-(np.log(0.7) + np.log(0.1)) / 2, rel=1e-6)
    confusion = [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert values == {"loss": loss, "accuracy": 0.5, "records": 2, "confusion": confusion}
    assert all(isinstance(count, int) for row in values["confusion"] for count in row)
    values |= {"loss": 0.25, "records": 1200}
    assert Classification.scalars(values) == {"loss": 0.25, "accuracy": 0.5}
    assert Classification.scores(values) == {"score": 0.5, "loss": 0.25, "accuracy": 0.5}
    line = "test: loss 0.2500  accuracy 50.00%  on 1,200 records"
    assert Classification.eval_line("test", values) == line
    (table,) = Classification.details(values, list("abcd"))
    assert table.splitlines()[2].split() == ["b", ".", ".", ".", "1", "0.0%"]


def test_labelled_positions():
    labels = jnp.asarray([[0, -1, 1], [-1, 2, -1]])
    values = evaluation(LabelledPositions, labels, labels >= 0)
    assert values["accuracy"] == pytest.approx(2 / 3)
    assert values["positions"] == 3
    assert LabelledPositions.eval_line("test", values).endswith("accuracy 66.67%  on 3 positions")
    assert LabelledPositions.details(values, []) == []


def test_next_byte():
    values = {"loss": 1.386294, "accuracy": 0.5, "positions": 3}
    assert NextByte.scores(values) == {"score": -1.386294, "loss": 1.386294, "accuracy": 0.5}
    assert list(NextByte.scalars(values)) == ["loss", "accuracy", "bits_per_byte", "perplexity"]
    line = "1.3863 nats  2.0000 bits per byte  perplexity 4.000"
    assert NextByte.line(values) == line
    assert NextByte.eval_line("test", values) == f"test: {line}  on 3 positions"
    assert np.isfinite(NextByte.scalars(values | {"loss": 1e4})["perplexity"])


def test_a_metric_is_one_line(tmp_path):
    """The metric of `toy_metric.py` is in the curves, the result, and the printed lines."""
    done = trainer.run(trainer.command(tmp_path, config="tests/train/toy_metric.py"))
    result = trainer.result(tmp_path)["eval"]
    assert result["squared_loss"] >= result["loss"] ** 2
    (validation,) = [line for line in trainer.metrics(tmp_path) if "validation/loss" in line]
    (test,) = [line for line in trainer.metrics(tmp_path) if "test/loss" in line]
    assert test["test/squared_loss"] == result["squared_loss"]
    assert "test/records" not in test
    printed = f"squared_loss {validation['validation/squared_loss']:.4f}  on 16 records"
    assert re.search(rf"^step 2 validation: .*  {printed}$", done.stdout, re.MULTILINE)
    assert f"squared_loss {result['squared_loss']:.4f}; see" in done.stdout


def test_a_metric_belongs_to_its_objective_only():
    class Own(NextByte):
        pass

    for own in (Own.training_metrics, Own.evaluation_metrics):
        own["again"] = own["loss"]
    for other in (NextByte, LabelledPositions, Classification):
        assert "again" not in other.training_metrics | other.evaluation_metrics


def test_a_metric_of_training_alone_is_no_score():
    class Own(LabelledPositions):
        pass

    Own.training_metrics["extra"] = Own.training_metrics["loss"]
    values = {"loss": 0.5, "accuracy": 0.25, "positions": 3}
    assert Own.scores(values) == {"score": 0.25, "loss": 0.5, "accuracy": 0.25}
