"""A store returns what was written, and damage is an error that names its location."""

import json
import os
import re
import threading

import numpy as np
import pytest

from spectral_pod.data import byte_store, store_lease, zarr_arrays
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.data.verification import Verification
from spectral_pod.errors import DataError
from tests import trainer


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    lengths = [0, 1, 7, 70_000, 3, 200_000, 0]
    return [Record(rng.bytes(n), i % 3) for i, n in enumerate(lengths)]


@pytest.fixture
def store(tmp_path, records, monkeypatch):
    monkeypatch.setattr(zarr_arrays, "PART_BYTES", 1 << 17)  # several shards from little data
    path = str(tmp_path / "store")
    splits = {"train": records, "test": (r for r in records[:2])}
    byte_store.write(path, splits, classes=["a", "b", "c"], provenance={"by": "test"})
    return path


def test_round_trip(store, records):
    split = ByteStore(store).split("train")
    assert len(split) == len(records)
    order = [5, 0, 3, 3, 6]
    assert [r.tobytes() for r in split.read(order)] == [records[i].data for i in order]
    np.testing.assert_array_equal(split.labels, [r.label for r in records])
    np.testing.assert_array_equal(split.lengths, [len(r.data) for r in records])


def test_manifest_counts_and_verifies(store, records):
    manifest = ByteStore(store).manifest
    assert manifest["splits"]["train"]["records"] == len(records)
    assert manifest["splits"]["train"]["longest"] == 200_000
    assert manifest["splits"]["train"]["class_counts"] == [3, 2, 2]
    assert manifest["provenance"] == {"by": "test"}
    byte_store.verify(store)


def test_the_digest_is_of_the_records_and_not_of_where_they_are_from(tmp_path, records):
    def digest(records, **others):
        options = {"classes": ["a", "b", "c"], "provenance": {}} | others
        byte_store.write(str(tmp_path / "s"), {"train": records}, **options)
        return ByteStore(str(tmp_path / "s")).digest

    known = digest(records)
    assert digest(records, provenance={"files": 3}) == known
    assert digest(records, classes=["a", "b", "d"]) != known
    assert digest(records[::-1]) != known
    assert digest([*records[:-1], records[-1]._replace(label=(records[-1].label + 1) % 3)]) != known


def test_unfinished_write_is_no_store_and_is_replaced(store, records, tmp_path):
    (tmp_path / "store" / "manifest.json").unlink()
    assert not byte_store.exists(store)
    with pytest.raises(DataError, match="no finished byte store"):
        ByteStore(store)
    byte_store.write(store, {"train": records[:1]}, classes=["a"], provenance={})
    assert len(ByteStore(store).split("train")) == 1


@pytest.mark.parametrize("array", ["bytes", "offsets", "labels"])
def test_a_flipped_byte_is_never_data(store, tmp_path, array):
    file = next((tmp_path / "store" / "train" / "00000" / array / "c").iterdir())
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError) as error:
        byte_store.verify(store)
    assert f"train/00000/{array}" in str(error.value)


def test_a_deleted_shard_is_an_error(store, tmp_path):
    next((tmp_path / "store" / "train" / "00000" / "bytes" / "c").iterdir()).unlink()
    with pytest.raises(DataError, match="train/00000/bytes"):
        byte_store.verify(store)
    split = ByteStore(store).split("train")
    with pytest.raises(DataError, match="train/00000/bytes"):  # not zeros
        split.read(range(len(split)))


def swap(one, other):
    kept = one.with_name("kept")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)


EXCHANGES = {
    "two parts": lambda train: swap(train / "00000", train / "00001"),
    "their bytes": lambda train: swap(train / "00000/bytes", train / "00001/bytes"),
    "another split's": lambda train: swap(train / "00000", train.with_name("test") / "00000"),
    "another split's bytes": lambda train: swap(
        train / "00000/bytes", train.with_name("test") / "00000/bytes"
    ),
    "another split": lambda train: swap(train, train.with_name("test")),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_exchanged_parts_are_never_data(tmp_path, monkeypatch, exchange):
    """Every array is sound, and all have the same sizes, offsets and labels."""
    monkeypatch.setattr(zarr_arrays, "PART_BYTES", 1 << 15)
    path, rng = str(tmp_path / "store"), np.random.default_rng(0)
    splits = {name: [Record(rng.bytes(1 << 15), 0) for _ in range(2)] for name in ("train", "test")}
    byte_store.write(path, splits, classes=["a"], provenance={})
    EXCHANGES[exchange](tmp_path / "store" / "train")

    def read_all():
        store = ByteStore(path)
        for split in map(store.split, ("train", "test")):
            split.read(range(len(split)))
        store.verification.wait()

    with pytest.raises(DataError, match=r"(train|test)/0000"):
        read_all()
    with pytest.raises(DataError):
        byte_store.verify(path)


def test_what_a_check_raises_ends_the_wait():
    def fail():
        raise MemoryError

    checks = Verification()
    checks.request(fail)
    with pytest.raises(MemoryError):
        checks.wait()


def test_a_wait_can_be_interrupted():
    """By a signal, for example: storage may take minutes."""
    never, checks = threading.Event(), Verification()
    checks.request(lambda: never.wait(60))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checks.wait(interrupt)
    never.set()


@pytest.mark.parametrize("array", ["bytes", "offsets", "labels"])
@pytest.mark.parametrize("change", [("shape", [10**15]), ("data_type", "float64")])
def test_an_array_of_another_form_is_not_read(store, tmp_path, array, change):
    """Reading one of 10**15 entries would abort the process."""
    key, value = change
    for file in (tmp_path / "store/train").glob(f"*/{array}/zarr.json"):
        held = json.loads(file.read_text())
        held[key] = value
        if key == "data_type":
            held["codecs"][0]["configuration"]["chunk_shape"] = [1]
            held["chunk_grid"]["configuration"]["chunk_shape"] = [1]
        file.write_text(json.dumps(held))
    for read in (lambda: ByteStore(store).split("train"), lambda: byte_store.verify(store)):
        with pytest.raises(DataError, match=f"train/0000./{array}"):
            read()


def test_each_part_is_verified_once(store, monkeypatch):
    verified = []
    verify = zarr_arrays.verify
    monkeypatch.setattr(
        zarr_arrays, "verify", lambda url, *rest: (verified.append(url), verify(url, *rest))
    )
    opened = ByteStore(store)
    split = opened.split("train")
    for _ in range(3):
        split.read(range(len(split)))
        opened.verification.wait()
    parts = opened.manifest["splits"]["train"]["parts"]
    assert verified == [f"{store}/train/{part['name']}/bytes" for part in parts if part["bytes"]]


@pytest.mark.parametrize("name", ["../../victim", "/tmp/victim", "..", "00000/../../../victim", ""])
def test_a_part_stays_in_its_store(store, tmp_path, name):
    (tmp_path / "victim").write_text("precious")

    def rename(manifest):
        manifest["splits"]["train"]["parts"][0]["name"] = name

    trainer.edit(tmp_path / "store/manifest.json", rename)
    with pytest.raises(
        DataError, match=r"manifest\.json cannot be used: splits\.train\.parts\.0\.name"
    ):
        ByteStore(store)
    assert (tmp_path / "victim").read_text() == "precious"


def test_pairs_of_documents(tmp_path):
    path = str(tmp_path / "pairs")
    pairs = [Record((b"one", b""), 0), Record((b"", b"four"), 1)]
    byte_store.write(path, {"train": pairs}, classes=["a", "b"], provenance={}, documents=2)
    split = ByteStore(path).split("train")
    assert (len(split), split.documents) == (2, 2)
    assert [d.tobytes() for d in split.read([2, 3, 0, 1])] == [b"", b"four", b"one", b""]
    single = [Record(b"x", 0)]
    with pytest.raises(DataError, match="record 0 has 1 documents, not 2"):
        byte_store.write(path, {"train": single}, classes=["a"], provenance={}, documents=2)


def test_a_split_that_is_not_there_is_named(store):
    with pytest.raises(DataError, match=r"has splits .*train.*, not .tset"):
        ByteStore(store).split("tset")


@pytest.mark.parametrize("records", [[], [Record(b"x", 0)]], ids=["empty", "not empty"])
@pytest.mark.parametrize(
    "name", ["manifest.json", "lease.json", "unfinished", "", "..", "../x", ".x", "a/b", "x" * 201]
)
def test_a_split_has_a_name_of_its_own(tmp_path, name, records):
    path = str(tmp_path / "store")
    with pytest.raises(DataError, match=rf"store: no split can be named {re.escape(repr(name))}; "):
        byte_store.write(path, {name: records}, classes=["a"], provenance={})
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_labels_must_have_a_class(tmp_path):
    rows = [Record(b"x", 0), Record(b"y", 4)]
    with pytest.raises(DataError, match="record 1 has label 4"):
        byte_store.write(str(tmp_path / "s"), {"train": rows}, classes=["a"], provenance={})


def test_a_writer_writes_nothing_beside_its_store(tmp_path):
    """The store may be a mount point below a folder that is read-only."""
    (tmp_path / "store").mkdir()
    path = str(tmp_path / "store")
    with store_lease.hold(path):
        for _ in range(2):
            byte_store.write(path, {"train": [Record(b"x", 0)]}, classes=["a"], provenance={})
            assert os.listdir(tmp_path) == ["store"]
            assert sorted(os.listdir(path)) == ["lease.json", "manifest.json", "train"]
    assert sorted(os.listdir(path)) == ["manifest.json", "train"]


def test_manifest_is_plain_json(store, tmp_path):
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["format"].endswith("/2")


def test_only_the_remains_of_a_store_are_replaced(tmp_path):
    rows = {"train": [Record(b"x", 0)]}
    path = tmp_path / "documents"
    (path / "train").mkdir(parents=True)
    for name in ("thesis.txt", "train/thesis.txt", "train/00000/thesis.txt"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("precious")
        with pytest.raises(DataError, match=f"documents holds '{name}', which is of no byte store"):
            byte_store.write(str(path), rows, classes=["a"], provenance={})
        assert (path / name).read_text() == "precious"
        (path / name).unlink()
    for _ in range(2):
        byte_store.write(str(path), rows, classes=["a"], provenance={})
        (path / "manifest.json").unlink()
