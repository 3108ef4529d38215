"""Windows against the stream of documents as a list of tokens."""

import collections

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spectral_pod.data import byte_store
from spectral_pod.data.pipeline import load
from spectral_pod.data.windows import EOS_CLASS, NUM_CLASSES, Windows
from spectral_pod.errors import DataError
from spectral_pod.parallel.mesh import AXES, make_mesh
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.shapes import EOS, PAD


class MemorySplit:
    """A split of given documents in memory; remembers what was read."""

    name = "test"

    def __init__(self, documents):
        self.offsets = np.cumsum([0, *map(len, documents)])
        self._bytes = np.frombuffer(b"".join(documents), np.uint8)
        self.reads = []

    def __len__(self):
        return len(self.offsets) - 1

    def read_ranges(self, ranges):
        self.reads += [(int(start), int(stop)) for start, stop in ranges]
        return [self._bytes[start:stop] for start, stop in ranges]


def stream_of(documents):
    return [token for document in documents for token in [*document, EOS]]


def make(documents, batch_size=4, seq_len=5, **options):
    return Windows(MemorySplit(documents), batch_size=batch_size, seq_len=seq_len, **options)


def random_documents(seed, lengths=(30, 0, 0, 7, 1, 200, 64)):
    rng = np.random.default_rng(seed)
    return [rng.bytes(n) for n in lengths]


def class_of(token):
    return 256 if token == EOS else token


def all_rows(source):
    return np.arange(source.batch_size)


documents_strategy = st.lists(st.binary(max_size=9), min_size=1, max_size=8).filter(
    lambda documents: len(stream_of(documents)) > 1
)


# ---- in order


@given(documents=documents_strategy, batch_size=st.integers(1, 5), seq_len=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_every_token_but_the_first_is_predicted_once(documents, batch_size, seq_len):
    source, stream = make(documents, batch_size, seq_len), stream_of(documents)
    batches = [source.rows(step, all_rows(source)) for step in range(source.steps_per_epoch)]
    tokens, labels, valid = (
        np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "labels", "valid")
    )
    np.testing.assert_array_equal(labels[valid], [class_of(token) for token in stream[1:]])
    np.testing.assert_array_equal(tokens[valid], stream[:-1])
    assert (tokens[~valid] == PAD).all()
    assert (labels[~valid] == 0).all()
    # All windows but the last are full, and so are all batches but the last.
    assert valid[: source.num_records - 1].all()
    assert valid[source.num_records - 1].any()
    assert not valid[source.num_records :].any()
    assert len(valid) - source.num_records < batch_size


def test_shapes_and_types():
    batch = make([b"abcdefgh"]).rows(0, np.arange(3))
    assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
        "tokens": (np.int32, (3, 5)),
        "labels": (np.int32, (3, 5)),
        "valid": (bool, (3, 5)),
    }
    assert (EOS_CLASS, NUM_CLASSES) == (256, 257)


def test_the_example_of_the_docstring():
    source = make([b"abc", b"de"], batch_size=1, seq_len=4, shuffle_seed=0)
    source.starts = lambda step, rows: np.array([1])
    batch = source.rows(0, np.arange(1))
    assert list(batch["tokens"][0]) == [ord("b"), ord("c"), EOS, ord("d")]
    assert list(batch["labels"][0]) == [ord("c"), 256, ord("d"), ord("e")]


def test_the_first_documents_only():
    documents = random_documents(0)
    few = make(documents, num_documents=4)
    batches = [few.rows(step, all_rows(few)) for step in range(few.steps_per_epoch)]
    labels = np.concatenate([batch["labels"][batch["valid"]] for batch in batches])
    assert list(labels) == [class_of(token) for token in stream_of(documents[:4])[1:]]
    shuffled = make(documents, num_documents=4, shuffle_seed=0)
    assert max(shuffled.starts(step, np.arange(4)).max() for step in range(99)) <= 41 - 6


# ---- shuffled


@given(documents=documents_strategy, seq_len=st.integers(1, 6), seed=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_shuffled_windows_are_pieces_of_the_stream(documents, seq_len, seed):
    stream = stream_of(documents)
    if len(stream) <= seq_len:
        with pytest.raises(DataError, match=r"config\.data\.seq_len"):
            make(documents, seq_len=seq_len, shuffle_seed=seed)
        return
    source = make(documents, 4, seq_len, shuffle_seed=seed)
    for step in (0, 7, 10**12):
        batch = source.rows(step, all_rows(source))
        assert batch["valid"].all()
        for row, start in enumerate(source.starts(step, all_rows(source))):
            assert list(batch["tokens"][row]) == stream[start : start + seq_len]
            following = stream[start + 1 : start + 1 + seq_len]
            assert list(batch["labels"][row]) == [class_of(token) for token in following]


def test_starts_are_uniform_and_independent():
    source = make([bytes(24), b""], batch_size=8, seq_len=5, shuffle_seed=3)  # 26 tokens
    starts = np.stack([source.starts(step, np.arange(8)) for step in range(4000)])
    counts = collections.Counter(starts.ravel().tolist())
    assert set(counts) == set(range(26 - 5))  # the last window predicts the last token
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    for other in (np.roll(starts, 1, axis=0), np.roll(starts, 1, axis=1)):
        assert abs(np.corrcoef(starts.ravel(), other.ravel())[0, 1]) < 0.02
    seeds = [make([bytes(999)], shuffle_seed=s).starts(0, np.arange(4)).tolist() for s in range(9)]
    assert len({tuple(starts) for starts in seeds}) == 9


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("seed", [None, 5])
def test_processes_read_their_own_rows_of_the_same_batch(num_processes, seed):
    """With an object per process, and in any order of steps."""
    documents = random_documents(1)
    whole = make(documents, batch_size=8, seq_len=9, shuffle_seed=seed)
    for step in np.random.default_rng(0).permutation(whole.steps_per_epoch):
        expected, parts = whole.rows(int(step), np.arange(8)), []
        for rows in np.split(np.arange(8), num_processes):
            source = make(documents, batch_size=8, seq_len=9, shuffle_seed=seed)
            parts.append(source.rows(int(step), rows))
            assert len(source._split.reads) == len(rows)
            assert all(stop - start <= 10 for start, stop in source._split.reads)
        for name, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


# ---- from a store, to the devices


@pytest.mark.parametrize("seed", [None, 2])
def test_from_a_store_to_global_arrays(tmp_path, seed):
    documents, path = random_documents(2), str(tmp_path / "store")
    records = [byte_store.Record(document, 0) for document in documents]
    byte_store.write(path, {"test": records}, classes=["document"], provenance={})
    options = {"batch_size": 4, "seq_len": 16, "shuffle_seed": seed}
    source = Windows(byte_store.ByteStore(path).split("test"), **options)
    expected = Windows(MemorySplit(documents), **options)
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    steps = load(source, batch_sharding(mesh), 1, 4, threads=2, prefetch=2)
    for step, batch in zip(range(1, 4), steps, strict=True):
        for name, values in expected.rows(step, np.arange(4)).items():
            np.testing.assert_array_equal(batch[name], values)


# ---- errors


@pytest.mark.parametrize("documents", [[], [b""]])
def test_nothing_to_predict_is_an_error(documents):
    with pytest.raises(DataError, match="'test' holds no bytes"):
        make(documents)


def test_too_short_for_one_window_names_the_field():
    make([b"abcde"], seq_len=5, shuffle_seed=0)
    with pytest.raises(DataError, match=r"'test' has 6 .*config\.data\.seq_len = 6"):
        make([b"abcde"], seq_len=6, shuffle_seed=0)
    make([b"abcde"], seq_len=6)  # in order, the window is padded


def test_damage_is_never_data(tmp_path):
    path = str(tmp_path / "store")
    data = np.random.default_rng(0).bytes(10_000)
    byte_store.write(
        path, {"test": [byte_store.Record(data, 0)]}, classes=["document"], provenance={}
    )
    file = next(p for p in (tmp_path / "store/test/00000/bytes/c").iterdir() if p.is_file())
    raw = bytearray(file.read_bytes())
    raw[5000] ^= 1
    file.write_bytes(raw)
    source = Windows(byte_store.ByteStore(path).split("test"), batch_size=1, seq_len=100)
    with pytest.raises(DataError, match=r"00000, bytes 4900 to 5001, is damaged"):
        source.rows(49, np.arange(1))
