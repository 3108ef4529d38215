"""Language modelling: which byte or token comes next? In your own files, or in Python's library.

    --config.data.task=lm --config.data.options.train='reviews/*.jsonl.xz'

A source is what the task `records` reads: a file, a folder or a glob, on disk or gs://, or a split
of TensorFlow Datasets, `tfds:imdb_reviews/train`. A document is

- the field `data` of a record, in files whose suffix names a format of records (`data/formats.py`):
  JSON lines, CSV, parquet and others, and in TFDS;
- a whole file otherwise, also `.txt`, decompressed if its suffix is .gz, .bz2, .xz or .zst, to at
  most 256 MB. It may hold any bytes, but not those of an archive, nor compressed ones that its name
  does not announce. `format='document'` makes every file such a document, archives too;
  `format='text'` every line.

Empty documents are left out, and in a folder hidden files. The splits are

- those for which `train`, `validation` and `test` name sources (validation is held out of training
  if it has none); or, if only `train` has a source,
- those that the names of its files or their sub-folders say, as `wiki.train.tokens` and
  `wiki.valid.tokens` do; or
- 90% of its bytes for training, 5% for validation and 5% for testing (`data/held_out.py`): whole
  documents, but a document that is longer than 5% is cut. A single document is 90% for training and
  10% for validation, as nanoGPT splits tiny Shakespeare; there is no test split.

Without a source, every `.py` file of the running interpreter's standard library but its tests is a
document. Whole top-level modules, in the order of a hash of their names, make 90% for training, 5%
for validation and 5% for testing. What went where is printed, and is in the store's manifest.

With `tokenizer=FILE`, a `tokenizer.json` as of Hugging Face, the model predicts its tokens in place
of bytes, and `config.data.seq_len` counts these (`data/vocabulary.py`). Splits stay those of bytes.
"""

import array
import dataclasses
import hashlib
import itertools
import os
import platform
import posixpath
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from spectral_pod import objectives, shapes, storage
from spectral_pod.data import (
    byte_store,
    compression,
    formats,
    origin,
    pipeline,
    text,
    tfds_source,
    vocabulary,
    windows,
)
from spectral_pod.data.document_writer import Document, Facts, Writer
from spectral_pod.data.formats import Fault, Row
from spectral_pod.data.held_out import HeldOut, hold_out
from spectral_pod.data.progress import Progress
from spectral_pod.data.tasks import records
from spectral_pod.data.tasks.task import StoredTask, Stores, added
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.storage import Source

if TYPE_CHECKING:
    from spectral_pod.config import Config, DataConfig

SPLITS = ("train", "validation", "test")
_NAMED = {
    "train": "train", "training": "train",
    "valid": "validation", "validation": "validation", "val": "validation",
    "test": "test",
}  # fmt: skip
_LIBRARY_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_TO_BE_SPLIT = ""
_EMPTY = "empty"


class Input(NamedTuple):
    """A file, or a split of TFDS, and the split that its documents are in."""

    split: str  # or _TO_BE_SPLIT
    source: str
    name: str  # of a file: its path relative to the folder that contains all files of the source


@dataclasses.dataclass(frozen=True)
class LanguageModelling(StoredTask):
    """The byte that follows, or the end of the document, everywhere in a stream of documents."""

    name = "lm"
    version = 2
    objective = objectives.NextByte

    seed: int = 0  # decides which split a document is in, where nothing else does
    source: Source = ""  # another name of `train`
    train: Source = ""  # a source; "" is the interpreter's own library
    validation: Source = ""  # a source; "" holds out a part of the training documents
    test: Source = ""  # likewise; no such split if only validation has a source
    format: str = "auto"  # of the files, where their suffixes do not say it: see `formats.rows`
    columns: tuple[str, ...] = ()  # names of the columns of csv and tsv files without a header
    data: str = "text"  # the field of a record that is the document
    on_fault: Literal["stop", "skip"] = "stop"  # at a record that cannot be used, or count it
    tokenizer: Source = added("")  # a file; "" predicts bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source and self.train:
            raise ConfigError(
                f"config.data.options.source is {self.source!r} and config.data.options.train is "
                f"{self.train!r}: two names of one option; set one of them"
            )
        if not self.data:
            raise ConfigError("config.data.options.data is ''; name the field with the documents")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "LanguageModelling":
        """See `Task.from_options`."""
        kind = TokenModelling if options.get("tokenizer") else LanguageModelling
        return super(LanguageModelling, kind).from_options(options)

    @property
    def vocabulary(self) -> vocabulary.Vocabulary:
        """What is predicted, beside the end of a document."""
        return vocabulary.of(self.tokenizer)

    @property
    def num_classes(self) -> int:
        """See `Task.num_classes`; the last class is the end of a document."""
        return self.vocabulary.num_tokens + 1

    @property
    def vocab_size(self) -> int:
        """See `Task.vocab_size`."""
        return int(shapes.symbol(self.vocabulary.num_tokens))

    @property
    def sources(self) -> dict[str, str]:
        """The sources that are given, by split; none for the interpreter's library."""
        sources = {
            "train": self.train or self.source,
            "validation": self.validation,
            "test": self.test,
        }
        return {split: source for split, source in sources.items() if source}

    def build(self, path: str) -> None:
        """Writes the documents as a byte store, in memory for the longest of them.

        Documents that are to be split are read twice, first for their sizes.

        Raises:
          ConfigError: there is no source to train on, but one for another split.
          DataError: a source is missing or damaged, has a record that cannot be used (names the
            file and the record), or leaves nothing for a split; or some names of files say which
            split they are for, and others do not.
        """
        inputs, tally = self._inputs(), records.Tally()
        held_out = self._held_out([one for one in inputs if one.split == _TO_BE_SPLIT])
        found = {one.split for one in inputs} | ({"train", *held_out.shares} if held_out else set())
        tokens = self.vocabulary
        writer = Writer(
            path,
            [split for split in SPLITS if split in found],
            lambda text: tokens.encode(text, cut=True).tobytes(),
        )
        progress = Progress("Writing documents", 0, "bytes")
        for split, document in self._pieces(inputs, held_out, tally):
            writer.add(split, document)
            progress.add(len(document.data))
        progress.end()
        for split, facts in writer.facts.items():
            if not facts.documents:
                raise DataError(self._nothing_left(split, writer.facts, tally))
        writer.finish(self._provenance(inputs) | dataclasses.asdict(tally))
        for line in _report(writer.facts, tally):
            print(line, flush=True)

    def check(self, store: byte_store.ByteStore) -> None:
        """Compares the sources with what the store was written from, where they are on this host.

        The interpreter's library, of which another Python has another version, is not compared, nor
        are datasets of TFDS, whose names have a version.

        Raises:
          DataError: the files have changed since.
        """
        provenance = store.manifest["provenance"]
        # An older version had one source and no files of other splits.
        described = provenance.get("sources", {"train": provenance.get("files")})
        for split, source in self.sources.items():
            if not source.startswith(tfds_source.PREFIX):
                files = origin.on_this_host(source)
                known = described.get(split) if isinstance(described, dict) else None
                origin.check(files, known, self._described(split), store.path)

    def batches(
        self, config: "Config", split: str, stores: Stores, *, training: bool
    ) -> dict[str, pipeline.Source]:
        """See `Task.batches`."""
        for store in stores.values():
            if split not in store.manifest["splits"]:
                there = ", ".join(s for s in SPLITS if s in store.manifest["splits"])
                raise DataError(
                    f"{store.path} has the splits {there}, and no {split} split; name its files "
                    f"with config.data.options.{split}, or evaluate another split: "
                    "config.train.eval_split='validation'"
                )
            written_with = store.manifest["provenance"].get("tokenizer_sha256", "")
            if written_with != self.vocabulary.sha256:
                raise DataError(
                    f"{store.path} holds {'tokens of' if written_with else 'bytes, not tokens of'} "
                    f"{'another' if written_with else 'a'} tokenizer, and {vocabulary.OPTION} is "
                    f"{self.tokenizer!r}; name the file that the store was written with, or delete "
                    "the store to have it written anew"
                )
        return super().batches(config, split, stores, training=training)

    def read(
        self, split: byte_store.Split, data: "DataConfig", *, num_records: int = 0, **arguments: Any
    ) -> windows.Windows:
        """Batches of windows of the stream of documents: see `StoredTask.read`."""
        totals = None
        if self.tokenizer and not num_records:
            facts = split.provenance["splits"][split.name]
            # An end of a document counts as a byte.
            totals = {"bytes": facts["bytes"] + facts["documents"], "words": facts["words"]}
        return windows.Windows(
            split,
            seq_len=data.seq_len,
            num_documents=num_records,
            vocabulary=self.vocabulary,
            totals=totals,
            **arguments,
        )

    def forms(self, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """See `Task.forms`. Older versions read every file as one document, as it was on disk, and
        split folders by files: then they are other data.
        """
        older: dict[str, Any] = {"seed": self.seed, "source": self.source}
        if self != LanguageModelling(**older):
            return super().forms(given)
        suffix = posixpath.splitext(self.source)[1].lower()
        is_read_otherwise = (
            suffix in compression.SUFFIXES or self._format(self.source) != "document"
        )
        path = self.source and storage.place(self.source, "a source", root=True)
        if is_read_otherwise or os.path.isdir(path):
            return [self.identity()]
        return [*super().forms(given), older]

    # ---- inputs and documents

    def _described(self, split: str) -> str:
        """The option that names the source of a split, with its value, for messages."""
        option = "source" if split == "train" and self.source else split
        return f"config.data.options.{option} = {self.sources.get(split, '')!r}"

    def _inputs(self) -> list[Input]:
        """Every file, or split of TFDS, in order."""
        sources = self.sources
        if not sources:
            return _library(self.seed)
        if "train" not in sources:
            raise ConfigError(
                f"{self._described(next(iter(sources)))}, and config.data.options.train is empty; "
                "name the files to train on"
            )
        inputs: list[Input] = []
        for split, source in sources.items():
            if split == "train" and "validation" not in sources:
                split = _TO_BE_SPLIT
            if source.startswith(tfds_source.PREFIX):
                inputs.append(Input(split, source, source))
                continue
            try:
                files = formats.files(source)
            except DataError as error:
                reason = str(error).removeprefix(f"{source}: ")
                raise DataError(f"{self._described(split or 'train')}: {reason}") from error
            folder = posixpath.commonpath([posixpath.dirname(file) for file in files])
            inputs += [Input(split, file, posixpath.relpath(file, folder)) for file in files]
        return _by_name(inputs, self._described("train")) if list(sources) == ["train"] else inputs

    def _format(self, file: str) -> str:
        """How a file is read: see `formats.rows`."""
        if self.format != "auto":
            return self.format
        said = formats.format_of(file)
        return "document" if said in (None, "text") else said

    def _documents(self, one: Input, tally: records.Tally) -> Iterator[Document]:
        """The documents of an input that are not empty, in order; `tally` counts the others too."""
        if one.source.startswith(tfds_source.PREFIX):
            rows: Iterator[Row | Fault] = tfds_source.rows(one.source)
        else:
            format = self._format(one.source)
            rows = formats.rows(one.source, format=format, columns=self.columns)
        for row in rows:
            tally.rows += 1
            data = row if isinstance(row, Fault) else self._content(row, one)
            if self.tokenizer and isinstance(data, bytes):
                data = _utf8(data, row.place)
            if isinstance(data, bytes):
                yield Document(_printable(one.name + row.place.removeprefix(one.source)), data)
                continue
            if self.on_fault == "stop" and data.reason != _EMPTY:
                raise DataError(
                    f"{data.place}: {data.reason}; or leave out such records with "
                    "config.data.options.on_fault='skip'"
                )
            tally.skip(Fault(_printable(data.place), data.reason))

    def _content(self, row: Row, one: Input) -> bytes | Fault:
        """The document that a row of an input holds."""
        data = records.bytes_of(row, self.data)
        if isinstance(data, Fault) and self.data not in row.fields:
            advice = (
                "name the field with config.data.options.data, or make every file a document with "
                "config.data.options.format='document'"
            )
            return Fault(data.place, f"{data.reason}; {advice}")
        if not data:
            return Fault(row.place, _EMPTY)
        is_whole_file = row.place == one.source
        if isinstance(data, Fault) or self.format != "auto" or not is_whole_file:
            return data
        if packed := text.packed(data):
            return Fault(
                row.place,
                f"packed: it is {packed}, or train on it as it is with "
                "config.data.options.format='document'",
            )
        return data

    def _held_out(self, inputs: Sequence[Input]) -> HeldOut | None:
        """What is held out of documents that are to be split, if there are such."""
        if not inputs:
            return None
        sizes, keys = array.array("q"), array.array("Q")
        progress = Progress("Measuring documents", 0, "bytes")
        for one in inputs:
            for document in self._documents(one, records.Tally()):
                digest = hashlib.blake2b(b"%d/" % self.seed, digest_size=8)
                digest.update(document.data)
                keys.append(int.from_bytes(digest.digest(), "little"))
                sizes.append(len(document.data))
                progress.add(len(document.data))
        progress.end()
        splits = [split for split in SPLITS[1:] if split not in self.sources]
        return hold_out(np.asarray(sizes), np.asarray(keys), splits)

    def _pieces(
        self, inputs: Sequence[Input], held_out: HeldOut | None, tally: records.Tally
    ) -> Iterator[tuple[str, Document]]:
        """Every document, or piece of one, and its split."""
        numbers = itertools.count()
        for one in inputs:
            for document in self._documents(one, tally):
                if one.split != _TO_BE_SPLIT:
                    yield one.split, document
                    continue
                assert held_out
                name, data, number = *document, next(numbers)
                if number >= len(held_out.sizes) or len(data) != held_out.sizes[number]:
                    raise DataError(f"{one.source} changed while it was read; start again")
                for split, start, stop in held_out.pieces(number):
                    where = "" if stop - start == len(data) else f", bytes {start} to {stop}"
                    yield split, Document(name + where, data[start:stop])

    # ---- what went where

    def _provenance(self, inputs: Sequence[Input]) -> dict[str, Any]:
        files = origin.describe([one.source for one in inputs]) if not self.sources else {}
        sources = {split: records.describe(source) for split, source in self.sources.items()}
        options = {name: x for name, x in self.options.items() if name not in (*SPLITS, "source")}
        return {
            "task": "lm",
            "python": platform.python_version(),
            "sources": sources or {"train": {"source": ""} | files},
            **options,
            **({"tokenizer_sha256": self.vocabulary.sha256} if self.tokenizer else {}),
        }

    def _nothing_left(self, split: str, facts: Mapping[str, Facts], tally: records.Tally) -> str:
        left_out = "".join(f"; {line}" for line in _left_out(tally))
        is_given = split in self.sources and split != "train"
        size = sum(x.bytes for s, x in facts.items() if s == "train" or s not in self.sources)
        if is_given or not size:
            return f"{self._described(split if is_given else 'train')} holds no bytes{left_out}"
        return (
            f"{self._described('train')} holds {size:,} bytes in all, which leaves nothing for "
            f"{split} (copies of a document are in one split); add documents, or name a source for "
            f"each split with config.data.options.train, .validation and .test{left_out}"
        )


def _utf8(data: bytes, place: str) -> bytes | Fault:
    """A document that a tokenizer can read."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return Fault(place, f"not UTF-8, which a tokenizer reads: byte {error.start}")
    return data


class TokenModelling(LanguageModelling):
    """The same with a tokenizer: the token that follows."""

    objective = objectives.NextToken


def _report(facts: Mapping[str, Facts], tally: records.Tally) -> Iterator[str]:
    for split, part in facts.items():
        names = f"{part.first!r}" + (f" to {part.last!r}" if part.documents > 1 else "")
        yield (
            f"{split}: {part.documents:,} document(s), {part.bytes:,} bytes, {part.words:,} words "
            f"and line ends: {names}"
        )
    yield from _left_out(tally)


def _printable(name: str) -> str:
    """The name of a file that may not be UTF-8, for the manifest, which is."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _left_out(tally: records.Tally) -> Iterator[str]:
    for kind, count in tally.skipped.items():
        yield f"left out: {count:,}, {kind}, first {tally.places[kind][0]!r}"


# ---- splits by names


def _by_name(inputs: list[Input], source: str) -> list[Input]:
    """Each input in the split that its name says; as they are if no names say train and validation.

    Raises:
      DataError: some names say a split, and others none or several.
    """
    named = [one._replace(split=_split_of_name(one.name)) for one in inputs]
    if not {"train", "validation"} <= {one.split for one in named}:
        return inputs
    for one in named:
        if one.split == _TO_BE_SPLIT:
            raise DataError(
                f"{source} has files named after the splits train and "
                f"validation, and others, such as {one.name!r}, after none or several; take these "
                "away or rename them, or name the files of each split with "
                "config.data.options.train, .validation and .test"
            )
    return named


def _split_of_name(name: str) -> str:
    """The split that the outermost part of a path to name any names, if it names one only."""
    for part in name.lower().split("/"):
        splits = {_NAMED[word] for word in re.split("[^a-z]+", part) if word in _NAMED}
        if splits:
            return splits.pop() if len(splits) == 1 else _TO_BE_SPLIT
    return _TO_BE_SPLIT


# ---- the interpreter's library


def _library(seed: int) -> list[Input]:
    """The files of the standard library, 90 : 5 : 5 of its top-level modules."""

    def order(module: str) -> bytes:
        return hashlib.blake2b(os.fsencode(f"{seed}/{module}")).digest()

    root = sysconfig.get_path("stdlib")
    names = sorted(os.path.relpath(file, root).replace(os.sep, "/") for file in _walk(root))
    modules = sorted({name.split("/")[0] for name in names}, key=order)
    count = max(1, round(0.05 * len(modules)))
    split_of = dict.fromkeys(modules, "train")
    split_of |= dict.fromkeys(modules[:count], "validation")
    split_of |= dict.fromkeys(modules[count : 2 * count], "test")
    return [Input(split_of[name.split("/")[0]], os.path.join(root, name), name) for name in names]


def _walk(root: str) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            f for f in subfolders if not f.startswith(".") and f not in _LIBRARY_LEFT_OUT
        ]
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path) and os.path.getsize(path):
                yield path
