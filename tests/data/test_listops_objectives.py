"""What models learn of ListOps' expressions: accuracy by root operator and by height."""

import jax
import numpy as np
import pytest
from clu.metrics import Collection

from spectral_pod.data.tasks import listops_expressions
from spectral_pod.data.tasks.listops import ListOps
from spectral_pod.data.tasks.listops_objectives import (
    Arguments,
    ByHeight,
    ByLastRoot,
    ByRoot,
    ClosingAccuracy,
    LastAccuracy,
    Subtrees,
    heights,
)
from spectral_pod.shapes import PAD


@pytest.fixture(scope="module")
def examples():
    return list(ListOps(seed=1, num_workers=1).generate(1000))


@pytest.mark.parametrize("encoding", listops_expressions.ENCODINGS)
def test_accuracy_by_root(encoding):
    rows = [b"<3]", b">34]", b"=1<23]]", b"+99]", b"+12]", b"7"]
    texts = [listops_expressions.encode(symbols, encoding) for symbols in rows]
    tokens = np.full((7, 64), PAD, np.int32)
    for row, text in zip(tokens, texts, strict=False):
        row[: len(text)] = list(text)
    correct, mask = np.float32([1, 0, 1, 1, 0, 1, 1]), np.arange(7) < 6
    half = [
        ByRoot.from_model_output(tokens[s], correct[s], mask[s]) for s in (np.s_[:3], np.s_[3:])
    ]
    found = half[0].merge(half[1]).compute()
    assert found == {
        "accuracy_min": 1.0, "accuracy_max": 0.0, "accuracy_med": 1.0, "accuracy_sm": 0.5
    }  # fmt: skip


def test_accuracy_by_root_of_the_last_label():
    tokens = np.full((3, 8), PAD, np.int32)
    for row, symbols in zip(tokens, (b"<3]+4]", b"<34]"), strict=False):
        row[: len(symbols)] = list(symbols)
    mask, correct = tokens == ord("]"), np.ones(tokens.shape, np.float32)
    correct[0, 5] = 0  # by its first symbol the row is one of MIN
    found = ByLastRoot.from_model_output(tokens=tokens, correct=correct, mask=mask).compute()
    assert found == {"accuracy_min": 0.5}


def test_heights_and_the_accuracy_by_them(examples):
    """Against recursion over the arguments of each operator."""
    short = ListOps(num_workers=1, min_length=2, max_length=60, max_depth=8).generate(200)
    rows = [e.symbols for e in short] + [b"<3]>2+11]]", b"7"]
    tokens = np.full((len(rows), 64), PAD, np.int32)
    expected, flat_sums = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, bool)

    def read(symbols, i, row):
        """The height of what starts at i, and where it ends."""
        if symbols[i] not in b"<>=+":
            return 0, i
        operator, height = symbols[i], 0
        while symbols[i + 1] != ord("]"):
            of_argument, i = read(symbols, i + 1, row)
            height = max(height, of_argument)
        expected[row, i + 1] = height + 1
        flat_sums[row, i + 1] = operator == ord("+") and height == 0
        return height + 1, i + 1

    for row, symbols in enumerate(rows):
        tokens[row, : len(symbols)], i = list(symbols), 0
        while i < len(symbols):
            i = read(symbols, i, row)[1] + 1
    np.testing.assert_array_equal(jax.jit(heights)(tokens), expected)
    assert expected.max() >= 4

    correct = np.random.default_rng(0).random(tokens.shape).astype(np.float32)
    mask = (expected > 0) & (np.arange(len(rows)) % 3 > 0)[:, None]
    halves = [
        ByHeight.from_model_output(tokens=tokens[s], correct=correct[s], mask=mask[s])
        for s in (np.s_[:50], np.s_[50:])
    ]
    found = halves[0].merge(halves[1]).compute()
    of = {f"accuracy_height_{h}": (expected == h) & mask for h in range(1, 10)}
    of["accuracy_flat_sm"] = flat_sums & mask
    assert found == pytest.approx({k: correct[at].mean() for k, at in of.items() if at.any()})


def test_accuracy_of_whole_expressions_among_those_of_all_operators():
    mask = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    correct = np.float32([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    assert LastAccuracy.from_model_output(correct=correct, mask=mask).compute() == 0.5
    outputs = {"loss": correct, "correct": correct, "mask": mask}
    metrics = Collection.create(**Subtrees.training_metrics).single_from_model_output(**outputs)
    metrics = jax.device_get(metrics).compute()
    np.testing.assert_allclose(metrics["subtree_accuracy"], 2 / 3)


def test_accuracy_of_operators_among_labels_of_arguments():
    tokens = np.array([list(b"+12]"), list(b">+1]")])
    mask = np.array([[0, 1, 1, 1], [0, 1, 1, 0]], bool)
    correct = np.float32([[1, 1, 0, 1], [1, 0, 0, 0]])
    found = ClosingAccuracy.from_model_output(tokens=tokens, correct=correct, mask=mask)
    assert found.compute() == 1  # of one bracket, as the other has no label
    outputs = {"tokens": tokens, "loss": correct, "correct": correct, "mask": mask}
    metrics = Collection.create(**Arguments.evaluation_metrics).single_from_model_output(**outputs)
    found = jax.device_get(metrics).compute()
    assert found["subtree_accuracy"] == 1
    np.testing.assert_allclose(found["label_accuracy"], 2 / 5)
