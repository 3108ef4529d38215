"""Every byte is in one split, and splits have their shares of the bytes."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_pod.data.held_out import hold_out

BOTH = ("validation", "test")
random_sizes = st.lists(
    st.one_of(st.integers(1, 100), st.integers(1, 10_000)), min_size=1, max_size=80
)


def pieces_of(sizes, keys=None, splits=BOTH):
    sizes = np.asarray(sizes, np.int64)
    keys = np.random.default_rng(0).permutation(len(sizes)) if keys is None else keys
    held_out = hold_out(sizes, np.asarray(keys, np.uint64), splits)
    return [held_out.pieces(i) for i in range(len(sizes))]


def bytes_by_split(pieces):
    counts = collections.Counter()
    for document in pieces:
        for split, start, stop in document:
            counts[split] += stop - start
    return counts


@given(sizes=random_sizes, seed=st.integers(0, 99), both=st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_byte_once_and_every_split_its_share(sizes, seed, both):
    keys = np.random.default_rng(seed).permutation(len(sizes))
    pieces = pieces_of(sizes, keys, BOTH if both else BOTH[:1])
    names = ["train", *BOTH]
    for size, document in zip(sizes, pieces):
        ends = [0, *(stop for _, _, stop in document)]
        assert [start for _, start, _ in document] == ends[:-1]
        assert ends[-1] == size
        order = [names.index(split) for split, _, _ in document]
        assert order == sorted(set(order))
        assert len(document) == 1 or size > sum(sizes) / 20
    held, total = bytes_by_split(pieces), sum(sizes)
    shares = (
        {"validation": 0.1} if len(sizes) == 1 else dict.fromkeys(BOTH if both else BOTH[:1], 0.05)
    )
    assert set(held) <= {"train", *shares}
    whole = [size for size in sizes if size <= total / 20]
    for split, share in shares.items():
        # Half a document at each end; and of every document that is cut, less than a byte.
        bound = max(whole, default=0) + len(sizes) - len(whole)
        assert abs(held[split] - share * total) <= bound


@pytest.mark.parametrize("size", [1, 2, 9, 10, 19, 1001, 1_115_394])
def test_one_document_is_cut_after_nine_tenths(size):
    cut = size * 9 // 10
    expected = [("train", 0, cut), ("validation", cut, size)]
    assert pieces_of([size]) == [[piece for piece in expected if piece[1] < piece[2]]]


def test_a_long_document_beside_short_ones_is_cut():
    assert pieces_of([100_000, 300, 1100]) == [
        [("train", 0, 90_000), ("validation", 90_000, 95_000), ("test", 95_000, 100_000)],
        [("train", 0, 300)],
        [("train", 0, 1100)],
    ]
    assert pieces_of([100_000, 300], splits=["validation"])[0] == [
        ("train", 0, 95_000),
        ("validation", 95_000, 100_000),
    ]


@given(size_of=st.lists(st.integers(1, 9), min_size=30, max_size=30), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_equal_keys_are_in_one_split(size_of, seed):
    """Copies have equal sizes, too."""
    keys = np.random.default_rng(seed).integers(0, 30, 75)
    split_of = {}
    for key, document in zip(keys, pieces_of([size_of[key] for key in keys], keys)):
        assert split_of.setdefault(int(key), document[0][0]) == document[0][0]


def test_copies_that_are_most_of_the_bytes_stay_in_training():
    pieces = pieces_of([10] * 100, [0] * 60 + [*range(1, 41)])
    assert {split for document in pieces[:60] for split, _, _ in document} == {"train"}
    assert bytes_by_split(pieces) == {"train": 960, "validation": 20, "test": 20}


def test_keys_decide_not_places():
    sizes = np.random.default_rng(1).integers(1, 50, 300)
    keys = np.random.default_rng(2).permutation(300)
    forward = pieces_of(sizes, keys)
    assert pieces_of(sizes[::-1], keys[::-1]) == forward[::-1]
    assert pieces_of(sizes, keys[::-1]) != forward
