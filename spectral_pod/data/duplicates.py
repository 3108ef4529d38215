"""A check of a store before training: duplicates between splits, and features that leak labels.

Near-duplicates are found by MinHash (Broder 1997): the fraction of equal entries in the signatures
of two records estimates the Jaccard similarity of their sets of shingles, runs of 8 bytes. Records
whose signatures agree in a whole band are then compared by their shingles.
"""

import collections
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from spectral_pod.data.byte_store import ByteStore, Split

SIMILAR = 0.8  # Jaccard similarity at and above which records count as near-duplicates
_SHINGLE = 8  # bytes
_BANDS, _ROWS = 16, 4  # similarity 0.8: two records agree in some band with probability 0.9998
_LONGEST = 1 << 16  # bytes of each record that are examined
_BATCH = 256  # records read at once
_MOST_EXAMPLES = 5
_MOST_IN_A_BUCKET = 50  # candidates per band for a record, as boilerplate fills buckets


def report(
    store: ByteStore, on_record: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Counts duplicates and label leaks between the training split and the others.

    Args:
      store: the store to examine; about 300 bytes of memory per record are needed.
      on_record: called with the number of records that were hashed since the last call.

    Returns:
      A JSON-serializable dictionary.
      "duplicates": for each split but train, how many of its records are also in the training
        split, exactly or nearly, how many of those with another label, and a few examples.
      "labels": for each, the accuracy of predicting the largest class, and of predicting labels
        from a record's length, first bytes or last bytes alone, by the training split's majority.
        An accuracy far above that of the largest class indicates a leak.
    """
    train = store.split("train")
    signatures, digests, ends = _hash_records(train, on_record)
    exact = collections.defaultdict(list)
    for i, digest in enumerate(digests):
        exact[digest].append(i)
    bands = [_buckets(signatures, band) for band in range(_BANDS)]
    guesses = {name: _majority_labels(train.labels, ends[name]) for name in ends}
    duplicates, labels = {}, {}
    for name in store.manifest["splits"]:
        if name == "train":
            continue
        split = store.split(name)
        others, other_digests, other_ends = _hash_records(split, on_record)
        duplicates[name] = _count_duplicates(train, split, exact, bands, others, other_digests)
        largest = np.bincount(train.labels).argmax()
        labels[name] = {"largest class of train": float(np.mean(split.labels == largest))} | {
            what: float(
                np.mean(
                    [guesses[what].get(key, largest) == y for key, y in zip(keys, split.labels)]
                )
            )
            for what, keys in other_ends.items()
        }
    return {"duplicates": duplicates, "labels": labels}


def _hash_records(
    split: Split, on_record: Callable[[int], None]
) -> tuple[np.ndarray, list[bytes], dict[str, list[Any]]]:
    """Signatures, uint32 [n, bands * rows]; digests of the bytes; features that may leak labels."""
    signatures = np.zeros((len(split), _BANDS * _ROWS), np.uint32)
    digests: list[bytes] = []
    ends: dict[str, list[Any]] = {"length": [], "first 4 bytes": [], "last 4 bytes": []}
    for i, data in enumerate(_records(split)):
        signatures[i] = _signature(data)
        digests.append(hashlib.blake2b(data.tobytes(), digest_size=16).digest())
        ends["length"].append(len(data))
        ends["first 4 bytes"].append(data[:4].tobytes())
        ends["last 4 bytes"].append(data[-4:].tobytes())
        on_record(1)
    return signatures, digests, ends


def _records(split: Split) -> Iterator[np.ndarray]:
    """The bytes of each record, with its documents concatenated."""
    k = split.documents
    for start in range(0, len(split), _BATCH):
        stop = min(start + _BATCH, len(split))
        documents = split.read(range(start * k, stop * k))
        for i in range(0, len(documents), k):
            yield documents[i] if k == 1 else np.concatenate(documents[i : i + k])


def _shingles(data: np.ndarray) -> np.ndarray:
    """The hash of every run of 8 bytes, uint64 [n]; a shorter record is padded with zeros."""
    data = data[:_LONGEST]
    data = np.pad(data, (0, max(_SHINGLE - len(data), 0)))
    runs = np.lib.stride_tricks.sliding_window_view(data, _SHINGLE)
    words = np.ascontiguousarray(runs).view("<u8")[:, 0]
    words = (words ^ (words >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return words ^ (words >> np.uint64(29))


def _signature(data: np.ndarray) -> np.ndarray:
    shingles = _shingles(data)
    return ((shingles[:, None] * _MULTIPLIERS[None]) >> np.uint64(32)).min(0).astype(np.uint32)


_MULTIPLIERS = np.random.default_rng(0).integers(1 << 63, size=_BANDS * _ROWS, dtype=np.uint64) | 1


def _buckets(signatures: np.ndarray, band: int) -> dict[bytes, list[int]]:
    buckets = collections.defaultdict(list)
    for i, key in enumerate(_keys(signatures, band)):
        buckets[key].append(i)
    return buckets


def _keys(signatures: np.ndarray, band: int) -> list[bytes]:
    rows = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS])
    return [row.tobytes() for row in rows]


def _count_duplicates(
    train: Split,
    split: Split,
    exact: dict[bytes, list[int]],
    bands: list[dict[bytes, list[int]]],
    signatures: np.ndarray,
    digests: list[bytes],
) -> dict[str, Any]:
    keys = [_keys(signatures, band) for band in range(_BANDS)]
    found: dict[str, Any] = {"records": len(split), "equal": 0, "similar": 0, "other label": 0}
    found["examples"] = []
    for i, data in enumerate(_records(split)):
        matches, kind, similarity = exact.get(digests[i], []), "equal", 1.0
        if not matches:
            candidates = {
                j
                for band in range(_BANDS)
                for j in bands[band].get(keys[band][i], [])[:_MOST_IN_A_BUCKET]
            }
            scored = [(_similarity(data, _record(train, j)), j) for j in sorted(candidates)]
            similarity, match = max(scored, default=(0.0, -1))
            kind, matches = "similar", [match] if similarity >= SIMILAR else []
        if not matches:
            continue
        found[kind] += 1
        found["other label"] += all(train.labels[j] != split.labels[i] for j in matches)
        if len(found["examples"]) < _MOST_EXAMPLES:
            found["examples"].append(
                {"record": i, "of train": matches[0], "similarity": round(similarity, 3)}
            )
    return found


def _record(split: Split, i: int) -> np.ndarray:
    k = split.documents
    return np.concatenate(split.read(range(i * k, (i + 1) * k)))


def _similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The Jaccard similarity of the sets of shingles."""
    a, b = np.unique(_shingles(a)), np.unique(_shingles(b))
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _majority_labels(labels: np.ndarray, keys: list[Any]) -> dict[Any, int]:
    """The most common label of each key."""
    counts: dict[Any, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for key, label in zip(keys, labels):
        counts[key][int(label)] += 1
    return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
