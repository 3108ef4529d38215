"""Answers of memory tasks against independent parsers; MQAR against its official generator."""

import re

import numpy as np
import pytest
from scipy import stats

from spectral_pod.data import tasks
from spectral_pod.data.tasks import mqar
from spectral_pod.shapes import PAD, SEP

NUM_EXAMPLES = 300


def drawn(task, n=NUM_EXAMPLES, seed=0, **options):
    rng, task = np.random.default_rng(seed), tasks.make(task, options)
    return [task.draw(rng) for _ in range(n)]


# ---- copy


def test_copy_says_its_bytes_again():
    lengths = set()
    for tokens, labels in drawn("copy", length=9, min_length=2, alphabet=3):
        (middle,) = np.flatnonzero(tokens == SEP)
        said = tokens[:middle]
        assert list(tokens[middle + 1 :]) == list(said[:-1])
        assert list(labels) == [-1] * middle + list(said)
        assert set(said) <= {0, 1, 2}
        lengths.add(int(middle))
    assert lengths == set(range(2, 10))


# ---- recall and overwrite


def read_text(tokens, labels):
    """(assignments in order, {name: answer}, positions of the digits of answers) of a text."""
    # Scored labels follow their positions; they must agree with the next tokens.
    following = np.where(labels >= 0, labels, np.append(tokens[1:], -1))
    assert list(following[:-1]) == list(tokens[1:])
    text = bytes(tokens[:1].astype(np.uint8)) + bytes(following.astype(np.uint8))
    given, questions = text.split(b".", 1)
    assignments = [tuple(part.split(b"=")) for part in given.split(b", ")]
    asked = list(re.finditer(rb" What is ([a-z])\? (\d+)(?:\.|$)", questions))
    assert b"".join(match[0] for match in asked) == questions
    start = len(given) + 1
    places = {start + i for match in asked for i in range(*match.span(2))}
    return assignments, {match[1]: match[2] for match in asked}, places


@pytest.mark.parametrize("num_pairs", [1, 5, 26])
def test_recall_answers_what_was_given(num_pairs):
    num_questions, names = min(4, num_pairs), set()
    for tokens, labels in drawn("recall", num_pairs=num_pairs, num_questions=num_questions):
        assignments, answers, places = read_text(tokens, labels)
        given = dict(assignments)
        assert len(assignments) == len(given) == len(set(given.values())) == num_pairs
        assert len(answers) == num_questions
        assert answers == {name: given[name] for name in answers}
        # The label of a digit is at the position of the preceding byte.
        assert {i + 1 for i in np.flatnonzero(labels >= 0)} == places
        names |= answers.keys()
    assert len(names) == 26


def test_overwrite_answers_the_newest():
    shares, latest = [], []
    options = {"num_pairs": 6, "num_overwrites": 5, "num_questions": 3}
    for tokens, labels in drawn("overwrite", **options):
        assignments, answers, places = read_text(tokens, labels)
        names = [name for name, _ in assignments]
        assert (len(names), len(set(names)), len(answers)) == (11, 6, 3)
        assert len({value for _, value in assignments}) == 11
        for name, answer in answers.items():
            writes = [value for other, value in assignments if other == name]
            assert answer == writes[-1]
        assert {i + 1 for i in np.flatnonzero(labels >= 0)} == places
        again = [names.count(name) > 1 for name in answers]
        assert any(again)
        shares.append(np.mean(again))
        latest.append(max(names[::-1].index(name) for name in answers))
    # Not every question is about an overwritten name, and answers are not always the last writes.
    assert 0.5 < np.mean(shares) < 0.9
    assert max(latest) >= 8


def test_overwritten_names_are_asked_at_any_place():
    """The position of a question does not reveal whether its name was overwritten."""
    first = []
    options = {"num_pairs": 10, "num_overwrites": 1, "num_questions": 4}
    for tokens, labels in drawn("overwrite", 400, **options):
        assignments, answers, _ = read_text(tokens, labels)
        names = [name for name, _ in assignments]
        first.append([names.count(name) > 1 for name in answers].index(True))
    assert stats.chisquare(np.bincount(first, minlength=4)).pvalue > 1e-3


# ---- MQAR


def official(n, seed, vocab_size, length, num_pairs, power_a=0.01, fill=True):
    """Zoology's generator, reimplemented: symbols and labels [n, length], -100 if not scored."""
    rng = np.random.RandomState(seed)
    inputs, labels = np.zeros((n, length), int), np.full((n, length), -100)
    spaces = (length - 2 * num_pairs) // 2
    p = np.array([power_a * gap ** (power_a - 1) for gap in range(1, spaces + 1)])
    for row in range(n):
        keys = rng.choice(np.arange(1, vocab_size // 2), num_pairs, replace=False)
        values = rng.choice(np.arange(vocab_size // 2, vocab_size), num_pairs, replace=False)
        gaps = rng.choice(spaces, num_pairs, replace=False, p=p / p.sum())
        for i, (key, value, gap) in enumerate(zip(keys, values, gaps)):
            inputs[row, 2 * i], inputs[row, 2 * i + 1] = key, value
            inputs[row, 2 * num_pairs + 2 * gap] = key
            labels[row, 2 * num_pairs + 2 * gap] = value
        if fill:
            inputs[row] = np.where(inputs[row], inputs[row], rng.randint(vocab_size, size=length))
    return inputs, labels


def ours(n, seed, vocab_size, length, num_pairs, **options):
    examples = drawn(
        "mqar", n, seed, vocab_size=vocab_size, settings=((length, num_pairs),), **options
    )
    tokens, labels = (np.stack(arrays) for arrays in zip(*examples))
    return symbols_of(tokens), labels


def symbols_of(tokens):
    assert not set(tokens.flat) & set(range(PAD, SEP + 1))
    return np.where(tokens > SEP, tokens - 4, tokens)


def statistics(symbols, labels, num_pairs):
    """Samples of several statistics, to compare the distributions of two generators."""
    rows, places = np.nonzero(labels >= 0)
    keys = symbols[:, 0 : 2 * num_pairs : 2]
    whose = np.array([list(keys[row]).index(symbols[row, i]) for row, i in zip(rows, places)])
    return {
        "place": places,  # follows a power law
        "gap": places - 2 * whose,
        "farthest": [places[rows == row].max() for row in range(len(symbols))],
        "nearest": [places[rows == row].min() for row in range(len(symbols))],
        "pair": whose,
        "key": keys.ravel(),
        "value": labels[labels >= 0],
        "elsewhere": symbols[:, 2 * num_pairs :][labels[:, 2 * num_pairs :] < 0],
    }


def p_values(one, other):
    return {name: stats.ks_2samp(one[name], other[name]).pvalue for name in one}


SETTING = {"vocab_size": 600, "length": 64, "num_pairs": 6}


@pytest.mark.parametrize("setting", [SETTING, SETTING | {"vocab_size": 256, "num_pairs": 16}])
def test_mqar_is_distributed_as_the_official_one(setting):
    pairs = setting["num_pairs"]
    p = p_values(
        statistics(*ours(1500, 0, **setting), pairs),
        statistics(*official(1500, 1, **setting), pairs),
    )
    assert min(p.values()) > 1e-4, p


def test_the_comparison_would_tell_another_power_law():
    pairs = SETTING["num_pairs"]
    p = p_values(
        statistics(*ours(1500, 0, **SETTING, power_a=0.3), pairs),
        statistics(*official(1500, 1, **SETTING), pairs),
    )
    assert min(p["place"], p["farthest"]) < 1e-6


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize(("length", "num_pairs"), mqar.TEST_SETTINGS)
def test_mqar_answers_are_the_values_of_the_keys(length, num_pairs, fill):
    symbols, labels = ours(20, 2, 8192, length, num_pairs, random_non_queries=fill)
    for row, answers in zip(symbols, labels):
        given = dict(zip(row[0 : 2 * num_pairs : 2], row[1 : 2 * num_pairs : 2]))
        assert len(given) == len(set(given.values())) == num_pairs
        assert all(1 <= key < 4096 <= value < 8192 for key, value in given.items())
        (asked,) = np.nonzero(answers >= 0)
        assert {row[i]: answers[i] for i in asked} == given
        assert len(asked) == num_pairs
        assert asked[0] >= 2 * num_pairs
        others = np.delete(row[2 * num_pairs :], asked - 2 * num_pairs)
        assert (others.max(initial=0) > 0) == (fill and len(others) > 0)


def test_settings_are_drawn_equally_often():
    settings = ((16, 2), (32, 2), (32, 4))
    seen = [(len(t), int((y >= 0).sum())) for t, y in drawn("mqar", 600, settings=settings)]
    counts = [seen.count(setting) for setting in settings]
    assert sum(counts) == 600
    assert stats.chisquare(counts).pvalue > 1e-3


def test_symbols_leave_the_special_tokens_alone():
    symbols = np.arange(8192)
    tokens = mqar.tokens_of(symbols)
    assert list(tokens[:256]) == list(range(256))
    assert list(tokens[256:]) == list(range(260, 8196))
    task = tasks.make("mqar", {})
    assert (task.vocab_size, task.num_classes) == (8196, 8192)
    sizes = [mqar.Mqar(((16, 2),), num_symbols=n).vocab_size for n in (64, 256, 257)]
    assert sizes == [260, 260, 261]
