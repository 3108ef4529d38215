"""A batch is a pure function of (seed, step), whoever reads it and wherever it starts."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.data.pipeline import Batches, load
from spectral_pod.errors import DataError
from spectral_pod.shapes import PAD


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "store")
    records = [Record(bytes([i, 0, i]) * (i % 3), i % 5) for i in range(23)]
    byte_store.write(path, {"train": records, "none": []}, classes=list("abcde"), provenance={})
    return ByteStore(path).split("train")


def make(split, **changes):
    fields = {"batch_size": 4, "seq_len": 8, "shuffle_seed": 7}
    return Batches(split, **(fields | changes))


ALL = np.arange(4)


def test_every_epoch_is_another_permutation(split):
    batches = make(split)
    order = np.concatenate([batches.records(step) for step in range(23 * 2)])
    epochs = order.reshape(8, 23)  # batches run across the ends of epochs
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 8
    other = np.concatenate([make(split, shuffle_seed=8).records(s) for s in range(46)])
    assert not np.array_equal(order, other)


def test_rows_hold_their_records(split):
    batches = make(split)
    batch, records = batches.rows(3, ALL), batches.records(3)
    for row, i in enumerate(records):
        data = [i, 0, i] * (i % 3)
        assert batch["tokens"][row].tolist() == data + [PAD] * (8 - len(data))
        assert batch["labels"][row] == i % 5
    assert batch["valid"].all()


def test_shares_of_any_number_of_processes_make_the_batch(split):
    batches = make(split)
    whole = batches.rows(5, ALL)
    for num_processes in (2, 4):
        shares = [batches.rows(5, rows) for rows in np.split(ALL, num_processes)]
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), values)


def test_a_process_reads_its_own_rows_only(split, monkeypatch):
    read = []
    real = split.read
    monkeypatch.setattr(split, "read", lambda indices: read.extend(indices) or real(indices))
    batches = make(split)
    batches.rows(2, np.array([1, 3]))
    assert read == [batches.records(2)[1], batches.records(2)[3]]


def test_evaluation_covers_every_record_once(split):
    batches = make(split, shuffle_seed=None)
    assert batches.steps_per_epoch == 6
    parts = [batches.rows(step, ALL) for step in range(6)]
    order = np.concatenate([batches.records(step) for step in range(6)])
    valid = np.concatenate([part["valid"] for part in parts])
    assert order[valid].tolist() == list(range(23))
    assert valid.sum() == 23
    assert (parts[-1]["tokens"][~parts[-1]["valid"]] == PAD).all()


@pytest.mark.parametrize("start", [0, 3, 9])
def test_loading_starts_anywhere(split, start):
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    batches = make(split)
    loaded = list(load(batches, sharding, start, 12, threads=3, prefetch=4))
    assert len(loaded) == 12 - start
    for step, batch in zip(range(start, 12), loaded):
        for name, values in batches.rows(step, ALL).items():
            np.testing.assert_array_equal(batch[name], values)


def test_a_fixed_number_of_records(split):
    batches = make(split, num_records=5)
    assert set(np.concatenate([batches.records(step) for step in range(5)])) == set(range(5))


def test_long_records_are_refused_or_truncated(split):
    with pytest.raises(DataError, match=r"record 2 of split 'train' has 6 bytes.*seq_len = 4"):
        make(split, seq_len=4)
    batch = make(split, seq_len=4, truncate=True, shuffle_seed=None).rows(0, ALL)
    assert batch["tokens"][2].tolist() == [2, 0, 2, 2]


def test_an_empty_split_is_refused(split):
    store = ByteStore(split._url.removesuffix("/train"))
    with pytest.raises(DataError, match="split 'none' holds no records"):
        make(store.split("none"))
    with pytest.raises(DataError, match="has splits"):
        store.split("test")


def test_errors_of_reader_threads_surface_as_they_are(split, monkeypatch):
    def fail(indices):
        raise DataError("train/bytes is damaged")

    monkeypatch.setattr(split, "read", fail)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    with pytest.raises(DataError, match="damaged"):
        next(load(make(split), sharding, 0, 3, threads=2, prefetch=2))
