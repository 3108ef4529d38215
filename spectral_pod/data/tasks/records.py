"""Classification of anyone's records: one field is the class, another holds the bytes.

    --config.data.task=records --config.data.options.train='reviews/*.jsonl.xz'

A source is a file, a folder or a glob of any format in `data/formats.py`, on disk or gs://, or a
split of TensorFlow Datasets, `tfds:imdb_reviews/train` (`data/tfds_source.py`).

`Records.items` reads rows and cuts them into items of some 64 MB; `convert`, a pure function, makes
records of an item in any process; `parallel_write` calls both, and goes on where it was stopped.
"""

import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from absl import logging

from spectral_pod.data import (
    byte_store,
    columnar,
    formats,
    labels,
    origin,
    parallel_write,
    tfds_source,
)
from spectral_pod.data.byte_store import Record
from spectral_pod.data.formats import Fault, Row
from spectral_pod.data.labels import MAX_CLASSES, Classes
from spectral_pod.data.progress import Progress
from spectral_pod.data.tasks.task import StoredTask, added
from spectral_pod.data.text import encode
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import Bound, NonNegative
from spectral_pod.storage import Source

SPLITS = ("train", "validation", "test")
_ITEM_BYTES = 64_000_000
_ROW_BYTES = 1_000  # of memory, that a row takes beside the bytes in it
_PLACES = 5  # named for each reason why records were skipped


class Item(NamedTuple):
    """Rows that follow each other in the source `split`, possibly over several files."""

    split: str
    rows: list[Row | Fault]


@dataclasses.dataclass
class Tally:
    """What became of rows: how many there were, which were skipped and why, how many were cut."""

    rows: int = 0
    cut: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)  # by kind of fault
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # the first few of each

    def skip(self, fault: Fault) -> None:
        kind = fault.reason.partition(": ")[0]
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        self._place(kind, [f"{fault.place}: {fault.reason}"])

    def add(self, other: "Tally") -> None:
        """Adds what became of the rows that follow."""
        self.rows += other.rows
        self.cut += other.cut
        for kind, count in other.skipped.items():
            self.skipped[kind] = self.skipped.get(kind, 0) + count
            self._place(kind, other.places[kind])

    def _place(self, kind: str, places: Sequence[str]) -> None:
        self.places[kind] = [*self.places.get(kind, []), *places][:_PLACES]


class Converted(NamedTuple):
    """The records of an item, by the split they are in."""

    records: dict[str, list[Record]]
    tally: Tally


@dataclasses.dataclass(frozen=True)
class Records(StoredTask):
    """Records of files, or of a dataset of TFDS, whose labels are as `data/labels.py` says."""

    name = "records"
    version = 1

    # Of the hash of a record's bytes that decides whether it is held out; records of equal bytes
    # are in one split.
    seed: int = 0
    train: Source = ""  # a source
    validation: Source = ""  # a source; "" holds out a part of the training records
    test: Source = ""  # likewise
    format: str = "auto"  # of the files, where their suffixes do not say it: see `formats.rows`
    columns: tuple[str, ...] = ()  # names of the columns of csv and tsv files without a header
    # The field with the bytes, or several: then a record is a tuple, such as two documents.
    data: str | tuple[str, ...] = "text"
    label: str = "label"  # the field with the class
    # A regular expression with one group, which is the class, where the field holds more than that,
    # as headers of FASTA do; "" takes the whole field.
    label_pattern: str = added("")
    # Names of the classes in order; where none is a number, a label may also be the index of one.
    # () takes those of a TFDS ClassLabel, or else the labels in the training source, sorted,
    # integers by their value.
    classes: tuple[str, ...] = ()
    # The part of the training records for each of validation and test that has no source of its
    # own; 0 leaves these splits out.
    held_out: Annotated[float, Bound(0, 0.5, "in [0, 0.5)")] = 0.1
    on_fault: Literal["stop", "skip"] = "stop"  # at a record that cannot be used, or count it
    max_bytes: NonNegative = 0  # cuts each field to so many bytes; 0 cuts nothing
    luma: bool = False  # arrays [..., 3] of red, green and blue become luma

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data or "" in self.data_fields:
            raise ConfigError(
                f"config.data.options.data is {self.data!r}; name a field, or several"
            )
        try:
            groups = re.compile(self.label_pattern).groups if self.label_pattern else 1
        except re.error as error:
            raise ConfigError(
                f"config.data.options.label_pattern is {self.label_pattern!r}, which is no regular "
                f"expression: {error}"
            ) from error
        if groups != 1:
            raise ConfigError(
                f"config.data.options.label_pattern is {self.label_pattern!r}, with {groups} "
                "groups; put the class, and nothing else, in (...)"
            )
        places = Classes(self.classes).places
        if len(places) < len(self.classes) or "" in places:
            raise ConfigError(
                "config.data.options.classes has an empty name, or a name twice, as '1' and '1.0' "
                f"are: {', '.join(map(repr, self.classes))}"
            )

    @property
    def num_classes(self) -> int:
        """The most classes that a store can have."""
        return len(self.classes) or MAX_CLASSES

    @property
    def data_fields(self) -> tuple[str, ...]:
        """The fields with the bytes, one for each document of a record."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def sources(self) -> dict[str, str]:
        """The sources that are given, by split."""
        sources = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: source for split, source in sources.items() if source}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the store."""
        return tuple(s for s in SPLITS if s in self.sources or self.held_out)

    def picture(self, record: np.ndarray) -> np.ndarray | None:
        """The luma of a square picture; a store does not have the shape of another one."""
        side = math.isqrt(len(record))
        is_square = self.luma and len(self.data_fields) == 1 and side**2 == len(record)
        return record.reshape(side, side) if is_square else None

    def items(self, on_read: Callable[[int], None] = lambda size: None) -> Iterator[Item]:
        """The rows of all sources, in items that are the same every time.

        `on_read` is called with the number of bytes of the files that have been read since.

        Raises:
          DataError: a source is missing or damaged.
        """
        for split in self.sources:
            yield from self._items(split, on_read)

    def _items(self, split: str, on_read: Callable[[int], None]) -> Iterator[Item]:
        rows: list[Row | Fault] = []
        size = 0
        for row in _rows(self.sources[split], self.format, self.columns, on_read):
            rows.append(row)
            size += _ROW_BYTES
            if isinstance(row, Row):
                size += sum(len(v) for v in row.fields.values() if isinstance(v, bytes))
                size += sum(v.nbytes for v in row.fields.values() if isinstance(v, np.ndarray))
            if size >= _ITEM_BYTES:
                yield Item(split, rows)
                rows, size = [], 0
        if rows:
            yield Item(split, rows)

    def build(self, path: str) -> None:
        """Writes the records; the manifest's provenance says what became of every row.

        Raises:
          ConfigError: there is no source to train on.
          DataError: a source is missing, damaged, or has a record that cannot be used (names the
            file and the record), or nothing is left for a split.
        """
        if not self.train:
            raise ConfigError(
                "config.data.options.train is empty; name a file, a folder, or tfds:NAME/SPLIT"
            )
        sources = {split: describe(source) for split, source in self.sources.items()}
        classes = find_classes(self)
        size = sum(source.get("bytes", 0) for source in sources.values())
        read = Progress("Reading records", size, "bytes")
        options = self.options | {"data": self.data_fields}
        parallel_write.write(
            path,
            self.items(read.add),
            functools.partial(_converted, plan=self, classes=classes),
            plan={
                "version": self.version,
                "sources": sources,
                "options": options,
                "classes": dataclasses.asdict(classes),
            },
            splits=self.splits,
            classes=classes.names,
            documents=len(self.data_fields),
            provenance=functools.partial(_provenance, self, sources),
            num_workers=os.cpu_count() or 1,
        )
        read.end()

    def check(self, store: byte_store.ByteStore) -> None:
        """Compares the user's files with what the store was written from.

        Files that are not on this host are not compared: the store does not need them. Nor are
        those of TFDS, whose names have a version.

        Raises:
          DataError: they have changed since.
        """
        for split, source in self.sources.items():
            if source.startswith(tfds_source.PREFIX):
                continue
            described = store.manifest["provenance"]["sources"][split]
            option = f"config.data.options.{split} = {source!r}"
            origin.check(origin.on_this_host(source), described, option, store.path)


# The source that an item is from, what became of its rows, and how many records of each split.
_Facts = tuple[str, dict[str, Any], dict[str, int]]


def _provenance(
    plan: Records, sources: Mapping[str, Mapping[str, Any]], facts: list[_Facts]
) -> dict[str, Any]:
    """Where the records are from and what became of the rows, for the manifest."""
    tallies = {split: Tally() for split in sources}
    counts = dict.fromkeys(plan.splits, 0)
    for split, tally, held in facts:
        tallies[split].add(Tally(**tally))
        for name, count in held.items():
            counts[name] += count
    for split, count in counts.items():
        if not count:
            source = split if split in sources else "train"
            raise DataError(_nothing_left(plan, split, tallies[source]))
    for split, total in tallies.items():
        for kind, count in total.skipped.items():
            places = "; ".join(total.places[kind])
            logging.warning("%d of %d records of %s skipped: %s", count, total.rows, split, places)
    options = plan.options | {"data": plan.data_fields}
    return {
        "task": "records",
        "sources": {s: dict(sources[s]) | dataclasses.asdict(tallies[s]) for s in sources},
        **{name: options[name] for name in options if name not in (*SPLITS, "classes")},
    }


def _converted(item: Item, plan: Records, classes: Classes) -> parallel_write.Converted:
    records, tally = convert(item, plan, classes)
    counts = {split: len(held) for split, held in records.items()}
    return records, (item.split, dataclasses.asdict(tally), counts)


def find_classes(plan: Records) -> Classes:
    """The classes of a plan, for which it may read the training source once.

    Raises:
      DataError: a label cannot be used, there is only one class, or there are too many.
    """
    if plan.classes:
        return Classes(plan.classes)
    is_tfds = plan.train.startswith(tfds_source.PREFIX)
    if is_tfds and (names := tfds_source.class_names(plan.train, plan.label)):
        return Classes(names, stated=False)
    found = labels.Found(plan.label)
    for row in _rows(plan.train, plan.format, plan.columns):
        label = row if isinstance(row, Fault) else _label(row, plan)
        fault = label if isinstance(label, Fault) else found.add(label, row.place)
        if fault and plan.on_fault == "stop":
            raise DataError(_fault_message(fault))
        if len(found) > MAX_CLASSES:
            break
    return found.classes(plan.train)


def convert(item: Item, plan: Records, classes: Classes) -> Converted:
    """The records that rows become, in their order. A pure function: any process may run it.

    Raises:
      DataError: a row cannot be used, and the plan is to stop there.
    """
    records: dict[str, list[Record]] = {split: [] for split in plan.splits}
    tally = Tally(rows=len(item.rows))
    for row in item.rows:
        example = row if isinstance(row, Fault) else _example(row, plan, classes)
        if isinstance(example, Fault):
            if plan.on_fault == "stop":
                raise DataError(_fault_message(example))
            tally.skip(example)
            continue
        documents, label = example
        if plan.max_bytes and max(map(len, documents)) > plan.max_bytes:
            documents = tuple(document[: plan.max_bytes] for document in documents)
            tally.cut += 1
        record = Record(documents if len(plan.data_fields) > 1 else documents[0], label)
        records[_split(item.split, documents, plan)].append(record)
    return Converted(records, tally)


# ---- sources


def _rows(
    source: str,
    format: str,
    columns: Sequence[str],
    on_read: Callable[[int], None] = lambda size: None,
) -> Iterator[Row | Fault]:
    if source.startswith(tfds_source.PREFIX):
        yield from tfds_source.rows(source)
        return
    for file in formats.files(source):
        yield from formats.rows(file, format=format, columns=columns, on_position=_Steps(on_read))


class _Steps:
    """Turns positions in a file into the bytes since the position before."""

    def __init__(self, on_step: Callable[[int], None]):
        self._on_step, self._before = on_step, 0

    def __call__(self, position: int) -> None:
        self._on_step(position - self._before)
        self._before = position


def describe(source: str) -> dict[str, Any]:
    """What a source is, for the manifest."""
    if source.startswith(tfds_source.PREFIX):
        return tfds_source.describe(source)
    return {"source": source} | origin.describe(formats.files(source))


# ---- rows


def _example(row: Row, plan: Records, classes: Classes) -> tuple[tuple[bytes, ...], int] | Fault:
    documents: tuple[bytes, ...] = ()
    for field in plan.data_fields:
        document = bytes_of(row, field, plan.luma)
        if isinstance(document, Fault):
            return document
        documents += (document,)
    label = _label(row, plan)
    if not isinstance(label, Fault):
        label = classes.index(label, plan.label, row.place)
    return label if isinstance(label, Fault) else (documents, label)


def _label(row: Row, plan: Records) -> Any:
    """The label of a row, or a Fault."""
    if fault := _missing(row, plan.label, "label"):
        return fault
    value = row.fields[plan.label]
    if not plan.label_pattern:
        return value
    text = labels.spelling(value) or ""
    found = re.search(plan.label_pattern, text)
    if found and found[1]:
        return encode(found[1])
    what = "an empty text" if found else "nothing"
    reason = f"no label: {plan.label!r} is {text[:80]!r}, where the label_pattern finds {what}"
    return Fault(row.place, reason)


def bytes_of(row: Row, field: str, luma: bool = False) -> bytes | Fault:
    """The bytes of a field: those of a text, or of an array uint8, which `luma` makes grey."""
    if fault := _missing(row, field, "data"):
        return fault
    value = row.fields[field]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, np.ndarray):
        kind = "null" if value is None else f"a {type(value).__name__}"
        if isinstance(value, columnar.Unreadable):
            kind = f"of type {value.type}"
        return Fault(row.place, f"no bytes: field {field!r} is {kind}, not text")
    if value.dtype != np.uint8:
        return Fault(
            row.place, f"no bytes: field {field!r} is an array of {value.dtype}, not uint8"
        )
    if not luma:
        return value.tobytes()
    if value.shape[-1] != 3:
        return Fault(row.place, f"no colors: field {field!r} has shape {value.shape}, not [..., 3]")
    return to_luma(value).tobytes()


def to_luma(rgb: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] to uint8 [...]: ITU-R BT.601 luma, 0.299 R + 0.587 G + 0.114 B, rounded.

    In fixed point of 16 bits, as in Pillow's mode 'L'.
    """
    weighted = rgb.astype(np.uint32) @ np.array([19_595, 38_470, 7_471], np.uint32)
    return ((weighted + (1 << 15)) >> 16).astype(np.uint8)


def _missing(row: Row, field: str, option: str) -> Fault | None:
    if field in row.fields:
        return None
    known = ", ".join(map(repr, row.fields))
    reason = f"no field: {field!r} is not among {known}; the option `{option}` names another"
    return Fault(row.place, reason)


def _split(source: str, documents: Sequence[bytes], plan: Records) -> str:
    """The split of a record: that of its source, or one without a source by a hash of its bytes."""
    if source != "train":
        return source
    digest = hashlib.blake2b(f"{plan.seed}".encode(), digest_size=8)
    for document in documents:
        digest.update(b"%d:" % len(document))
        digest.update(document)
    # Each split has a range of hashes: a source for validation does not change what is in test.
    place = int.from_bytes(digest.digest(), "little") / 2**64
    split = {0: "test", 1: "validation"}.get(int(place / plan.held_out) if plan.held_out else 2)
    return split if split and split not in plan.sources else "train"


def _fault_message(fault: Fault) -> str:
    return (
        f"{fault.place}: {fault.reason}; correct it, or leave out such records with "
        "config.data.options.on_fault = 'skip'"
    )


def _nothing_left(plan: Records, split: str, tally: Tally) -> str:
    source = split if split in plan.sources else "train"
    advice = "" if split == source else f"; name a source for {split}, or change held_out"
    reasons = [
        f"; {count} skipped, {tally.places[kind][0]}" for kind, count in tally.skipped.items()
    ]
    return (
        f"no record is left for {split} of {tally.rows} in config.data.options.{source}"
        + "".join(reasons)
        + advice
    )
