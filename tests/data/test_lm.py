"""Every document of a file, a folder or given splits is in a split, whole or cut, and in order."""

import os

import numpy as np
import pytest

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import lm
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.data.windows import Windows
from spectral_pod.errors import DataError
from tests.data.files import SHARED, builder_of_lm, random_files, write

SHAKESPEARE = SHARED / "tiny_shakespeare.txt"


@pytest.fixture
def build(tmp_path):
    return builder_of_lm(tmp_path)


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
