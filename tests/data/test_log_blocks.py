"""Blocks are read back by a parser of the texts, which does not know how they are drawn."""

import collections
import re

import numpy as np
import pytest

from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import log_blocks
from spectral_pod.data.tasks.log_blocks import LogBlocks
from spectral_pod.errors import ConfigError

SIZES = {"train": 300, "validation": 60, "test": 60, "num_workers": 1}
# What a session of each service says, its numbers left out.
NORMAL = {
    "gateway": "connection accepted;user authenticated;(request served in ms;)+connection closed;",
    "storage": "file opened;(bytes written;)+file closed;",
    "database": "transaction started;(statement executed, rows;)+"
    "transaction (committed|rolled back);",
    "scheduler": "job queued;job assigned to node;(progress of;)+job finished;",
    "locks": "lock requested;lock granted after us;lock released;",
    "mail": "message received, bytes;message scanned;(message deferred for s;)*message delivered;",
    "builder": "checkout of revision;(step passed;)+artifacts stored;build done;",
    "sensor": "calibration begun;calibration ended;(sample taken;)+upload confirmed;",
}
STEPS = sorted(
    (text for order in NORMAL.values() for text in re.findall(r"[a-z][a-z, ]+(?=;)", order)),
    key=len,
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return build(tmp_path_factory.mktemp("store"))[1]


def build(path, **options):
    LogBlocks(**(SIZES | options)).build(str(path))
    store = ByteStore(str(path))
    return store, {split: read(store, split) for split in log_blocks.SPLITS}


def read(store, name):
    split = store.split(name)
    data = split.read(np.arange(len(split)))
    return [(x.tobytes().decode(), store.classes[k]) for x, k in zip(data, split.labels)]


def session_of(line):
    """The word of four hexadecimal digits, which no other word of a line is."""
    words = re.findall(r"\b[0-9a-f]{4}\b", line.replace("of 1000", ""))
    (session,) = words
    return session


def judged(block):
    """The class of a block, by its lines."""
    (service,) = {name for name in NORMAL for line in block.splitlines() if name in line}
    said = collections.defaultdict(str)
    for line in block.splitlines():
        plain = " ".join(re.sub(r"\b\d{1,4}\b", "", line).split())
        session = session_of(line)
        step = next(
            text
            for text in ("transaction committed", "transaction rolled back", *reversed(STEPS))
            if text in plain
        )
        said[session] += step + ";"
    fits = all(re.fullmatch(NORMAL[service], text) for text in said.values())
    return "normal" if fits else "anomalous"


def test_labels_are_true(splits):
    for records in splits.values():
        for block, label in records:
            assert judged(block) == label, block


def test_bytes_and_lengths_do_not_tell(splits):
    """Both of a pair have the same bytes; so a rule that sees no order is right for half of all."""
    for split, records in splits.items():
        assert len(records) == 2 * SIZES[split]
        for (one, normal), (two, anomalous) in zip(records[::2], records[1::2], strict=True):
            assert (normal, anomalous) == ("normal", "anomalous")
            assert sorted(one) == sorted(two)
            assert len(one) <= 1024


def test_no_template_is_in_two_splits(splits):
    def template(line):
        return re.sub(r"\d+", "0", line.replace(session_of(line), "session"))

    templates = {
        split: {template(line) for block, _ in records for line in block.splitlines()}
        for split, records in splits.items()
    }
    assert not templates["train"] & templates["test"]
    assert not templates["train"] & templates["validation"]
    assert not templates["validation"] & templates["test"]
    for split in splits:
        assert all(any(name in line for line in templates[split]) for name in NORMAL)


def test_the_same_seed_is_the_same_store(tmp_path, splits):
    assert build(tmp_path / "again", num_workers=2)[1] == splits
    assert build(tmp_path / "other", seed=1)[1] != splits
    assert build(tmp_path / "smaller", train=3)[1]["test"] == splits["test"]


def test_every_block_has_a_session_in_a_narrow_window(tmp_path):
    for records in build(tmp_path, window=640)[1].values():
        for block, label in records:
            assert 0 < len(block) <= 640
            assert judged(block) == label


def test_a_window_that_is_too_narrow():
    with pytest.raises(ConfigError, match=r"options\.window is 639; it must be at least 640"):
        LogBlocks(window=639)
