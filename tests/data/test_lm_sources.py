"""Sources of language models: published texts, the interpreter's library, missing and changed ones.

And the stores that older versions made of them.
"""

import pathlib
import sysconfig

import pytest

from spectral_pod.data import byte_store, tasks
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.errors import DataError
from tests.data.files import SHARED, builder_of_lm, random_files, write


@pytest.fixture
def build(tmp_path):
    return builder_of_lm(tmp_path)


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
