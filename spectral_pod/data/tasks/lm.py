"""Language modelling: which byte comes next? In your own files, or in Python's own library.

A record is a whole document, without a label. What `source` is decides the splits:

- nothing (the default): every `.py` file of the running interpreter's standard library but its
  tests, which are larger than the rest. Whole top-level modules, in the order of a hash of their
  names, make 90% for training, 5% for validation and 5% for testing.
- a file: its first 90% of bytes is one document to train on, the last 10% one for validation, as
  nanoGPT splits tiny Shakespeare; there is no test split.
- a folder: each file is a document. Where names or sub-folders say which split they are for, as
  `wiki.train.tokens` and `wiki.valid.tokens` do, that counts. Otherwise files are split as the
  library's modules are.

Files may hold any bytes. Empty files and, in a folder, hidden ones are left out.
"""

import dataclasses
import hashlib
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from spectral_pod import objectives
from spectral_pod.data import byte_store, origin, windows
from spectral_pod.data.tasks.task import StoredTask
from spectral_pod.errors import DataError

if TYPE_CHECKING:
    from spectral_pod.config import DataConfig

SPLITS = ("train", "validation", "test")
_NAMED = {
    "train": "train", "training": "train",
    "valid": "validation", "validation": "validation", "val": "validation",
    "test": "test",
}  # fmt: skip
_LIBRARY_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class Document(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    path: str
    name: str  # relative to the source, with slashes
    start: int
    stop: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


Splits = dict[str, list[Document]]


@dataclasses.dataclass(frozen=True)
class LanguageModelling(StoredTask):
    """The byte that follows, or the end of the document, everywhere in a stream of documents."""

    name = "lm"
    version = 2
    objective = objectives.NextByte
    num_classes = windows.NUM_CLASSES  # bytes and the end of a document

    seed: int = 0  # decides which split a document is in, where its name does not
    source: str = ""  # a file, a folder, or "" for the interpreter's own library

    def build(self, path: str) -> None:
        """Writes the documents as a byte store, each in memory at its turn.

        Raises:
          DataError: there is nothing at `source`, nothing in it, or nothing for a split; or some
            names say which split they are for, and others do not.
        """
        source, documents = self.source, _documents(self.source)
        if source and os.path.isfile(os.path.expanduser(source)):
            splits = _first_and_last(documents[0])
        else:
            splits = (source and _by_name(documents, source)) or _by_hash(
                documents, self.seed, source
            )
        byte_store.write(
            path,
            {split: _records(part) for split, part in splits.items()},
            classes=("document",),
            provenance={
                "task": "lm",
                "python": platform.python_version(),
                "seed": self.seed,
                "source": source,
                "files": origin.describe([document.path for document in documents]),
            },
        )

    def check(self, store: byte_store.ByteStore) -> None:
        """Compares `source` with what the store was written from, where it is still on this host.

        The interpreter's library, of which another Python has another version, is not compared.

        Raises:
          DataError: the files have changed since.
        """
        if not self.source or not os.path.exists(os.path.expanduser(self.source)):
            return
        files = [document.path for document in _documents(self.source)]
        described = store.manifest["provenance"]["files"]
        origin.check(files, described, f"config.data.options.source = {self.source!r}", store.path)

    def read(
        self, split: byte_store.Split, data: "DataConfig", *, num_records: int = 0, **arguments: Any
    ) -> windows.Windows:
        """Batches of windows of the stream of documents: see `StoredTask.read`."""
        return windows.Windows(split, seq_len=data.seq_len, num_documents=num_records, **arguments)


def _records(documents: Iterable[Document]) -> Iterator[byte_store.Record]:
    for document in documents:
        yield byte_store.Record(document.read(), 0)


def _documents(source: str) -> list[Document]:
    """Every file of a source that is not empty, whole, in the order of their names."""
    root = os.path.abspath(os.path.expanduser(source)) if source else sysconfig.get_path("stdlib")
    if not os.path.exists(root):
        raise DataError(
            f"config.data.options.source = {source!r}: there is no such file or folder on this host"
        )
    paths = [root] if os.path.isfile(root) else _walk(root, library=not source)
    folder = os.path.dirname(root) if os.path.isfile(root) else root
    documents = []
    for path in paths:
        name = os.path.relpath(path, folder).replace(os.sep, "/")
        if size := os.path.getsize(path):
            documents.append(Document(path, name, 0, size))
    if not documents:
        raise DataError(f"config.data.options.source = {source!r} holds no bytes")
    return sorted(documents, key=lambda document: document.name)


def _walk(root: str, *, library: bool) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        left_out = _LIBRARY_LEFT_OUT if library else set()
        subfolders[:] = [f for f in subfolders if not f.startswith(".") and f not in left_out]
        for name in names:
            path = os.path.join(folder, name)
            wanted = name.endswith(".py") if library else not name.startswith(".")
            if wanted and os.path.isfile(path):
                yield path


def _first_and_last(document: Document) -> Splits:
    cut = document.stop * 9 // 10
    if not cut:
        raise DataError(f"config.data.options.source {document.path} has 1 byte; a split needs 2")
    return {
        "train": [document._replace(stop=cut)],
        "validation": [document._replace(start=cut)],
    }


def _by_name(documents: list[Document], source: str) -> Splits:
    """The split that every name says, or nothing where names do not say train and validation."""
    named = {document: _split_of_name(document.name) for document in documents}
    if not {"train", "validation"} <= set(named.values()):
        return {}
    silent = [document.name for document, split in named.items() if split is None]
    if silent:
        raise DataError(
            f"config.data.options.source = {source!r} has files named after the splits train and "
            f"validation, and others, such as {silent[0]!r}, after none or several; take these "
            "away or rename them"
        )
    return {
        split: part for split in SPLITS if (part := [d for d in documents if named[d] == split])
    }


def _split_of_name(name: str) -> str | None:
    """The split that the outermost part of a path to name any names, if it names one only."""
    for part in name.lower().split("/"):
        splits = {_NAMED[word] for word in re.split("[^a-z]+", part) if word in _NAMED}
        if splits:
            return splits.pop() if len(splits) == 1 else None
    return None


def _by_hash(documents: list[Document], seed: int, source: str) -> Splits:
    """90 : 5 : 5 of the files, or of the library's top-level modules; at least one each."""

    def unit(document: Document) -> str:
        return document.name if source else document.name.split("/")[0]

    def order(unit: str) -> bytes:
        return hashlib.blake2b(os.fsencode(f"{seed}/{unit}")).digest()

    units = sorted({unit(document) for document in documents}, key=order)
    held_out = max(1, round(0.05 * len(units)))
    if len(units) < 3:
        raise DataError(
            f"config.data.options.source = {source!r} holds {len(units)} files, and three splits "
            "need one each; name them train and valid, or give a single file as the source"
        )
    split_of = {
        unit: SPLITS[1] if i < held_out else SPLITS[2] if i < 2 * held_out else SPLITS[0]
        for i, unit in enumerate(units)
    }
    return {split: [d for d in documents if split_of[unit(d)] == split] for split in SPLITS}
