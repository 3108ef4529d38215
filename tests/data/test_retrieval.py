"""Every document is traced back to the file or the line that it comes from."""

import collections
import itertools
import random
import shutil

import numpy as np
import pytest

from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import retrieval
from spectral_pod.data.tasks.retrieval import Retrieval
from spectral_pod.errors import ConfigError, DataError

SIZES = {"window": 100, "train": 80, "validation": 16, "test": 12}
PAPERS = [
    ("1", b"P1\nA study.", b'it\'s "quoted"\ttext'),
    ("0.0", b"", b"\xff\x00\\n caf\xc3\xa9"),
    ("1.0", b"b", b"x" * 9000),
    ("0", b"plain", b"b'"),
]


def contents(store, name):
    """[((first, second), label)] of a split."""
    split = store.split(name)
    data = [x.tobytes() for x in split.read(np.arange(2 * len(split)))]
    return list(zip(zip(data[::2], data[1::2], strict=True), split.labels.tolist(), strict=True))


# ---- the published files


def write_published(folder, papers=PAPERS, spell=repr):
    for name in retrieval.FILES.values():
        lines = [
            "\t".join((label, "P00-1", "W01-2", spell(one), spell(two)))
            for label, one, two in papers
        ]
        (folder / name).write_text("\n".join(lines) + "\n")


def build_published(folder, path, **options):
    Retrieval(source=str(folder), **options).build(str(path))
    store = ByteStore(str(path))
    return store, {split: contents(store, split) for split in retrieval.FILES}


def test_published_files(tmp_path):
    write_published(tmp_path)
    expected = [((one, two), int(float(label))) for label, one, two in PAPERS]
    store, splits = build_published(tmp_path, tmp_path / "store")
    assert splits == dict.fromkeys(("train", "validation", "test"), expected)
    assert store.classes == ["unlinked", "linked"]
    assert "AAN" in store.manifest["provenance"]["documents"]
    kept = [((repr(one).encode(), repr(two).encode()), label) for (one, two), label in expected]
    assert build_published(tmp_path, tmp_path / "kept", literals="keep")[1]["test"] == kept


def test_each_file_is_a_split_and_texts_may_be_plain(tmp_path):
    write_published(tmp_path)
    for name in retrieval.FILES.values():
        (tmp_path / name).write_bytes(f"1\ta\tb\t{name} \"\tcaf\xe9 b'x'\n".encode())
    for split, records in build_published(tmp_path, tmp_path / "store")[1].items():
        name = retrieval.FILES[split]
        assert records == [((f'{name} "'.encode(), "caf\xe9 b'x'".encode()), 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\ta\tb\ttext", r"eval\.tsv:3: wrong columns: 4, not 5"),
        ("1\ta\tb\tone\ttwo\tthree", r"eval\.tsv:3: wrong columns: 6, not 5"),
        ("2\ta\tb\tone\ttwo", r"eval\.tsv:3: the label is b'2', not 0 or 1"),
        ("label\ta\tb\tone\ttwo", r"eval\.tsv:3: the label is b'label'"),
        ("1\ta\tb\tb'one\ttwo", r"eval\.tsv:3: a text starts as a Python bytes literal"),
        ("1\ta\tb\tone\tb'caf\xe9'", r"eval\.tsv:3: a text starts as a Python bytes literal"),
        ("1\ta\tb\tone\tb'1' + b'2'", r"eval\.tsv:3: a text starts as a Python bytes literal"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    write_published(tmp_path)
    file = tmp_path / retrieval.FILES["validation"]
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(DataError, match=message):
        build_published(tmp_path, tmp_path / "store")


def test_missing_and_empty_files(tmp_path):
    write_published(tmp_path)
    file = tmp_path / retrieval.FILES["test"]
    file.write_text("")
    with pytest.raises(DataError, match=r"new_aan_pairs\.test\.tsv has no lines"):
        build_published(tmp_path, tmp_path / "store")
    file.unlink()
    with pytest.raises(DataError, match=r"new_aan_pairs\.test\.tsv: there is no such file"):
        build_published(tmp_path, tmp_path / "store")


def test_a_changed_file(tmp_path):
    write_published(tmp_path)
    store, _ = build_published(tmp_path, tmp_path / "store")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in retrieval.FILES.values():
        shutil.copy(tmp_path / name, moved)  # with other times
    Retrieval(source=str(moved)).check(store)
    with open(moved / retrieval.FILES["test"], "a") as file:
        file.write("1\ta\tb\tone\ttwo\n")
    with pytest.raises(DataError, match=r"new_aan_pairs\.test\.tsv has changed"):
        Retrieval(source=str(moved)).check(store)
    shutil.rmtree(moved)
    Retrieval(source=str(moved)).check(store)


# ---- the stand-in


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Folders of random files, of which some are alone, some too short, and some copies."""
    rng, root = random.Random(0), tmp_path_factory.mktemp("tree")
    for i in range(60):
        folder = root / f"package_{i}"
        folder.mkdir()
        for j in range(rng.randrange(1, 7)):
            size = rng.choice([50, 199, 200, 201, 700, 3000])
            (folder / f"file_{j}.py").write_bytes(rng.randbytes(size))
        (folder / "data.txt").write_bytes(rng.randbytes(900))
    shutil.copytree(root / "package_0", root / "package_copy")
    return root


def build_stand_in(root, path, **options):
    Retrieval(roots=(str(root),), **(SIZES | options)).build(str(path))
    return ByteStore(str(path))


def test_the_stand_in(tree, tmp_path):
    files = {path: path.read_bytes() for path in sorted(tree.rglob("*.py"))}
    whose = {}

    def owners(window):
        assert len(window) == 100
        if window not in whose:
            whose[window] = [path for path, data in files.items() if window in data]
        return whose[window]

    store = build_stand_in(tree, tmp_path / "store")
    assert "stand-in" in store.manifest["provenance"]["documents"]
    places = collections.defaultdict(set)
    pairs = []
    for split in ("train", "validation", "test"):
        records = contents(store, split)
        assert len(records) == SIZES[split]
        pairs += [pair for pair, _ in records]
        sides = {label: [pair for pair, held in records if held == label] for label in (0, 1)}
        for side in (0, 1):  # no document reveals its label
            documents = [collections.Counter(p[side] for p in sides[label]) for label in (0, 1)]
            assert documents[0] == documents[1]
            assert set(documents[0].values()) == {1}
        for (first, second), label in records:
            files_of = [set(owners(first)), set(owners(second))]
            assert bool(files_of[0] & files_of[1]) == bool(label)
            path, other = min(files_of[0]), min(files_of[1])
            assert path.parent == other.parent
            assert len(files[path]) >= 200
            assert files[path].index(first) + 100 <= len(files[path]) // 2
            assert files[other].index(second) >= len(files[other]) // 2
            places[split] |= {files[path], files[other]}
        folders = {path.parent for path, data in files.items() if data in places[split]}
        assert len(folders) >= 3
    assert len(set(pairs)) == len(pairs)
    for one, other in itertools.combinations(places, 2):
        assert not places[one] & places[other]


def test_the_same_seed_is_the_same_store(tree, tmp_path):
    stores = [build_stand_in(tree, tmp_path / f"{i}", seed=s) for i, s in enumerate((0, 0, 1))]
    assert stores[0].digest == stores[1].digest != stores[2].digest
    assert stores[0].manifest["splits"] != stores[2].manifest["splits"]


@pytest.mark.parametrize("size", [4, 6, 8, 22, 30])
def test_every_size_is_exact(tree, tmp_path, size):
    records = contents(build_stand_in(tree, tmp_path / "store", test=size), "test")
    assert len(records) == size
    assert len({pair for pair, _ in records}) == size


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train": 5}, ConfigError, r"options\.train is 5; half"),
        ({"test": 2}, ConfigError, r"options\.test is 2; half"),
        ({"window": 0}, ConfigError, r"options\.window is 0"),
        ({"literals": "no"}, ConfigError, r"options\.literals is 'no'"),
        ({"train": 9000}, DataError, r"options\.train is 9000, and the stand-in .* has only \d+"),
    ],
)
def test_errors_name_what_is_wrong(tree, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        build_stand_in(tree, tmp_path / "store", **options)


def test_the_interpreter_is_enough_for_some(tmp_path):
    Retrieval(window=1024, train=64, validation=16, test=16).build(str(tmp_path / "store"))
    assert len(contents(ByteStore(str(tmp_path / "store")), "train")) == 64
