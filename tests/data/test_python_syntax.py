"""Labels are compared with the compiler of another process, pieces with the files they are of."""

import collections
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import python_syntax
from spectral_pod.data.tasks.python_syntax import PythonSyntax
from spectral_pod.errors import DataError

SIZES = {"window": 256, "train": 96, "validation": 24, "test": 24}


def function(rng):
    name, x, y = (f"word_{rng.randrange(10**9)}" for _ in range(3))
    return f"""
def {name}({x}, {y}=[1, "é", (2,)]):
    # a comment with ' and (
    if {x}:
        return {{{x}: {y}}}
    for {y} in range({rng.randrange(99)}):
        yield '''a
text''', {x} + {y}
"""


def module(rng):
    return (
        "".join(function(rng) for _ in range(6))
        + "\nclass C:\n"
        + "".join(
            "".join("    " + line + "\n" if line else "\n" for line in function(rng).split("\n"))
            for _ in range(6)
        )
    )


@pytest.fixture
def tree(tmp_path):
    """Random modules; some are copies, or do not parse."""
    rng, root = random.Random(0), tmp_path / "tree"
    for i in range(60):
        folder = root / f"package_{i % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module_{i}.py").write_text(module(rng))
        (folder / f"copy_{i}.py").write_text((folder / f"module_{i}.py").read_text())
        (folder / f"broken_{i}.py").write_text(module(rng) + "def (")
        latin = "# coding: latin-1\n" + module(rng)
        (folder / f"latin_{i}.py").write_bytes(latin.encode("latin-1"))
    return root


def build(root, path, **options):
    PythonSyntax(roots=(str(root),), **(SIZES | options)).build(str(path))
    store = ByteStore(str(path))
    return store, {split: read(store, split) for split in python_syntax.SPLITS}


def read(store, name):
    split = store.split(name)
    data = split.read(np.arange(len(split)))
    return [(x.tobytes(), store.classes[k]) for x, k in zip(data, split.labels, strict=True)]


def test_labels_are_what_the_interpreter_says(tree, tmp_path):
    _, splits = build(tree, tmp_path / "store")
    records = [record for held in splits.values() for record in held]
    program = (
        "import ast, json, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "def label(source):\n"
        "    try: compile(source, '', 'exec', flags=ast.PyCF_ONLY_AST)\n"
        "    except SyntaxError: return 'invalid'\n"
        "    return 'valid'\n"
        "print(json.dumps([label(source.encode()) for source in json.load(sys.stdin)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([data.decode() for data, _ in records]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [label for _, label in records]


def test_bytes_and_lengths_do_not_tell(tree, tmp_path):
    """Both of a pair have the same bytes; so a rule that sees no order is right for half of all."""
    _, splits = build(tree, tmp_path / "store")
    for split, records in splits.items():
        assert len(records) == 2 * SIZES[split]
        for (valid, one), (invalid, two) in zip(records[::2], records[1::2], strict=True):
            assert (one, two) == ("valid", "invalid")
            assert sorted(valid) == sorted(invalid)
            assert 32 <= len(valid) <= 256


def test_no_file_is_in_two_splits_and_no_record_occurs_twice(tree, tmp_path):
    store, splits = build(tree, tmp_path / "store")
    texts = {path.read_bytes().decode("latin-1") for path in tree.rglob("[ml]*.py")}
    splits_of = collections.defaultdict(set)
    for split, records in splits.items():
        files = set()
        for data, label in records:
            if label == "valid":
                name = re.findall(r"word_\d+", data.decode())[0]
                (file,) = [text for text in texts if name in text]
                splits_of[file].add(split)
                files.add(file)
        assert store.manifest["provenance"]["files"][split] == len(files) > 1
    assert {len(names) for names in splits_of.values()} == {1}
    everything = [data for records in splits.values() for data, _ in records]
    assert len(set(everything)) == len(everything)


def test_every_kind_of_change_occurs(tree, tmp_path):
    store, _ = build(tree, tmp_path / "store")
    changed = store.manifest["provenance"]["changed"]["train"]
    assert sum(changed.values()) == SIZES["train"]
    assert min(changed.values()) > SIZES["train"] / len(python_syntax.KINDS) / 4


def test_the_same_seed_is_the_same_store_wherever_the_files_are(tree, tmp_path):
    expected, splits = build(tree, tmp_path / "store")
    moved = tmp_path / "elsewhere"
    for i, path in enumerate(sorted(tree.rglob("*.py"), reverse=True)):
        (moved / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (moved / f"{i % 3}" / f"{i}.py").write_bytes(path.read_bytes())
    assert build(moved, tmp_path / "moved")[0].digest == expected.digest
    assert build(tree, tmp_path / "other", seed=1)[0].digest != expected.digest
    smaller = build(tree, tmp_path / "smaller", train=8)[1]
    assert smaller["test"] == splits["test"]


def test_too_few_files(tree, tmp_path):
    with pytest.raises(DataError, match=r"options\.train is 9000 pairs, and .*tree has only \d+ "):
        build(tree, tmp_path / "store", train=9000)


def test_the_standard_library_is_enough(tmp_path):
    PythonSyntax(train=200, validation=40, test=40).build(str(tmp_path))
    store = ByteStore(str(tmp_path))
    for split, pairs in (("train", 200), ("validation", 40), ("test", 40)):
        records = read(store, split)
        assert len(records) == 2 * pairs
        for data, label in records:
            assert python_syntax.parses(data) == (label == "valid")
