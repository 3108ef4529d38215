"""The metrics of the objectives, and where they are reported."""

import collections
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod import objectives
from spectral_pod.data.document_writer import count_words
from spectral_pod.data.windows import Windows
from spectral_pod.objectives import (
    NUM_SHOWN,
    Classification,
    LabelledPositions,
    NextByte,
    computed,
)
from spectral_pod.train import step
from tests import trainer
from tests.data.test_windows import MemorySplit, stream_of


class Echo:
    """A model that predicts each token itself, or the first token of a row."""

    config = types.SimpleNamespace(chunk=0)

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
    assert values == {
        "loss": loss,
        "accuracy": 0.5,
        "records": 2,
        "confusion": confusion,
        "first_predictions": [0, 3, *[0] * (NUM_SHOWN - 2)],
    }
    assert all(isinstance(count, int) for row in values["confusion"] for count in row)
    values |= {"loss": 0.25, "records": 1200}
    assert Classification.scalars(values) == {"loss": 0.25, "accuracy": 0.5}
    assert Classification.scores(values) == {"score": 0.5, "loss": 0.25, "accuracy": 0.5}
    line = "test: loss 0.2500  accuracy 50.00%  on 1,200 records"
    assert Classification.eval_line("test", values) == line
    (table,) = Classification.details(values, list("abcd"))
    assert table.splitlines()[2].split() == ["b", ".", ".", ".", "1", "0.0%"]


@pytest.mark.parametrize("num_classes", [2, 32, 33, 5000])
def test_many_classes_give_their_worst_pairs(num_classes):
    """Of batches, also merged in another order, and padded rows left out, as counted one by one."""
    rng = np.random.default_rng(num_classes)
    odd = max(1, num_classes // 40)  # few classes, so that pairs repeat
    true, predicted = rng.integers(0, num_classes, (2, 3, 256)) // odd * odd
    valid = rng.random((3, 256)) < 0.9
    batches = [
        objectives.Confusion.from_model_output(
            labels=jnp.where(v, y, -1), logits=jax.nn.one_hot(p, num_classes), mask=v
        )
        for y, p, v in zip(jnp.asarray(true), jnp.asarray(predicted), jnp.asarray(valid))
    ]
    values = batches[0].merge(batches[1]).merge(batches[2]).compute()
    assert values == batches[2].merge(batches[0].merge(batches[1])).compute()
    counts = collections.Counter(zip(true[valid].tolist(), predicted[valid].tolist()))
    names = [f"<{i}>" for i in range(num_classes)]
    (text,) = Classification.details(values, names)
    if num_classes <= 32:
        shape = range(num_classes)
        assert values == {"confusion": [[counts[i, j] for j in shape] for i in shape]}
        assert len(text.splitlines()) == num_classes + 1
    else:
        wrong = [(-n, i, j) for (i, j), n in counts.items() if i != j]
        worst = [[i, j, -n] for n, i, j in sorted(wrong)[:20]]
        assert values == {"confused": worst}
        i, j, n = worst[0]
        assert text.splitlines()[1].split() == [str(n), f"<{i}>,", "taken", "for", f"<{j}>"]
        assert len(text) < 1000


def test_names_of_classes_do_not_break_the_report():
    names = ["a\nb", "x" * 5000, "\x1b[2J"]
    table = objectives.confusion_table([[1, 2, 0], [0, 3, 0], [0, 0, 4]], names)
    assert [len(line.split()) for line in table.splitlines()] == [4, 5, 5, 5]
    assert table.splitlines()[1].split()[0] == r"a\nb"
    pairs = objectives.worst_pairs([[0, 1, 7], [2, 0, 5]], names)
    assert len(pairs.splitlines()) == 3
    assert all(line.isprintable() for line in (table + pairs).splitlines())
    assert max(map(len, (table + pairs).splitlines())) < 100
    assert objectives.worst_pairs([], names) == "most confused of 3 classes: none"


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


class Bigrams:
    """A model of random logits for every token."""

    config = types.SimpleNamespace(chunk=0)
    logits = np.random.default_rng(0).normal(size=(260, 257)).astype(np.float32)

    def apply(self, _, tokens_BL, mask_BL):
        return jnp.asarray(self.logits)[tokens_BL]


@pytest.mark.parametrize(
    "documents",
    [
        [b" \n = Homer = \n \n He wrote <unk> .\tIt\x0b\x0cis\rso . \n"],
        [b"a", b"bc  d\n", b"\n\n", b" ", b"end"],
        ["naïve café\u00a0x\n".encode(), b" ".join(bytes([i]) for i in range(256))],
    ],
)
def test_word_perplexity_from_the_loss_of_every_byte(documents):
    """In windows whose edges cut words, the last one padded, over several batches."""
    source = Windows(MemorySplit(documents), batch_size=3, seq_len=5)
    eval_step = jax.jit(functools.partial(step.eval_step, model=Bigrams(), objective=NextByte))
    total = None
    for i in range(source.steps_per_epoch):
        batch = {k: jnp.asarray(x) for k, x in source.rows(i, np.arange(3)).items()}
        part = eval_step({}, batch)
        total = part if total is None else total.merge(part)
    with jax.numpy_dtype_promotion("standard"):
        values = computed(total)

    stream = stream_of(documents)
    logits = Bigrams.logits[stream[:-1]].astype(np.float64)
    labels = [min(token, 256) for token in stream[1:]]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    words = sum(len(data.split()) + data.count(b"\n") for data in documents)
    assert values["words"] == sum(map(count_words, documents)) == words
    scalars = NextByte.scalars(values)
    expected = np.exp(losses.sum() / words)
    assert scalars["word_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert scalars["bits_per_byte"] == pytest.approx(losses.mean() / np.log(2), rel=1e-6)
    assert f"  word perplexity {expected:.5g}  on {len(losses)} pos" in NextByte.eval_line(
        "", values
    )


def test_without_words_there_is_no_word_perplexity():
    values = {"loss": 2.0, "accuracy": 0.5, "positions": 9, "words": 0}
    assert list(NextByte.scalars(values)) == ["loss", "accuracy", "bits_per_byte", "perplexity"]
    huge = NextByte.scalars(values | {"positions": 1_000_000, "words": 1})["word_perplexity"]
    assert np.isfinite(np.float32(huge))


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
    # The details of the last evaluation are in TensorBoard as they are in print.
    (line,) = re.findall(r"^ .*  recall$", done.stdout, re.MULTILINE)
    assert line in trainer.event_points(tmp_path)["test", "details"][2]


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
