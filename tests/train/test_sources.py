"""Existing stores as the data of a run: single, mixed, and evaluated separately."""

import numpy as np
import pytest

from spectral_pod.config import default
from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import Record
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.train.sources import open_sources

CLASSES = ("no", "yes")


def store(folder, name, sizes, classes=CLASSES):
    rng = np.random.default_rng(len(name))
    splits = {
        split: [Record(rng.bytes(12), int(rng.integers(2))) for _ in range(n)]
        for split, n in zip(("train", "validation", "test"), sizes)
    }
    byte_store.write(str(folder / name), splits, classes=classes, provenance={"name": name})
    return str(folder / name)


def config(*stores):
    c = default()
    c.data.task = "content_type"
    c.data.stores = stores
    c.data.seq_len = 16
    c.train.global_batch_size = c.train.eval_batch_size = 8
    return c


def test_one_store_is_read_where_it_is(tmp_path):
    path = store(tmp_path, "a", (20, 9, 9))
    sources = open_sources(config(path))
    assert (sources.classes, sources.num_classes) == (list(CLASSES), 2)
    assert sources.digest == byte_store.ByteStore(path).digest
    assert sources.provenance == {"name": "a"}
    assert sources.evaluation("test")["a"].steps_per_epoch == 2


def test_stores_are_mixed_and_evaluated_one_by_one(tmp_path):
    a, b = store(tmp_path, "a", (20, 9, 9)), store(tmp_path, "bb", (30, 5, 5))
    sources = open_sources(config((a, 3.0), (b, 1.0)))
    evaluation = sources.evaluation("validation")
    assert {name: s.num_records for name, s in evaluation.items()} == {"a": 9, "bb": 5}
    training = sources.training()
    assert training.num_records == 50
    of_a = {r.tobytes() for r in byte_store.ByteStore(a).split("train").read(range(20))}
    batch = training.rows(0, np.arange(8))
    assert sum(bytes(row[:12].astype(np.uint8)) in of_a for row in batch["tokens"]) == 6
    assert sources.digest != open_sources(config((a, 1.0), (b, 1.0))).digest


def test_stores_that_do_not_belong_together(tmp_path):
    a = store(tmp_path, "a", (8, 8, 8))
    other = store(tmp_path, "other", (8, 8, 8), classes=("yes", "no"))
    with pytest.raises(DataError, match=r"other has classes yes, no, and .*/a has no, yes"):
        open_sources(config(a, other))
    with pytest.raises(ConfigError, match="two stores named 'a'"):
        open_sources(config(a, a))
    with pytest.raises(DataError, match="holds no finished byte store"):
        open_sources(config(str(tmp_path / "missing")))
