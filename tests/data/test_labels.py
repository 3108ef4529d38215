"""Labels that are alike are one class in every file, and what is no label never becomes a class."""

import csv
import decimal
import json
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from spectral_pod.data import labels
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.formats import Fault
from spectral_pod.data.labels import Classes, Found
from spectral_pod.data.tasks.records import Records
from spectral_pod.errors import ConfigError, DataError

quick = hypothesis.settings(deadline=None, max_examples=40)
MISSING = ["", " ", "\t", "nan", "NaN", "NAN", "-nan", "null", "NULL", "None", "NA", "N/A", "<NA>"]


@pytest.fixture
def build(tmp_path):
    """The classes and the labels by split of a store of files with these labels."""

    def write(name, values):
        path = tmp_path / name
        texts = [f"text {i}" for i in range(len(values))]
        match path.suffix:
            case ".jsonl":
                rows = [{"text": t, "label": y} for t, y in zip(texts, values)]
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            case ".csv":
                with open(path, "w", newline="") as file:
                    csv.writer(file).writerows([("text", "label"), *zip(texts, values)])
            case ".parquet":
                pa.parquet.write_table(pa.table({"text": texts, "label": values}), path)
            case ".npz":
                np.savez(path, text=np.array(texts), label=np.array(values))
        return str(path)

    def build_once(train, test, **options):
        paths = {
            split: write(f"{split}{x[0]}", x[1])
            for split, x in zip(("train", "test"), (train, test))
        }
        path = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        Records(**paths, held_out=0.0, **options).build(str(path))
        store = ByteStore(str(path))
        return store.classes, [store.split(split).labels.tolist() for split in paths]

    return build_once


# ---- one class, many spellings


def spellings(name):
    """What files may hold for a class: text with spaces, and for numbers and truth values more."""
    values = [name, f" {name}", f"{name}\t", f"\u00a0{name} "]
    if name in ("true", "false"):
        return [name == "true", *values, name.upper(), name.title()]
    if labels.is_integer(name):
        number = int(name)
        values += [f"{name}.0", f"{name}.", f"{name}.000", f"{number:+}", f"{number:.18e}"]
        return [number, float(number), decimal.Decimal(f"{name}.00"), *values]
    return values


integers = st.integers(-(10**6), 10**6).map(str)
names = st.text("abcxyzé -_/", min_size=1).map(str.strip).filter(bool)
class_sets = st.one_of(
    *(st.lists(part, min_size=2, max_size=6, unique=True) for part in (integers, names)),
    st.just(["false", "true"]),
).filter(lambda found: not any(map(labels.is_missing, found)))


def as_read(value):
    return value.encode() if isinstance(value, str) else value


@quick
@hypothesis.given(class_sets, st.data())
def test_spellings_of_a_class_are_one_class(found, data):
    """Sorted as numbers if they are spelt as integers, whatever order and spelling they come in."""
    collected = Found("label")
    for name in data.draw(st.permutations(found)):
        for value in data.draw(st.lists(st.sampled_from(spellings(name)), min_size=1, max_size=3)):
            assert collected.add(as_read(value), "x:1") is None
    classes = collected.classes("x")
    key = int if all(map(labels.is_integer, classes.names)) else str
    assert list(classes.names) == sorted(classes.names, key=key)
    in_order = [labels.canonical(name) for name in classes.names]
    assert set(in_order) == set(found)
    for named in (classes, Classes(tuple(in_order))):
        for i, name in enumerate(in_order):
            for value in spellings(name):
                assert named.index(as_read(value), "label", "x:1") == i


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.decimals(allow_nan=False), st.binary(),
    st.text().map(lambda text: text.encode("utf-8", "surrogatepass")), st.lists(st.integers()),
    st.from_regex(r"\A\s?[+-]?[0-9]{1,3}\.?[0-9]{0,2}(e[+-]?[0-9])?\s?\Z").map(str.encode),
    st.sampled_from(MISSING).map(str.encode),
)  # fmt: skip


@quick
@hypothesis.given(st.lists(anything, max_size=8), st.lists(anything, max_size=4))
def test_anything_is_a_class_or_named(train, test):
    """A label that is found has the same class again; others name the record."""
    collected = Found("y")
    faults = [collected.add(value, f"x:{i}") for i, value in enumerate(train)]
    for i, fault in enumerate(faults):
        assert fault is None or (fault.place == f"x:{i}" and "field 'y' is" in fault.reason)
    try:
        classes = collected.classes("x")
    except DataError as error:
        assert "config.data.options" in str(error)  # noqa: PT017
        return
    assert len(set(classes.names)) == len(classes.names)
    for value, fault in zip(train, faults):
        index = classes.index(value, "y", "z:1")
        assert isinstance(index, Fault if fault else int)
        if not fault:
            spelt = labels.spelling(value)
            assert labels.canonical(classes.names[index]) == labels.canonical(spelt)
    for value in test:
        index = classes.index(value, "y", "z:1")
        assert isinstance(index, Fault) or 0 <= index < len(classes.names)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ((".csv", ["1.0", "2.0", "3.0"]), (".csv", ["1", "2", "3"])),
        ((".csv", ["1.0", "2.0", "3.0"]), (".jsonl", [1, 2, 3])),
        ((".jsonl", [1, 2, 3]), (".csv", ["1.00", " 2", "+3"])),
        ((".parquet", [1.0, 2.0, 3.0]), (".jsonl", ["1", "2", 3.0])),
        ((".npz", [1, 2, 3]), (".parquet", pa.array([1, 2, 3]).dictionary_encode())),
        ((".parquet", [True, False, None]), (".csv", ["True", "FALSE", ""])),
    ],
)
def test_labels_of_two_files_agree(build, train, test):
    classes, (ours, theirs) = build(train, test, on_fault="skip")
    assert ours == theirs == ([0, 1, 2] if len(classes) == 3 else [1, 0])


def test_integers_are_indices_only_of_classes_that_are_named(build):
    train, test = (".csv", ["neg", "pos"]), (".csv", ["0", "1.0"])
    assert build(train, test, classes=("neg", "pos"))[1] == [[0, 1], [0, 1]]
    with pytest.raises(DataError, match=r"test\.csv:2: unknown label: '0'; the classes, those of"):
        build(train, test)
    for classes in (("1", "2"), ("1.0", "2.0"), ("0.5", "1.5")):
        with pytest.raises(DataError, match="unknown label: '0'"):
            build((".csv", classes), (".csv", ["0"]), classes=classes)


def test_classes_may_be_named_by_any_bytes():
    classes = Classes(("\udcff", "\ud83d", "é"))
    labels_of_bytes = [
        classes.index(x, "y", "x:1") for x in (b"\xff", b"\xed\xa0\xbd", "é".encode())
    ]
    assert labels_of_bytes == [0, 1, 2]


def test_names_of_existing_stores_stay(build):
    """Labels that are all spelt alike name the classes as they are spelt."""
    assert build((".csv", ["10.0", "2.0"]), (".csv", ["2.0"]))[0] == ["10.0", "2.0"]
    assert build((".csv", ["2", "10", "2.0"]), (".csv", ["2"]))[0] == ["2", "10"]
    assert build((".csv", ["+1", "-1"]), (".jsonl", [1]))[0] == ["+1", "-1"]


# ---- no labels


@pytest.mark.parametrize("value", MISSING)
def test_what_stands_for_a_missing_value_is_no_class(build, value, caplog):
    train, test = (".csv", ["a", "b", value]), (".csv", [value, "a"])
    with pytest.raises(DataError, match=r"train\.csv:4: no label: field 'label' is ('|empty)"):
        build(train, test)
    assert build(train, test, on_fault="skip") == (["a", "b"], [[0, 1], [0]])
    assert "1 of 3 records of train skipped" in caplog.text
    if value.strip():
        named = build(train, test, classes=("a", "b", value))
        assert named == (["a", "b", value], [[0, 1, 2], [2, 0]])


@pytest.mark.parametrize("value", [None, math.nan, math.inf, 2.0**53, [1], {"a": 1}])
def test_values_of_json_that_are_no_labels(build, value):
    with pytest.raises(DataError, match=r"train\.jsonl:2: no label: field 'label' is "):
        build((".jsonl", ["a", value, "b"]), (".jsonl", ["a"]))


real = [round(0.37 * i, 2) for i in range(1, 40)]


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".npz", ".parquet"])
@pytest.mark.parametrize("on_fault", ["stop", "skip"])
def test_numbers_to_predict_are_regression(build, kind, on_fault):
    with pytest.raises(DataError, match=r"3\d different numbers .*'0\.37' in .*train.*regression"):
        build((kind, real), (kind, real), on_fault=on_fault)


def test_few_numbers_with_a_fraction_are_classes(build):
    stars = ["0.5", "1.0", "1.5", "2.0"] * 3
    classes, (ours, theirs) = build((".csv", stars), (".jsonl", list(map(float, stars))))
    assert classes == ["0.5", "1.0", "1.5", "2.0"]
    assert ours == theirs == [0, 1, 2, 3] * 3
    with pytest.raises(DataError, match="regression"):
        build((".csv", ["1", "2", "1", "2.5"]), (".csv", ["1"]))


@pytest.mark.parametrize(
    "values", [["01", "1"], ["2.1", "2.10"] * 2, [True, 1], ["1e5", "100000"], ["1.50", 1.5] * 2]
)
def test_labels_that_may_be_one_class_are_named(build, values):
    """A code or a version is not taken for a number, nor silently for another class."""
    with pytest.raises(DataError, match=r"train\.jsonl:2: label .* may be the same class as .*:1"):
        build((".jsonl", values), (".jsonl", values))
    if all(isinstance(value, str) for value in values):
        classes = tuple(dict.fromkeys(values))
        assert build((".jsonl", values), (".jsonl", values), classes=classes)[0] == list(classes)


@pytest.mark.parametrize("classes", [("1", "1.0"), ("a", " a"), ("", "a"), ("True", "true")])
def test_names_of_one_class_are_refused(classes):
    with pytest.raises(ConfigError, match=r"options\.classes has an empty name, or a name twice"):
        Records(classes=classes)
