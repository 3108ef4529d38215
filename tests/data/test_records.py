"""Every record of a user's files is in one split, or counted as skipped, or named in an error."""

import collections
import csv
import itertools
import json
import os
import pathlib
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from spectral_pod.data import labels, origin
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import records
from spectral_pod.data.tasks.records import Records
from spectral_pod.errors import ConfigError, DataError

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"
POEM = [(b"roses are red", "0"), (b"", "1"), (b"\x00\xff", "0"), (b'a,"b"\tc', "1")]


@pytest.fixture
def build(tmp_path):
    """Builds a store, returned with {split: [(documents, label)]}."""
    count = itertools.count()

    def build_once(**options):
        path = str(tmp_path / f"store_{next(count)}")
        options = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in options.items()}
        Records(**options).build(path)
        store = ByteStore(path)
        return store, {name: contents(store, name) for name in store.manifest["splits"]}

    return build_once


def contents(store, name):
    split = store.split(name)
    k = split.documents
    (everything,) = split.read_ranges([(0, split.offsets[-1])])
    stream = everything.tobytes()
    data = [stream[i:j] for i, j in zip(split.offsets[:-1], split.offsets[1:])]
    documents = [tuple(data[i : i + k]) if k > 1 else data[i] for i in range(0, len(data), k)]
    return list(zip(documents, split.labels.tolist()))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(n, start=0):
    return [{"text": f"record {i}", "label": i % 3} for i in range(start, start + n)]


def as_records(rows):
    return [(row["text"].encode(), row["label"]) for row in rows]


def together(splits):
    return [record for part in splits.values() for record in part]


def sources(store):
    return store.manifest["provenance"]["sources"]


# ---- rows to records


def test_all_formats_hold_the_same_records(build, tmp_path):
    texts, labels = zip(*POEM)
    strings = [text.decode("utf-8", "surrogateescape") for text in texts]
    write_lines(
        tmp_path / "a.jsonl", [{"text": t, "label": int(y)} for t, y in zip(strings, labels)]
    )
    with open(tmp_path / "a.csv", "w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows([("label", "text"), *zip(labels, strings)])
    table = {"text": pa.array(texts), "label": pa.array([float(y) for y in labels])}
    pa.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    for i, (text, label) in enumerate(POEM):
        (tmp_path / "a" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / label / str(i)).write_bytes(text)
    whole = {"format": "whole", "data": "bytes", "label": "folder"}
    for name, options in {"a.jsonl": {}, "a.csv": {}, "a.parquet": {}, "a": whole}.items():
        store, splits = build(train=tmp_path / name, held_out=0.0, **options)
        assert store.classes == ["0", "1"]
        expected = [(text, int(label)) for text, label in POEM]
        assert splits.keys() == {"train"}
        assert sorted(splits["train"]) == sorted(expected)
        assert (splits["train"] == expected) == (name != "a")  # folders are read by their names


def test_arrays_are_their_bytes(build, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 4, 2, 3), np.uint8)
    labels = np.arange(20) % 4
    np.savez(tmp_path / "a.npz", image=pixels, label=labels, floats=pixels / 255)
    options = {"train": tmp_path / "a.npz", "held_out": 0.0}
    _, splits = build(data="image", **options)
    assert splits["train"] == [(p.tobytes(), y) for p, y in zip(pixels, labels)]
    _, splits = build(data="image", luma=True, **options)
    assert [len(data) for data, _ in splits["train"]] == [8] * 20
    assert splits["train"] == [(records.to_luma(p).tobytes(), y) for p, y in zip(pixels, labels)]
    with pytest.raises(DataError, match=r"a\.npz\[0\]: .*'floats' is an array of float64, not u"):
        build(data="floats", **options)
    np.savez(tmp_path / "a.npz", image=pixels[..., 0], label=labels)
    with pytest.raises(DataError, match=r"shape \(4, 2\), not \[\.\.\., 3\]"):
        build(data="image", luma=True, **options)


def test_luma_is_that_of_the_standard():
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 5, np.uint8)] * 3), axis=-1)
    exact = every @ np.array([0.299, 0.587, 0.114])
    assert np.abs(records.to_luma(every) - exact).max() < 0.502
    image = pytest.importorskip("PIL.Image")
    pillow = np.asarray(image.fromarray(every.reshape(-1, 52, 3)).convert("L"))
    np.testing.assert_array_equal(records.to_luma(every).reshape(-1, 52), pillow)


def test_pairs_of_documents(build, tmp_path):
    """As in LRA's retrieval task: tab-separated, without a header."""
    rows = [(i % 2, f"id{i}", f"first {i}", f'second {i} "') for i in range(50)]
    (tmp_path / "a.tsv").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    store, splits = build(
        train=tmp_path / "a.tsv",
        columns=("label", "id", "a", "b"),
        data=("a", "b"),
        held_out=0.2,
        max_bytes=8,
    )
    assert store.manifest["documents"] == 2
    expected = [((a.encode()[:8], b.encode()[:8]), label) for label, _, a, b in rows]
    assert collections.Counter(together(splits)) == collections.Counter(expected)
    assert sources(store)["train"]["cut"] == 50


def test_records_are_cut_and_counted(build, tmp_path):
    rows = [{"text": "x" * n, "label": n % 2} for n in range(20)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    store, splits = build(train=file, max_bytes=5, held_out=0.4, seed=3)
    assert sources(store)["train"]["cut"] == 14
    assert {len(data) for part in splits.values() for data, _ in part} == set(range(6))
    # Records that are equal after being cut are in the same split.
    assert sum(b"xxxxx" in dict(part) for part in splits.values()) == 1


# ---- splits


def test_splits_with_sources_are_left_alone(build, tmp_path):
    parts = {"train": numbered(40), "validation": numbered(7, 40), "test": numbered(5, 47)}
    files = {name: write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in parts.items()}
    store, splits = build(**files)
    assert splits == {name: as_records(rows) for name, rows in parts.items()}
    assert {name: source["rows"] for name, source in sources(store).items()} == {
        "train": 40,
        "validation": 7,
        "test": 5,
    }


def test_held_out_records(build, tmp_path):
    rows = numbered(1000)
    train = write_lines(tmp_path / "a.jsonl", rows + rows[:500])
    _, splits = build(train=train)
    assert sorted(together(splits)) == sorted(as_records(rows + rows[:500]))
    for name in ("validation", "test"):
        assert abs(len(splits[name]) / 1500 - 0.1) < 0.04
    # Equal records are in the same split.
    for first, second in itertools.combinations(splits.values(), 2):
        assert not set(first) & set(second)
    for part in splits.values():  # in the order of the source
        members = set(part)
        assert part == [record for record in as_records(rows + rows[:500]) if record in members]

    assert build(train=train)[1] == splits
    assert build(train=train, seed=1)[1]["test"] != splits["test"]
    # A source for one split does not change which records are held out for the other.
    other = write_lines(tmp_path / "b.jsonl", numbered(9, 9000))
    _, with_test = build(train=train, test=other)
    assert with_test["validation"] == splits["validation"]
    assert sorted(with_test["train"]) == sorted(splits["train"] + splits["test"])
    _, with_validation = build(train=train, validation=other)
    assert with_validation["test"] == splits["test"]
    assert build(train=train, test=other, held_out=0.0)[1].keys() == {"train", "test"}


def test_a_split_without_records_is_an_error(build, tmp_path):
    train = write_lines(tmp_path / "a.jsonl", numbered(6))
    with pytest.raises(DataError, match=r"no record is left for \w+ of 6 in .*options\.train"):
        build(train=train, held_out=0.001)
    other = write_lines(tmp_path / "b.jsonl", [{"txt": "x", "label": 0}] * 4)
    with pytest.raises(
        DataError,
        match=r"for test of 4 in .*options\.test; 4 skipped, .*b\.jsonl:1: no f",
    ):
        build(train=train, test=other, held_out=0.3, on_fault="skip")


# ---- labels


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([10, 9, -1, 9], ["-1", "9", "10"], [2, 1, 0, 1]),
        (["10", "9", "x", "9"], ["10", "9", "x"], [0, 1, 2, 1]),
        ([True, False, True], ["false", "true"], [1, 0, 1]),
        ([2.0, 1.0], ["1", "2"], [1, 0]),
        (["é\udcff", "b"], ["b", "é\\xff"], [1, 0]),
    ],
)
def test_classes_are_found(build, tmp_path, labels, classes, numbers):
    train = write_lines(tmp_path / "a.jsonl", [{"text": "x", "label": y} for y in labels])
    store, splits = build(train=train, held_out=0.0)
    assert store.classes == classes
    assert [label for _, label in splits["train"]] == numbers
    assert Records(train=str(train)).num_classes >= len(classes)


def test_labels_are_names_or_numbers_of_classes(build, tmp_path):
    def labels_of(labels, classes):
        train = write_lines(tmp_path / "a.jsonl", [{"text": "x", "label": y} for y in labels])
        assert Records(classes=classes).num_classes == len(classes)
        store, splits = build(train=train, held_out=0.0, classes=classes)
        assert store.classes == list(classes)
        return [label for _, label in splits["train"]]

    assert labels_of(["pos", "neg", 1, "0"], ("neg", "pos")) == [1, 0, 1, 0]
    assert labels_of([5, "3"], ("3", "5")) == [1, 0]
    assert labels_of(["b", "9" * 5000], ("9" * 5000, "b")) == [1, 0]
    for label, classes, reason in (
        (2, ("neg", "pos"), "label out of range: 2, with 2 classes"),
        (-1, ("neg", "pos"), "label out of range: -1, with 2 classes"),
        (0, ("3", "5"), "unknown label: '0'; the classes are 3, 5"),
        ("po", ("neg", "pos"), "unknown label: 'po'; the classes are neg, pos"),
        (None, ("neg", "pos"), "no label: field 'label' is null, not a name or an integer"),
        (0.5, ("neg", "pos"), "unknown label: '0.5'; the classes are neg, pos"),
        ([1], ("neg", "pos"), r"no label: field 'label' is \[1\], not a name or an integer"),
    ):
        with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}; correct it, or leave out"):
            labels_of([classes[0], label], classes)


def test_one_class_or_very_many_are_none(build, tmp_path, monkeypatch):
    train = write_lines(tmp_path / "a.jsonl", numbered(50))
    monkeypatch.setattr(records, "MAX_CLASSES", 40)
    monkeypatch.setattr(labels, "MAX_CLASSES", 40)
    for label, amount in {"text": "more than 40 values", "one": "the only value '1'"}.items():
        with pytest.raises(DataError, match=f"'{label}' has {amount} in .*2 classes or more"):
            build(train=write_lines(train, [row | {"one": 1} for row in numbered(50)]), label=label)
    train.write_text("")
    with pytest.raises(DataError, match="'label' has no values in"):
        build(train=train)


# ---- faults


BAD = {
    2: ("not json", "invalid JSON"),
    4: ('{"txt": "x", "label": 0}', "no field: 'text' is not among 'txt', 'label'"),
    5: ('{"text": "x"}', "no field: 'label' is not among 'text'"),
    6: ('{"text": 3.5, "label": 0}', "no bytes: field 'text' is a float, not text"),
    7: ('{"text": null, "label": 0}', "no bytes: field 'text' is null, not text"),
    9: ('{"text": "x", "label": "odd"}', "unknown label: 'odd'; the classes are 0, 1, 2"),
}


def test_a_bad_record_stops_or_is_counted(build, tmp_path):
    good = iter(numbered(100))
    lines = [BAD[n][0] if n in BAD else json.dumps(next(good)) for n in range(1, 60)]
    train = tmp_path / "a.jsonl"
    train.write_text("\n".join(lines))
    options = {"train": train, "classes": ("0", "1", "2"), "held_out": 0.2}
    store, splits = build(on_fault="skip", **options)
    assert sorted(together(splits)) == sorted(as_records(numbered(59 - len(BAD))))
    source = sources(store)["train"]
    assert source["rows"] == 59
    assert source["skipped"] == {
        "invalid JSON": 1, "no field": 2, "no bytes": 2, "unknown label": 1
    }  # fmt: skip
    assert source["places"]["no bytes"] == [f"{train}:{n}: {BAD[n][1]}" for n in (6, 7)]
    for line, reason in BAD.values():
        train.write_text("\n".join([*map(json.dumps, numbered(9)), line]))
        with pytest.raises(DataError, match=rf"a\.jsonl:10: {reason}.*on_fault = 'skip'"):
            build(**options)


def test_only_the_first_places_are_kept(build, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_ITEM_BYTES", 3_000)
    rows = [row for i in range(50) for row in ({"text": "x", "label": f"c{i % 2}"}, {})]
    train = write_lines(tmp_path / "a.jsonl", rows)
    source = sources(build(train=train, on_fault="skip", held_out=0.0)[0])["train"]
    assert source["skipped"] == {"no field": 50}
    assert [p.split(": ")[0] for p in source["places"]["no field"]] == [
        f"{train}:{n}" for n in (2, 4, 6, 8, 10)
    ]


def test_bad_labels_stop_before_anything_is_written(tmp_path, monkeypatch):
    """They are found when the classes are collected."""
    train = write_lines(tmp_path / "a.jsonl", [{"text": "x", "label": 0}, {"text": "x"}])
    monkeypatch.setattr(records.byte_store, "write", pytest.fail)
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: no field: 'label' .*the option `label` names"
    ):
        Records(train=str(train)).build(str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ""}, r"options\.train is empty"),
        ({"data": ()}, r"options\.data is \(\)"),
        ({"on_fault": "ignore"}, r"options\.on_fault is 'ignore'; known are \['skip', 'stop'\]"),
        ({"held_out": 0.5}, r"options\.held_out is 0\.5; it must be in \[0, 0\.5\)"),
        ({"max_bytes": -1}, r"options\.max_bytes is -1"),
        ({"classes": ("a", "b", "a")}, r"options\.classes has an empty name, or a name twice"),
        ({"label_pattern": "(a"}, r"options\.label_pattern is '\(a', which is no regular expr"),
        ({"label_pattern": "a"}, r"options\.label_pattern is 'a', with 0 groups"),
    ],
)
def test_options_are_checked(build, options, message):
    with pytest.raises(ConfigError, match=message):
        build(**({"train": "missing"} | options))


def test_a_label_may_be_part_of_a_header(build, tmp_path):
    file = tmp_path / "proteins.fasta"
    headers = (
        "sp|P1|HBA_HUMAN Nucleus-S",
        "sp|P2|HBB_MOUSE Cytoplasm-U",
        "sp|P3|HBA_MOUSE Nucleus-M",
    )
    file.write_text("".join(f">{h} test\nMV{'LI' * i}\n" for i, h in enumerate(headers)))
    plan = {"train": file, "data": "sequence", "held_out": 0}
    store, splits = build(**plan, label="description", label_pattern=r"^([^ ]+)-[MSU]")
    assert store.classes == ["Cytoplasm", "Nucleus"]
    assert splits == {"train": [(b"MV", 1), (b"MVLI", 0), (b"MVLILI", 1)]}
    store, splits = build(**plan, label="id", label_pattern=r"[|](\w+)_\w+$")
    assert store.classes == ["HBA", "HBB"]
    assert [label for _, label in splits["train"]] == [0, 1, 0]
    with pytest.raises(DataError, match=r"fasta:3: no label: 'id' is 'sp\|P2\|HBB_MOUSE', where"):
        build(**plan, label="id", label_pattern="(HBA)")
    with pytest.raises(DataError, match="where the label_pattern finds an empty text"):
        build(**plan, label="id", label_pattern="sp()")
    store, splits = build(**plan, label="id", label_pattern="(HB[A])|P3$", classes=("HBA", "HBB"),
                          on_fault="skip")  # fmt: skip
    assert len(splits["train"]) == 2
    assert Records(train="a").store_path("d") == Records(train="a", label_pattern="").store_path(
        "d"
    )


# ---- items


def test_items_may_be_converted_anywhere(build, tmp_path, monkeypatch):
    """Items are the same each time, and each by itself gives its part of the store, in order."""
    monkeypatch.setattr(records, "_ITEM_BYTES", 10_000)
    (tmp_path / "set").mkdir()
    for i, rows in enumerate(np.array_split(numbered(500), 7)):
        write_lines(tmp_path / f"set/{i}.jsonl", list(rows))
    train = str(tmp_path / "set")
    _, splits = build(train=train)
    plan = Records(train=train)
    classes = records.find_classes(plan)
    items = list(plan.items())
    assert len(items) > 40
    assert items == list(plan.items())
    assert [row for item in items for row in item.rows] == [
        row for item in plan.items() for row in item.rows
    ]
    done = {}
    for i in reversed(range(len(items))):
        arguments = pickle.loads(pickle.dumps((items[i], plan, classes)))
        done[i] = pickle.loads(pickle.dumps(records.convert(*arguments)))
    for name, part in splits.items():
        assert part == [tuple(r) for i in sorted(done) for r in done[i].records[name]]
    assert sum(converted.tally.rows for converted in done.values()) == 500


# ---- changed sources


def change(file):
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("which", ["train", "test"])
def test_a_store_is_stale_once_its_source_has_changed(build, tmp_path, monkeypatch, hashed, which):
    if not hashed:
        monkeypatch.setattr(origin, "_HASHED_BYTES", 0)
    (tmp_path / "train").mkdir()
    files = {
        "train": write_lines(tmp_path / "train/b.jsonl", numbered(50)),
        "test": write_lines(tmp_path / "test.jsonl", numbered(5)),
    }
    write_lines(tmp_path / "train/a.jsonl", numbered(50))
    options = {"train": str(tmp_path / "train"), "test": str(files["test"])}
    store, _ = build(**options)
    Records(**options).check(store)
    file = files[which]
    change(file)
    with pytest.raises(DataError, match=rf"options\.{which} = .*has changed since {store.path}"):
        Records(**options).check(store)
    change(file)  # the old content, with another time
    if hashed:
        Records(**options).check(store)
    else:
        with pytest.raises(DataError, match="has changed"):
            Records(**options).check(store)
    file.rename(file.with_name("z.jsonl"))
    if which == "train":
        with pytest.raises(DataError, match="has changed"):
            Records(**options).check(store)
    else:
        Records(**options | {"train": str(tmp_path / "gone")}).check(store)


def test_a_moved_source_is_the_same(build, tmp_path):
    (tmp_path / "a").mkdir()
    write_lines(tmp_path / "a/x.jsonl", numbered(50))
    store, _ = build(train=tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    Records(train=str(tmp_path / "b")).check(store)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is missing")
def test_movie_reviews(build):
    store, splits = build(train=SHARED / "imdb_test.jsonl.xz", held_out=0.2)
    assert store.classes == ["0", "1"]
    assert sum(map(len, splits.values())) == 12_499
    assert abs(len(splits["test"]) / 12_499 - 0.2) < 0.02
    assert sum(label for part in splits.values() for _, label in part) == 6_225
