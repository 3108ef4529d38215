"""Every document is in exactly one split, whole and in order."""

import pathlib
import sysconfig

import numpy as np
import pytest

from spectral_pod.data import tasks
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import lm
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.data.windows import Windows
from spectral_pod.errors import DataError

SHAKESPEARE = pathlib.Path(__file__).parents[3] / "shared/data/tiny_shakespeare.txt"


@pytest.fixture
def build(tmp_path):
    """Builds a store, returned with {split: [documents]}."""
    count = iter(range(99))

    def build_once(source, **options):
        path = str(tmp_path / f"store_{next(count)}")
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


def test_a_folder_is_split_by_a_hash_of_its_paths(build, tmp_path):
    files = random_files([f"part_{i % 7}/document_{i}.txt" for i in range(200)])
    root = write(tmp_path / "source", files)
    write(root, {"empty": b"", ".hidden": b"x", ".git/config": b"x"})
    _, splits = build(root)
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 180,
        "validation": 10,
        "test": 10,
    }
    everything = [document for part in splits.values() for document in part]
    assert sorted(everything) == sorted(files.values())
    for part in splits.values():  # in the order of their paths
        assert part == [data for _, data in sorted(files.items()) if data in part]

    # Splits depend on the seed and the relative paths, not on the contents or the folder's path.
    other = random_files(files, seed=1)
    _, moved = build(write(tmp_path / "elsewhere", other))
    path_of = {data: name for files in (files, other) for name, data in files.items()}
    for name, part in splits.items():
        assert [path_of[data] for data in part] == [path_of[data] for data in moved[name]]
    assert build(root, seed=1)[1] != splits


def test_three_files_are_one_a_split(build, tmp_path):
    _, splits = build(write(tmp_path / "source", random_files("abc")))
    assert [len(splits[name]) for name in lm.SPLITS] == [1, 1, 1]


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
    files = random_files(["train.py", "test.py", "latest.txt", "trainer/valid8.txt", "a", "b"])
    del files["trainer/valid8.txt"]
    _, splits = build(write(tmp_path / "source", files))
    assert [len(splits[name]) for name in lm.SPLITS] == [3, 1, 1]


@pytest.mark.parametrize("other", ["README", "train_and_test.txt"])
def test_a_name_that_says_no_split_beside_those_that_do_is_an_error(build, tmp_path, other):
    names = ["wiki.train.tokens", "wiki.valid.tokens", other]
    with pytest.raises(DataError, match=rf"options\.source = .* such as '{other}'"):
        build(write(tmp_path / "source", random_files(names)))


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
        "missing": "no such file or folder",
        "empty": "holds no bytes",
        "folder": "holds no bytes",
        "one": "1 byte",
        "two": "2 files",
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
