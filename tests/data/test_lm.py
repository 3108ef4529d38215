"""Every document of files of every kind is in a split, whole or cut, and in order."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pathlib
import sysconfig
import tarfile
import zipfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from fsspec.implementations.dirfs import DirFileSystem

from spectral_pod.data import byte_store, tasks
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import lm
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.data.windows import Windows
from spectral_pod.errors import ConfigError, DataError

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"
SHAKESPEARE = SHARED / "tiny_shakespeare.txt"


@pytest.fixture
def build(tmp_path):
    """Builds a store, returned with {split: [documents]}."""
    count = iter(range(99))

    def build_once(source="", **options):
        path = str(tmp_path / f"store_{next(count)}")
        options = {k: str(x) if isinstance(x, pathlib.Path) else x for k, x in options.items()}
        LanguageModelling(source=str(source), **options).build(path)
        store = ByteStore(path)
        splits = {name: store.split(name) for name in store.manifest["splits"]}
        return store, {
            name: [data.tobytes() for data in split.read(range(len(split)))]
            for name, split in splits.items()
        }

    return build_once


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def random_files(names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.bytes(8 + i % 50) for i, name in enumerate(names)}


# ---- a file


@pytest.mark.parametrize("size", [2, 9, 10, 1001])
def test_a_file_is_cut_after_nine_tenths(build, tmp_path, size):
    data = np.random.default_rng(0).bytes(size)
    store, splits = build(write(tmp_path, {"input.bin": data}) / "input.bin")
    assert splits == {
        "train": [data[: int(0.9 * size)]],
        "validation": [data[int(0.9 * size) :]],
    }
    assert store.classes == ["document"]
    with pytest.raises(DataError, match="'test'"):
        store.split("test")


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="../shared/data/tiny_shakespeare.txt missing")
def test_tiny_shakespeare_is_split_as_nanogpt_does(build):
    store, splits = build(SHAKESPEARE)
    data = SHAKESPEARE.read_bytes()
    assert [len(splits[name][0]) for name in ("train", "validation")] == [1_003_854, 111_540]
    assert splits["train"][0] + splits["validation"][0] == data
    windows = Windows(store.split("validation"), batch_size=64, seq_len=256)
    batches = [windows.rows(s, np.arange(64)) for s in range(windows.steps_per_epoch)]
    labels = np.concatenate([batch["labels"][batch["valid"]] for batch in batches])
    assert bytes(labels[:-1].astype(np.uint8)) == data[1_003_855:]
    assert labels[-1] == 256


# ---- a folder


def test_a_folder_is_split_by_a_hash_of_its_documents(build, tmp_path):
    files = random_files([f"part_{i % 7}/document_{i}.txt" for i in range(200)])
    root = write(tmp_path / "source", files)
    write(root, {"empty": b"", ".hidden": b"x", ".git/config": b"x"})
    store, splits = build(root)
    total = sum(map(len, files.values()))
    for name, share in {"train": 0.9, "validation": 0.05, "test": 0.05}.items():
        assert abs(sum(map(len, splits[name])) - share * total) < 58
    everything = [document for part in splits.values() for document in part]
    assert sorted(everything) == sorted(files.values())
    for part in splits.values():  # in the order of their paths
        assert part == [data for _, data in sorted(files.items()) if data in part]
    provenance = store.manifest["provenance"]
    assert provenance["skipped"] == {"empty": 1}
    assert provenance["places"] == {"empty": [f"{root}/empty: empty"]}

    # Splits depend on the seed and the contents, not on names.
    renamed = {f"{i}/{len(name)}": files[name] for i, name in enumerate(files)}
    _, moved = build(write(tmp_path / "elsewhere", renamed))
    assert {k: sorted(part) for k, part in moved.items()} == {
        k: sorted(part) for k, part in splits.items()
    }
    assert build(root, seed=1)[1] != splits


def test_a_small_file_beside_a_corpus_is_no_split(build, tmp_path, capsys):
    """The corpus is cut, whatever the files beside it are named."""
    files = {
        "corpus.txt": bytes(range(256)) * 400,
        "README.md": b"Read me",
        "LICENSE": b"MIT" * 300,
    }
    store, splits = build(write(tmp_path / "source", files))
    corpus = files["corpus.txt"]
    assert splits == {
        "train": [files["LICENSE"], files["README.md"], corpus[:92_160]],
        "validation": [corpus[92_160:97_280]],
        "test": [corpus[97_280:]],
    }
    printed = capsys.readouterr().out.splitlines()
    facts_of = store.manifest["provenance"]["splits"]
    for line, name in zip(printed, lm.SPLITS, strict=True):
        facts, documents = facts_of[name], splits[name]
        size, words = facts["bytes"], facts["words"]
        assert facts["documents"] == len(documents)
        assert size == sum(map(len, documents))
        assert words == sum(len(data.split()) + data.count(b"\n") for data in documents)
        count = f"{name}: {len(documents)} document(s), {size:,} bytes, {words:,} words"
        assert line.startswith(count)
    assert printed[0].endswith(": 'LICENSE' to 'corpus.txt, bytes 0 to 92160'")
    assert printed[2].endswith(": 'corpus.txt, bytes 97280 to 102400'")


def test_names_of_files_may_be_any_bytes(build, tmp_path):
    for name in (b"\xff.txt", b"new\nline.txt", "é.txt".encode()):
        (tmp_path / os.fsdecode(name)).write_bytes(b"0123456789" * 9)
    (tmp_path / os.fsdecode(b"\xfe")).touch()
    facts = build(tmp_path)[0].manifest["provenance"]
    assert facts["splits"]["train"]["last"] == "\\xff.txt, bytes 0 to 81"
    assert facts["places"]["empty"] == [f"{tmp_path}/\\xfe: empty"]


def test_three_equal_files_are_cut(build, tmp_path):
    files = {name: np.random.default_rng(i).bytes(100) for i, name in enumerate("abc")}
    _, splits = build(write(tmp_path / "source", files))
    assert splits == {
        "train": [data[:90] for data in files.values()],
        "validation": [data[90:95] for data in files.values()],
        "test": [data[95:] for data in files.values()],
    }


@pytest.mark.parametrize(
    "names",
    [
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("Stories-GPT4-train.txt", "Stories-GPT4-valid.txt"),
        ("train/test_1.txt", "validation/train.txt", "test/a/b"),
        ("set/training_a", "set/val_a", "set/test_a"),
    ],
)
def test_names_may_say_the_split(build, tmp_path, names):
    files = random_files(names)
    _, splits = build(write(tmp_path / "source", files))
    said = dict(zip(("train", "validation", "test"), names))
    assert splits == {split: [files[name]] for split, name in said.items()}


def test_names_that_are_words_for_something_else_do_not_count(build, tmp_path):
    """If no name says validation, names do not decide the splits."""
    files = {name: bytes(100) for name in ("train.py", "test.py", "latest.txt", "a", "b")}
    _, splits = build(write(tmp_path / "source", files))
    assert [len(splits[name]) for name in lm.SPLITS] == [5, 5, 5]


@pytest.mark.parametrize("other", ["README", "train_and_test.txt"])
def test_a_name_that_says_no_split_beside_those_that_do_is_an_error(build, tmp_path, other):
    names = ["wiki.train.tokens", "wiki.valid.tokens", other]
    with pytest.raises(DataError, match=rf"options\.source = .* such as '{other}'"):
        build(write(tmp_path / "source", random_files(names)))


# ---- given splits


def test_splits_that_are_given(build, tmp_path):
    """Names do not matter, and nothing is held out."""
    names = ["train.txt", "b.valid.txt", "c", "d/1.txt", "d/2.txt"]
    files = random_files(names)
    root = write(tmp_path, files)
    store, splits = build(train=root / "c", validation=root / "train.txt", test=root / "d")
    assert splits == {
        "train": [files["c"]],
        "validation": [files["train.txt"]],
        "test": [files["d/1.txt"], files["d/2.txt"]],
    }
    assert {k: x["files"] for k, x in store.manifest["provenance"]["sources"].items()} == {
        "train": 1,
        "validation": 1,
        "test": 2,
    }
    assert build(train=root / "c", validation=root / "train.txt")[1].keys() == {
        "train",
        "validation",
    }


def test_validation_is_held_out_beside_a_test_split_that_is_given(build, tmp_path):
    root = write(tmp_path, {"a": bytes(range(200)), "test": b"0123456789"})
    _, splits = build(train=root / "a", test=root / "test")
    assert splits == {
        "train": [bytes(range(180))],
        "validation": [bytes(range(180, 200))],
        "test": [b"0123456789"],
    }


def test_a_changed_file_of_any_split_is_named(build, tmp_path):
    root = write(tmp_path, {"a": b"0123456789", "b": b"0123456789"})
    options = {"train": str(root / "a"), "validation": str(root / "b")}
    store, _ = build(**options)
    task = LanguageModelling(**options)
    task.check(store)
    (root / "b").write_bytes(b"9876543210")
    with pytest.raises(DataError, match=r"options\.validation = .*/b' has changed since"):
        task.check(store)


@pytest.mark.parametrize(
    "provenance", [{}, {"sources": []}, {"sources": {"train": {"files": 1}}}, {"files": None}]
)
def test_a_manifest_that_does_not_say_its_files_is_refused(tmp_path, provenance):
    write(tmp_path, {"a": b"0123456789"})
    path = str(tmp_path / "store")
    splits = {"train": [byte_store.Record(b"0", 0)]}
    byte_store.write(path, splits, classes=["document"], provenance=provenance)
    with pytest.raises(DataError, match="does not say from which files"):
        LanguageModelling(source=str(tmp_path / "a")).check(ByteStore(path))


def test_a_split_that_is_not_there_is_named(build, tmp_path):
    source = write(tmp_path, {"a": bytes(100)}) / "a"
    store, _ = build(source)
    with pytest.raises(DataError, match=r"train, validation, and no test split; .*options\.test.*"):
        LanguageModelling().batches(None, "test", {"lm": store}, training=False)


# ---- formats

TEXTS = [f"Document {i}: " + "naïve\n" * (i % 9) for i in range(100)]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def as_jsonl(texts):
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def as_csv(texts):
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([("id", "text"), *enumerate(texts)])
    return stream.getvalue().encode()


def as_parquet(texts):
    stream = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": texts, "id": range(len(texts))}), stream)
    return stream.getvalue()


RECORDS = {
    "x.jsonl": as_jsonl,
    "x.ndjson.gz": lambda texts: gzip.compress(as_jsonl(texts)),
    "x.jsonl.xz": lambda texts: lzma.compress(as_jsonl(texts)),
    "x.csv.bz2": lambda texts: bz2.compress(as_csv(texts)),
    "x.parquet": as_parquet,
}


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


# ---- words


@pytest.mark.skipif(
    not SHARED.joinpath("wikitext2_test.txt").exists(),
    reason="../shared/data/wikitext2_*.txt missing",
)
def test_words_of_wikitext_are_counted_as_it_is_published(build):
    """Merity et al. 2016, table 1: tokens of the validation and the test split."""
    files = {
        s: SHARED / f"wikitext2_{n}.txt" for s, n in (("train", "valid"), ("validation", "test"))
    }
    store, _ = build(**files)
    facts = store.manifest["provenance"]["splits"]
    assert [facts[split]["words"] for split in files] == [217_646, 245_569]


# ---- stores of older versions


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("", True),
        ("corpus.txt", True),
        ("gone/corpus.tokens", True),
        ("corpus.txt.gz", False),
        ("corpus.jsonl", False),
        ("folder", False),
    ],
)
def test_a_store_of_an_older_version_is_used_where_its_splits_are_the_same(
    tmp_path, monkeypatch, source, is_found
):
    monkeypatch.chdir(write(tmp_path, {"folder/a": b"x", "corpus.txt": b"x"}))
    task = LanguageModelling(source=source)
    for given in ({"source": source}, {"seed": 0, "source": source}):
        old = task._path("data", given)
        splits = {"train": [byte_store.Record(b"0", 0)]}
        byte_store.write(old, splits, classes=["document"], provenance={})
        found = task.find_store("data", {"source": source})
        assert found == (old if is_found else task.store_path("data"))
        byte_store.clear(old)


def test_the_digest_of_a_file_is_that_of_older_versions(build, tmp_path):
    store, _ = build(write(tmp_path, {"a.txt": bytes(range(256)) * 9}) / "a.txt")
    assert store.digest == "d194266f898fdcac0b022d1228d61fd9ce99778bc2f610a768f00dd2c9d3800c"


# ---- the interpreter's library


def test_the_library_by_modules(build):
    store, splits = build("")
    sizes = {name: info["bytes"] for name, info in store.manifest["splits"].items()}
    assert sizes["train"] > 5e6
    assert all(1e5 < sizes[name] < sizes["train"] / 5 for name in ("validation", "test"))

    root = pathlib.Path(sysconfig.get_path("stdlib"))
    splits_of = {data: name for name, part in splits.items() for data in part}
    split_of_module = {}
    for module in ("json", "email", "asyncio", "http", "xml", "this.py", "ast.py", "heapq.py"):
        files = [root / module] if module.endswith(".py") else sorted((root / module).glob("*.py"))
        contents = [file.read_bytes() for file in files]
        (split_of_module[module],) = {splits_of[data] for data in contents if data}
    assert "train" in split_of_module.values()
    tests = [file.read_bytes() for file in root.glob("test/test_json/test_*.py")]
    assert not any(data in splits_of for data in tests)
    LanguageModelling().check(store)  # never stale


# ---- missing and changed sources


def test_what_cannot_be_split_is_an_error(build, tmp_path):
    write(
        tmp_path, {"empty": b"", "one": b"x", "folder/.hidden": b"x", "two/a": b"x", "two/b": b"y"}
    )
    for source, message in {
        "missing": "no such file",
        "empty": "holds no bytes",
        "folder": "no such file, folder with files",
        "one": "1 byte",
        "two": "leaves nothing for train",
    }.items():
        with pytest.raises(DataError, match=rf"config\.data\.options\.source.*{message}"):
            build(tmp_path / source)


@pytest.mark.parametrize("where", ["source/b", "source/c", "source"])
def test_a_store_is_stale_once_its_source_has_changed(build, tmp_path, where):
    write(tmp_path / "source", random_files("abcd"))
    source = tmp_path / ("source" if where == "source" else "source/b")
    store, _ = build(source)

    def check():
        LanguageModelling(source=str(source)).check(store)

    check()
    file = tmp_path / ("source/b" if where == "source" else where)
    file.touch()  # a new time alone is no change
    check()
    before = file.read_bytes()
    file.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    if where == "source/c":
        check()  # the store was made from another file
        return
    with pytest.raises(DataError, match=rf"options\.source = .*changed since {store.path}"):
        check()
    file.write_bytes(before)
    check()
    if where == "source":
        file.rename(tmp_path / "source/e")
        with pytest.raises(DataError, match="has changed"):
            check()


def test_a_store_outlives_its_source(build, tmp_path):
    source = write(tmp_path, {"input": b"0123456789"}) / "input"
    store, _ = build(source)
    source.unlink()
    LanguageModelling(source=str(source)).check(store)


def test_tasks_without_files_of_the_user_are_never_stale():
    tasks.make("listops", {}).check(None)
