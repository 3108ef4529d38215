"""Every batch is a pure function of (seed, step), however many processes read it."""

import threading
import time

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_pod.data import byte_store
from spectral_pod.data.pipeline import Batches, load
from spectral_pod.errors import DataError
from spectral_pod.parallel.mesh import AXES, make_mesh
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.shapes import PAD

SEQ_LEN = 8


class CountingSplit:
    """Records of 0 to 8 bytes, which are the record's index and class; remembers what was read."""

    name = "test"

    def __init__(self, num_records, wait=lambda index: None):
        self.labels = np.arange(num_records, dtype=np.int32)
        self.documents = 1
        self.lengths = np.arange(num_records) % (SEQ_LEN + 1)
        self.reads = []
        self._wait = wait

    def __len__(self):
        return len(self.labels)

    def read(self, indices):
        for index in indices:
            self._wait(int(index))
            self.reads.append(int(index))
        return [np.full(self.lengths[i], i % 256, np.uint8) for i in indices]


def make(num_records=13, batch_size=4, seed=0, **options):
    split = CountingSplit(num_records)
    options = {"shuffle_seed": seed, "seq_len": SEQ_LEN} | options
    return Batches(split, batch_size=batch_size, **options)


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(batch[name], expected[name])


def stream(batches, steps):
    return np.concatenate([batches.records(step) for step in range(steps)])


def loaded(batches, start, stop, threads=2, prefetch=3):
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    return load(batches, batch_sharding(mesh), start, stop, threads=threads, prefetch=prefetch)


sizes = st.integers(1, 40)


# ---- the order of records


@given(num_records=sizes, batch_size=sizes, seed=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_every_epoch_has_every_record_once(num_records, batch_size, seed):
    """This includes batches that cross into the next epoch or span several."""
    steps = -(-3 * num_records // batch_size)
    epochs = stream(make(num_records, batch_size, seed), steps)[: 3 * num_records]
    for epoch in epochs.reshape(3, num_records):
        assert sorted(epoch) == list(range(num_records))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        tuple(epoch)
        for seed in (0, 1, 2)
        for epoch in stream(make(100, 50, seed), steps=6).reshape(3, 100)
    ]
    assert len({*orders, tuple(range(100))}) == 10
    # No order is a shift of another: two agree by chance only, at 1 of 100 positions.
    agreements = [np.equal(a, b).mean() for i, a in enumerate(orders) for b in orders[:i]]
    assert np.mean(agreements) < 0.03


def test_a_step_is_the_same_whenever_it_is_asked_for():
    """In a new object, in any order, and after 10^12 steps without more memory or time."""
    first, other = make(), make()
    assert_same(first.rows(7, np.arange(4)), other.rows(7, np.arange(4)))
    expected = [other.records(step) for step in range(20)]
    for step in np.random.default_rng(0).permutation(20):
        np.testing.assert_array_equal(make().records(int(step)), expected[step])
    assert set(make().records(10**12)) <= set(range(13))


@pytest.mark.parametrize("num_records", [1, 2, 13, 10_000])
def test_an_epoch_is_in_the_order_of_a_dataset_that_grain_shuffles(num_records):
    """So runs that were started with another release continue with the same order."""
    records = stream(make(num_records, batch_size=num_records, seed=5), steps=2)
    for epoch, order in enumerate(records.reshape(2, num_records)):
        seed = int(np.random.SeedSequence([5, epoch]).generate_state(1)[0])
        dataset = grain.MapDataset.range(num_records).shuffle(seed=seed)
        assert list(order) == [dataset[i] for i in range(num_records)]


def test_the_first_records_only():
    batches = make(num_records=100)
    few = Batches(batches._split, batch_size=4, seq_len=SEQ_LEN, num_records=10, shuffle_seed=0)
    assert sorted(stream(few, steps=5)) == sorted([*range(10)] * 2)
    assert few.steps_per_epoch == 3
    assert make(num_records=100, **{"seq_len": SEQ_LEN}).steps_per_epoch == 25


@given(num_records=sizes, batch_size=sizes)
@settings(max_examples=30, deadline=None)
def test_evaluation_has_every_record_once_and_then_padding(num_records, batch_size):
    batches = make(num_records, batch_size, seed=None)
    steps = [batches.rows(s, np.arange(batch_size)) for s in range(batches.steps_per_epoch)]
    valid = np.concatenate([step["valid"] for step in steps])
    labels = np.concatenate([step["labels"] for step in steps])
    tokens = np.concatenate([step["tokens"] for step in steps])
    np.testing.assert_array_equal(labels[valid], np.arange(num_records))
    assert sum(valid) == num_records
    assert valid[:num_records].all()
    assert len(valid) - num_records < batch_size
    assert (tokens[~valid] == PAD).all()
    assert batches._split.reads == list(range(num_records))


# ---- the contents of rows


def test_rows_hold_bytes_and_then_padding():
    batch = make(seed=None).rows(1, np.arange(4))  # records 4 to 7, of 4 to 7 bytes
    for row, index in enumerate(range(4, 8)):
        assert list(batch["tokens"][row]) == [index] * index + [PAD] * (SEQ_LEN - index)
    assert list(batch["labels"]) == [4, 5, 6, 7]
    assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
        "tokens": (np.int32, (4, SEQ_LEN)),
        "labels": (np.int32, (4,)),
        "valid": (bool, (4,)),
    }


def test_truncation_keeps_the_beginning():
    split = CountingSplit(4)
    split.lengths = np.full(4, 100)
    split.read = lambda indices: [np.arange(100, dtype=np.uint8) for _ in indices]
    batches = Batches(split, batch_size=2, seq_len=SEQ_LEN, truncate=True)
    np.testing.assert_array_equal(batches.rows(0, np.arange(2))["tokens"], [range(SEQ_LEN)] * 2)


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("seed", [None, 5])
def test_processes_read_their_own_rows_of_the_same_batch(num_processes, seed):
    whole = make(num_records=50, batch_size=8, seed=seed)
    for step in range(whole.steps_per_epoch):
        parts = []
        for rows in np.split(np.arange(8), num_processes):
            batches = make(num_records=50, batch_size=8, seed=seed)
            parts.append(batches.rows(step, rows))
            mine = whole.records(step)[rows]
            assert batches._split.reads == list(mine[mine >= 0])
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert_same(joined, whole.rows(step, np.arange(8)))


# ---- reading ahead


def test_loading_starts_at_any_step():
    batches = make()
    steps = list(loaded(batches, 5, 9))
    assert len(steps) == 4
    for step, batch in zip(range(5, 9), steps):
        assert_same(batch, batches.rows(step, np.arange(4)))
        assert all(isinstance(x, jax.Array) for x in batch.values())


def test_steps_come_in_order_however_long_their_reads_take():
    batches, random = make(40, batch_size=2, seed=None), np.random.default_rng(0)
    delays = random.uniform(0, 0.02, 40)
    batches._split._wait = lambda index: time.sleep(delays[index])
    labels = [batch["labels"] for batch in loaded(batches, 0, 20, threads=4, prefetch=8)]
    np.testing.assert_array_equal(np.concatenate(labels), range(40))
    assert batches._split.reads != list(range(40))  # the order of reads is another


def test_reading_ahead_has_a_bound():
    batches = make(1000, batch_size=1)
    steps = loaded(batches, 0, 1000, threads=2, prefetch=3)
    for _ in range(10):
        next(steps)
    time.sleep(0.3)
    assert 10 <= len(batches._split.reads) <= 10 + 3 + 2


def test_reading_happens_in_threads_of_its_own():
    batches, readers = make(), set()
    batches._split._wait = lambda index: readers.add(threading.current_thread())
    list(loaded(batches, 0, 5))
    assert threading.main_thread() not in readers


# ---- errors


def test_an_error_of_a_reader_arrives_where_the_step_is_taken():
    batches = make(seed=None)

    def fail(index):
        if index == 9:  # in step 2
            raise DataError("record 9 is damaged")

    batches._split._wait = fail
    steps = loaded(batches, 0, 3)
    next(steps), next(steps)
    with pytest.raises(DataError, match="record 9 is damaged"):
        next(steps)


def test_a_damaged_store_is_an_error_of_the_loop(tmp_path):
    rng, path = np.random.default_rng(0), str(tmp_path / "store")
    records = [byte_store.Record(rng.bytes(SEQ_LEN), 0) for _ in range(64)]
    byte_store.write(path, {"train": records}, classes=["a"], provenance={})
    file = max((p for p in (tmp_path / "store/train/00000/bytes").rglob("*") if p.is_file()),
               key=lambda p: p.stat().st_size)  # fmt: skip
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    batches = Batches(byte_store.ByteStore(path).split("train"), batch_size=4, seq_len=SEQ_LEN)
    with pytest.raises(DataError, match="damaged"):
        list(loaded(batches, 0, 16))


def test_pairs_lie_side_by_side(tmp_path):
    path, pairs = str(tmp_path / "pairs"), [(b"ab", b"c"), (b"", b"wxyz"), (b"e", b"f")]
    records = [byte_store.Record(pair, i) for i, pair in enumerate(pairs)]
    options = {"classes": ["x", "y", "z"], "provenance": {}, "documents": 2}
    byte_store.write(path, {"test": records}, **options)
    split = byte_store.ByteStore(path).split("test")
    batch = Batches(split, batch_size=2, seq_len=4, documents=2).rows(0, np.arange(2))
    expected = [[*b"ab", PAD, PAD, *b"c", PAD, PAD, PAD], [PAD] * 4 + [*b"wxyz"]]
    np.testing.assert_array_equal(batch["tokens"], expected)
    with pytest.raises(DataError, match="record 1 of split 'test' has 4 bytes"):
        Batches(split, batch_size=2, seq_len=3, documents=2)
    with pytest.raises(DataError, match=r"2 document.*config.data.documents is 1"):
        Batches(split, batch_size=2, seq_len=4)


def test_a_record_that_is_too_long_is_named():
    with pytest.raises(DataError, match=r"record 8 of split 'test' has 8 bytes.* 4.*truncate"):
        make(seq_len=4)
    make(seq_len=4, truncate=True)
    make(seq_len=4, num_records=5)


def test_an_empty_split_is_an_error():
    with pytest.raises(DataError, match="'test' holds no records"):
        make(num_records=0)
