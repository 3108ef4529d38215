"""Every window is traced back to the file that it was cut from, by a search of all files."""

import collections
import os
import py_compile
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import content_type
from spectral_pod.data.tasks.content_type import ContentType
from spectral_pod.errors import DataError

FILES = 48
SUFFIXES = {"c": ".h", "text": ".md", "table": ".csv", "cython": ".pyx", "json": ".json"}
FEW = 20  # files of the rare kind, html
SIZES = {"window": 512, "windows_per_class": 64, "max_windows_per_file": 6}
QUOTAS = {"train": 64, "validation": 8, "test": 8}


def python_source(rng):
    lines = []
    for _ in range(40):
        function, x, y, value = (f"word_{rng.randrange(10**9)}" for _ in range(4))
        lines += [f"def {function}({x}, {y}={value!r}):", f"    return {x} + {y} + {rng.random()}"]
    return "\n".join(lines).encode()


# The bytecode of this depends on whether the process has interned these characters.
UNSTABLE_SOURCE = b"\ndef unstable(x):\n    return '?' if x else '/'\n"


@pytest.fixture
def tree(tmp_path):
    """Random files of eight kinds; some are short, copied, of a rare kind, or broken Python."""
    rng, root = random.Random(0), tmp_path / "tree"
    for i in range(FILES):
        folder = root / f"package_{i % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        broken = b"def (\n" if i % 6 == 1 else b""
        (folder / f"module_{i}.py").write_bytes(broken + python_source(rng))
        for suffix in SUFFIXES.values():
            size = rng.randrange(900, 4000)
            (folder / f"file_{i}{suffix}").write_bytes(rng.randbytes(size // 2).hex().encode())
        info = root / f"package_{i}.dist-info"
        info.mkdir()
        (info / "RECORD").write_bytes(rng.randbytes(rng.choice([255, 256, 300, 400, 450, 511])))
        if i < FEW:
            (folder / f"page_{i}.html").write_bytes(rng.randbytes(4000).hex().encode())
            shutil.copytree(folder, root / f"copy_{i}", dirs_exist_ok=True)
    return root


def build(root, path, **changes):
    ContentType(roots=(str(root),), **(SIZES | changes)).build(str(path))
    store = ByteStore(str(path))
    return store, {s: read(store, s) for s in content_type.SPLITS}


def read(store, name):
    split = store.split(name)
    data = split.read(np.arange(len(split)))
    return [(x.tobytes(), store.classes[k]) for x, k in zip(data, split.labels, strict=True)]


def contents(root, scratch):
    """Kind -> {identity: content}; copies share an identity, and so do the forms of one source."""
    found = collections.defaultdict(dict)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            kind = {v: k for k, v in SUFFIXES.items()} | {
                ".py": "python",
                "": "record",
                ".html": "html",
            }
            found[kind[path.suffix]].setdefault(data, []).append(data)
            if path.suffix == ".py":
                found["deflate"].setdefault(data, []).append(zlib.compress(data))
                compiled = py_compile.compile(
                    str(path),
                    cfile=str(scratch / "compiled.pyc"),
                    dfile=path.relative_to(root).as_posix(),
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                    quiet=2,
                )
                if compiled is not None:
                    found["bytecode"].setdefault(data, []).append(Path(compiled).read_bytes())
    return found


@pytest.mark.parametrize("sampled_from", [1 << 20, 1 << 10])
def test_no_file_is_in_two_splits_and_none_dominates(tree, tmp_path, monkeypatch, sampled_from):
    monkeypatch.setattr(content_type, "_SAMPLED_FROM", sampled_from)
    monkeypatch.setattr(content_type, "_BLOCK_BYTES", 16)
    found = contents(tree, tmp_path)
    _, splits = build(tree, tmp_path / "store")

    windows = [data for records in splits.values() for data, _ in records]
    assert len(set(windows)) == len(windows)

    splits_of, given = collections.defaultdict(set), collections.Counter()
    for split, records in splits.items():
        for data, kind in records:
            owners = [key for key, forms in found[kind].items() if any(data in f for f in forms)]
            assert len(owners) == 1, f"a {kind} window is in {len(owners)} files"
            splits_of[owners[0]].add(split)
            given[owners[0], kind, split] += 1
    assert {len(names) for names in splits_of.values()} == {1}
    assert all(n <= (6 if split == "train" else 1) for (_, _, split), n in given.items())


def test_kinds_are_balanced(tree, tmp_path):
    store, splits = build(tree, tmp_path / "store")
    assert store.classes == [
        "python", "bytecode", "deflate", "c", "text", "record", "table", "cython", "json",
        "html",
    ]  # fmt: skip
    for split, records in splits.items():
        counts = collections.Counter(kind for _, kind in records)
        for scarce in ("record", "html"):
            assert 0 < counts.pop(scarce) < QUOTAS[split]
        assert set(counts.values()) == {QUOTAS[split]}
    provenance = store.manifest["provenance"]
    assert set(provenance["left_out"]) == {"library", "array", "proto", "javascript"}
    assert sum(provenance["files"]["c"].values()) <= FILES  # the copies are not counted
    assert provenance["windows"]["c"] == QUOTAS


def test_a_short_file_is_one_short_record(tree, tmp_path):
    whole = {path.read_bytes() for path in tree.rglob("RECORD")}
    _, splits = build(tree, tmp_path / "store")
    records = [data for rs in splits.values() for data, kind in rs if kind == "record"]
    assert set(records) == {data for data in whole if len(data) >= 256}


def test_same_records_in_another_process_and_place(tree, tmp_path):
    for path in tree.rglob("*.py"):
        path.write_bytes(path.read_bytes() + UNSTABLE_SOURCE)
    _, expected = build(tree, tmp_path / "store")

    moved, rng = tmp_path / "elsewhere", random.Random(1)
    files = [path for path in tree.rglob("*") if path.is_file()]
    rng.shuffle(files)
    for path in files:
        target = moved / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        os.utime(target, (rng.randrange(10**9), rng.randrange(10**9)))
    for folder in list(moved.iterdir()):
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "left.py").write_bytes(python_source(rng))
        (folder / "__pycache__" / "module_0.cpython-311.pyc").write_bytes(rng.randbytes(2000))

    program = (
        "import sys; [sys.intern(c) for c in '?/']\n"  # as some imports do
        "from spectral_pod.data.tasks.content_type import ContentType\n"
        f"ContentType(roots=({str(moved)!r},), **{SIZES}).build({str(tmp_path / 'again')!r})"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    again = ByteStore(str(tmp_path / "again"))
    assert {split: read(again, split) for split in content_type.SPLITS} == expected

    _, other = build(tree, tmp_path / "other", seed=1)
    assert other != expected


def test_too_few_kinds_names_what_was_found(tree, tmp_path):
    for suffix in (".h", ".csv", ".html"):
        for path in tree.rglob(f"*{suffix}"):
            path.unlink()
    with pytest.raises(DataError, match=r"needs 8 kinds .* has 7: .*'text'") as caught:
        build(tree, tmp_path / "store")
    assert str(tree) in str(caught.value)
    assert "'c': 'fills only [0, 0, 0] of [64, 8, 8] windows'" in str(caught.value)


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("installation"))
    ContentType(windows_per_class=400).build(path)
    store = ByteStore(path)
    return store, {split: read(store, split) for split in content_type.SPLITS}


def test_the_running_interpreter_has_enough_of_every_kind(installation):
    store, splits = installation
    assert len(store.classes) >= 8
    for records in splits.values():
        counts = collections.Counter(kind for _, kind in records)
        assert set(counts) == set(store.classes)
        assert max(counts.values()) < 8 * min(counts.values())
    windows = [data for records in splits.values() for data, _ in records]
    assert len(set(windows)) == len(windows)


def test_byte_counts_tell_kinds_apart_but_not_all(installation):
    """The nearest mean byte histogram is far above chance, and far below 100%."""
    store, splits = installation

    def histograms(split):
        rows = [np.bincount(np.frombuffer(d, np.uint8), minlength=256) for d, _ in splits[split]]
        labels = np.array([store.classes.index(kind) for _, kind in splits[split]])
        return np.sqrt([row / row.sum() for row in rows]), labels

    train, train_labels = histograms("train")
    test, test_labels = histograms("test")
    means = np.stack([train[train_labels == k].mean(0) for k in range(len(store.classes))])
    nearest = ((test[:, None] - means) ** 2).sum(-1).argmin(1)
    recalls = [(nearest[test_labels == k] == k).mean() for k in range(len(store.classes))]
    assert 0.5 < np.mean(recalls) < 0.95
