"""Writes the documents of language modelling to a byte store, several splits in one pass."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spectral_pod.data import byte_store, zarr_arrays
from spectral_pod.data.byte_store import Record

# Every byte of a word becomes an x, and the others, which are ASCII white space, a space.
_WORD_OR_SPACE = bytes(ord(" ") if bytes([i]).isspace() else ord("x") for i in range(256))


class Document(NamedTuple):
    """A document, or a piece of one, and where it is from."""

    name: str
    data: bytes


@dataclasses.dataclass
class Facts:
    """What is in a split; `words` is as `objectives.Words` counts them."""

    documents: int = 0
    bytes: int = 0
    words: int = 0
    first: str = ""  # the names of documents
    last: str = ""


class Writer:
    """A store of the records that `byte_store.write` would write, given in any order of splits.

    Attributes:
      facts: by split.
    """

    def __init__(self, path: str, splits: Sequence[str], encode: Callable[[bytes], bytes] = bytes):
        """Replaces what is at `path`, a folder or a gs:// URL; documents are stored as `encode`
        gives them."""
        self.facts = {split: Facts() for split in splits}
        self._path, self._encode = path, encode
        self._parts: dict[str, list[Any]] = {split: [] for split in splits}
        self._open: dict[str, list[Record]] = {split: [] for split in splits}
        self._filled = dict.fromkeys(splits, 0)  # bytes of the open parts
        byte_store.clear(path)

    def add(self, split: str, document: Document) -> None:
        """Appends a document to a split."""
        facts = self.facts[split]
        facts.documents += 1
        facts.bytes += len(document.data)
        facts.words += count_words(document.data)
        facts.first, facts.last = facts.first or document.name, document.name
        record = Record(self._encode(document.data), 0)
        self._open[split].append(record)
        self._filled[split] += len(record.data)
        if self._filled[split] >= zarr_arrays.PART_BYTES:
            self._end_part(split)

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Writes what is left, and the manifest, whose provenance has `facts` as "splits"."""
        for split, part in self._open.items():
            if part:
                self._end_part(split)
        facts = {split: dataclasses.asdict(part) for split, part in self.facts.items()}
        byte_store.finish(
            self._path,
            self._parts,
            classes=("document",),
            provenance={**provenance, "splits": facts},
        )

    def _end_part(self, split: str) -> None:
        number, part = len(self._parts[split]), self._open[split]
        self._parts[split].append(
            byte_store.write_part(self._path, split, number, part, num_classes=1)
        )
        self._open[split], self._filled[split] = [], 0


def count_words(data: bytes) -> int:
    """The number of words, between ASCII white space, and of line ends: see `objectives.Words`."""
    words = data.translate(_WORD_OR_SPACE)
    return words.count(b"x ") + words.endswith(b"x") + data.count(b"\n")
