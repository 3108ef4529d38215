"""The report finds planted duplicates and label leaks, and nothing in random records."""

import numpy as np
import pytest

from spectral_pod.data import byte_store, duplicates
from spectral_pod.data.byte_store import ByteStore, Record


def make(path, train, test, documents=1):
    splits = {"train": train, "test": test}
    byte_store.write(str(path), splits, classes=["a", "b"], provenance={}, documents=documents)
    return ByteStore(str(path))


def words(rng, n):
    return b" ".join(rng.choice([b"alpha", b"beta", b"gamma", b"delta", b"eps"], n))


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    return [Record(rng.bytes(300), i % 2) for i in range(200)]


def test_planted_duplicates_are_found(tmp_path, records):
    train, test = records[:150], records[150:]
    rng = np.random.default_rng(1)
    edited = bytearray(train[7].data)
    edited[100] ^= 1  # 8 of 293 shingles change
    half = train[8].data[:150] + rng.bytes(150)  # its similarity is 1/3
    test = [*test, train[3], Record(bytes(edited), 1 - train[7].label), Record(half, 0)]
    counted = []
    found = duplicates.report(make(tmp_path, train, test), counted.append)
    shared = found["duplicates"]["test"]
    assert {k: shared[k] for k in ("records", "equal", "similar", "other label")} == {
        "records": 53, "equal": 1, "similar": 1, "other label": 1,
    }  # fmt: skip
    assert shared["examples"][0] == {"record": 50, "of train": 3, "similarity": 1.0}
    assert shared["examples"][1]["similarity"] == pytest.approx(285 / 301, abs=1e-3)
    assert sum(counted) == 203


def test_similarity_is_that_of_sets_of_runs():
    def sets(data):
        return {data[i : i + 8] for i in range(len(data) - 7)}

    rng = np.random.default_rng(2)
    for _ in range(20):
        a, b = words(rng, 12), words(rng, 12)
        b = a[:30] + b
        expected = len(sets(a) & sets(b)) / len(sets(a) | sets(b))
        arrays = (np.frombuffer(x, np.uint8) for x in (a, b))
        assert duplicates._similarity(*arrays) == pytest.approx(expected)


def test_labels_that_are_given_away(tmp_path, records):
    honest = duplicates.report(make(tmp_path / "a", records[:150], records[150:]))["labels"]["test"]
    assert all(0.3 < value < 0.7 for value in honest.values())
    telling = [Record(b"%d" % r.label + b"..." + r.data, r.label) for r in records]
    leaked = duplicates.report(make(tmp_path / "b", telling[:150], telling[150:]))["labels"]["test"]
    assert leaked["first 4 bytes"] == 1.0
    assert leaked["last 4 bytes"] < 0.7


def test_pairs_and_short_records(tmp_path):
    train = [Record((b"", b"x"), 0), Record((b"one", b"two"), 1)]
    test = [Record((b"", b""), 0), Record((b"on", b"etwo"), 1)]
    shared = duplicates.report(make(tmp_path, train, test, documents=2))["duplicates"]["test"]
    assert (shared["equal"], shared["similar"]) == (1, 0)
