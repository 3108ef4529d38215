"""The documents of files of every format are in a language model's splits, and nothing else is."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import fsspec
import numpy as np
import pytest
import zstandard
from fsspec.implementations.dirfs import DirFileSystem

from spectral_pod.data.tasks import lm
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.data.windows import Windows
from spectral_pod.errors import ConfigError, DataError
from tests.data.files import COMPRESS, as_csv, as_jsonl, as_parquet, builder_of_lm, write

TEXTS = [f"Document {i}: " + "naïve\n" * (i % 9) for i in range(100)]
RECORDS = {
    "x.jsonl": as_jsonl,
    "x.ndjson.gz": lambda texts: gzip.compress(as_jsonl(texts)),
    "x.jsonl.xz": lambda texts: lzma.compress(as_jsonl(texts)),
    "x.csv.bz2": lambda texts: bz2.compress(as_csv(texts)),
    "x.parquet": as_parquet,
}


@pytest.fixture
def build(tmp_path):
    return builder_of_lm(tmp_path)


def streams(store):
    """What windows of every split hold, as bytes: b"\0" stands for the end of a document."""
    held = {}
    for name in store.manifest["splits"]:
        source = Windows(store.split(name), batch_size=7, seq_len=11)
        batches = [source.rows(i, np.arange(7)) for i in range(source.steps_per_epoch)]
        labels = np.concatenate([batch["labels"][batch["valid"]] for batch in batches])
        first = batches[0]["tokens"][0, :1]
        held[name] = bytes(np.where(labels == 256, 0, labels).astype(np.uint8))
        held[name] = bytes(first.astype(np.uint8)) + held[name]
    return held


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["corpus.txt", "corpus"])
def test_a_compressed_text_is_the_text(build, tmp_path, name, suffix):
    data = "".join(TEXTS).encode()
    file = write(tmp_path, {name + suffix: COMPRESS[suffix](data)}) / (name + suffix)
    store, splits = build(file)
    cut = len(data) * 9 // 10
    assert splits == {"train": [data[:cut]], "validation": [data[cut:]]}
    assert streams(store) == {"train": data[:cut] + b"\0", "validation": data[cut:] + b"\0"}


@pytest.mark.parametrize("name", RECORDS)
def test_the_records_of_a_file_are_documents(build, tmp_path, name):
    file = write(tmp_path, {name: RECORDS[name](TEXTS)}) / name
    store, splits = build(file)
    expected = [text.encode() for text in TEXTS]
    assert sorted(d for part in splits.values() for d in part) == sorted(expected)
    for part in splits.values():
        assert part == [document for document in expected if document in part]
    assert streams(store) == {
        name: b"".join(d + b"\0" for d in part) for name, part in splits.items()
    }
    sizes = {name: sum(map(len, part)) for name, part in splits.items()}
    total = sum(map(len, expected))
    assert all(abs(sizes[name] - total / 20) < 40 for name in ("validation", "test"))
    # The same documents, in any format, are split in the same way.
    assert splits == build(write(tmp_path, {"y.jsonl": as_jsonl(TEXTS)}) / "y.jsonl")[1]


def test_a_folder_of_several_formats(build, tmp_path):
    root = write(tmp_path / "source", {name: RECORDS[name]([name]) for name in RECORDS})
    write(root, {"notes.txt": b"one\ntwo\n", "program.py": b"print()"})
    _, splits = build(train=root, validation=root / "x.jsonl")
    expected = [*sorted(RECORDS), "one\ntwo\n", "print()"]
    order = [*sorted(RECORDS), "notes.txt", "program.py"]
    assert splits["train"] == [
        text.encode() for _, text in sorted(zip(order, expected, strict=True))
    ]


def test_how_files_are_read_can_be_said(build, tmp_path):
    lines = b"one\n\ntwo\nthree"
    root = write(tmp_path, {"a.txt": lines, "b.csv": b"1,first\n2,second\n", "c.gz": b"raw"})
    write(root, {"d.jsonl": b'{"text": "x"}', "e.fa": b">1\nACGT\n"})

    def read(name, **options):
        _, splits = build(train=root / name, validation=root / "c.gz", **options)
        assert splits["validation"]
        return splits["train"]

    def whole(**options):
        return {"format": "whole", "data": "bytes"} | options

    with pytest.raises(DataError, match=r"c\.gz is damaged or cut short"):
        read("a.txt")
    (root / "c.gz").write_bytes(gzip.compress(b"raw"))
    assert read("a.txt") == [lines]
    assert read("d.jsonl") == [b"x"]
    assert read("d.jsonl", format="document") == [b'{"text": "x"}']
    assert read("e.fa", format="document") == [b">1\nACGT\n"]
    assert read("c.gz", **whole()) == [(root / "c.gz").read_bytes()]
    write(root, {"v": b"valid"})
    assert build(train=root / "a.txt", validation=root / "v", format="text")[1] == {
        "train": [b"one", b"two", b"three"],
        "validation": [b"valid"],
    }
    options = {"columns": ("id", "text")}
    assert build(train=root / "b.csv", validation=root / "b.csv", **options)[1]["train"] == [
        b"first",
        b"second",
    ]
    options = {"data": "sequence"}
    assert build(train=root / "e.fa", validation=root / "e.fa", **options)[1]["train"] == [b"ACGT"]


def zipped(data):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", data)
    return stream.getvalue()


def tarred(data):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        (info := tarfile.TarInfo("a.txt")).size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


PACKED = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "zip": zipped,
    "tar": tarred,
    "parquet": lambda data: as_parquet([data.decode()]),
}


@pytest.mark.parametrize("kind", PACKED)
def test_nothing_is_trained_on_compressed_or_structural_bytes_unless_that_is_said(
    build, tmp_path, kind
):
    packed = PACKED[kind](b"text " * 200)
    root = write(tmp_path / "source", {"packed": packed, "twice.gz": gzip.compress(packed)})
    for name in ("packed", "twice.gz"):
        message = rf"{name}: packed: it is a file of {kind}; .*format='document'.*on_fault"
        with pytest.raises(DataError, match=message):
            build(root / name)
    _, splits = build(root / "packed", format="document")
    assert b"".join(splits["train"] + splits["validation"]) == packed
    write(root, {"a.txt": b"x" * 100})
    store, splits = build(root, on_fault="skip")
    assert splits == {"train": [b"x" * 90], "validation": [b"x" * 10]}
    assert store.manifest["provenance"]["skipped"] == {"packed": 2}


def test_a_field_may_hold_anything(build, tmp_path):
    file = write(tmp_path, {"x.jsonl": as_jsonl(["PK\x03\x04 is how a zip begins"])}) / "x.jsonl"
    assert build(train=file, validation=file)[1]["train"] == [b"PK\x03\x04 is how a zip begins"]


def test_files_on_object_storage(build, tmp_path, monkeypatch):
    """Only fsspec's file system differs for `gs://`; a folder stands in for the storage."""
    cloud, real = DirFileSystem(str(tmp_path)), fsspec.filesystem
    monkeypatch.setattr(fsspec, "filesystem", lambda name: cloud if name == "gs" else real(name))
    files = {"a.train.txt.gz": gzip.compress(b"one two"), "a.valid.txt": b"three"}
    write(tmp_path / "bucket/set", files)
    store, splits = build("gs://bucket/set")
    assert splits == {"train": [b"one two"], "validation": [b"three"]}
    assert store.manifest["provenance"]["splits"]["train"]["first"] == "a.train.txt.gz"
    task = LanguageModelling(source="gs://bucket/set")
    task.check(store)
    (tmp_path / "bucket/set/a.valid.txt").write_bytes(b"other")
    with pytest.raises(DataError, match=r"source = 'gs://bucket/set' has changed"):
        task.check(store)


def test_records_that_cannot_be_used(build, tmp_path):
    lines = [b'{"text": "one"}', b'{"text": null}', b"{", b'{"text": ""}', b'{"body": "x"}']
    file = write(tmp_path, {"x.jsonl": b"\n".join(lines)}) / "x.jsonl"
    good = write(tmp_path, {"y.txt": b"valid"}) / "y.txt"
    with pytest.raises(DataError, match=r"x\.jsonl:2: no bytes: field 'text' is null.*on_fault"):
        build(train=file, validation=good)
    store, splits = build(train=file, validation=good, on_fault="skip")
    assert splits == {"train": [b"one"], "validation": [b"valid"]}
    provenance = store.manifest["provenance"]
    assert provenance["rows"] == 6
    assert provenance["skipped"] == {
        "no bytes": 1,
        "invalid JSON": 1,
        "empty": 1,
        "no field": 1,
    }
    with pytest.raises(DataError, match=r"options\.train = .*no bytes; left out: 5, no field"):
        build(train=file, validation=good, data="title", on_fault="skip")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train": "x.jsonl"}, DataError, r"x\.jsonl:1: no field: 'text' .*options\.data, or .*"),
        ({"train": "x.jsonl", "data": "n"}, DataError, "'n' is a int, not text"),
        ({"train": "x.parquet"}, DataError, r"x\.parquet is damaged or cut short"),
        ({"train": "x.txt.xz"}, DataError, r"x\.txt\.xz is damaged or cut short"),
        ({"train": "ok", "validation": "gone"}, DataError, r"options\.validation = .*no such file"),
        ({"train": "ok", "validation": "empty"}, DataError, r"options\.validation = .*no bytes"),
        ({"train": "empty", "validation": "ok"}, DataError, r"options\.train = .*no bytes"),
        ({"train": "ok", "test": "empty"}, DataError, r"options\.test = .*no bytes"),
        ({"train": "*.nothing"}, DataError, r"options\.train = .*no such file"),
        ({"train": "ok", "format": "xml"}, DataError, "format 'xml' is unknown"),
        ({"validation": "ok"}, ConfigError, r"options\.validation = .*options\.train is empty"),
        ({"source": "ok", "train": "ok"}, ConfigError, "two names of one option"),
        ({"data": ""}, ConfigError, r"options\.data is ''"),
        ({"on_fault": "ignore"}, ConfigError, r"options\.on_fault is 'ignore'"),
    ],
)
def test_what_cannot_be_read_is_one_message(build, tmp_path, options, error, message):
    files = {"x.jsonl": b'{"n": 1, "title": "x"}', "x.parquet": b"PAR1", "x.txt.xz": b"text"}
    write(tmp_path, files | {"ok": bytes(100), "empty": b""})
    places = ("source", *lm.SPLITS)
    options = {k: tmp_path / x if k in places else x for k, x in options.items()}
    with pytest.raises(error, match=message):
        build(**options)
