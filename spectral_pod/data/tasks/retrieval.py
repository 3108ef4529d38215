"""Retrieval of the Long Range Arena: are two documents linked? Records are pairs of documents.

With `source` the documents are papers of the ACL Anthology Network (AAN), and linked means that
one cites the other. `source` is the folder of the published files, `tsv_data` of `lra_release`:

    new_aan_pairs.train.tsv  new_aan_pairs.eval.tsv  new_aan_pairs.test.tsv

A line is a label (0 or 1, also spelt 0.0 or 1.0), two ids and two texts, separated by tabs,
without a header and without quotes, as `lra_benchmarks/matching/input_pipeline.py` reads them. A
text spelt as a Python bytes literal, b'...', becomes the bytes that it stands for. That loader
keeps the literal: its models read `\\n` as two characters, and a little less of a paper in the same
number of bytes. `literals='keep'` does that, too, to compare with published figures.

Without `source` the task is a stand-in, and not AAN: are two windows of Python source cut from the
same file? The files are those of the running interpreter's standard library and site-packages.

- The first window is from the first half of a file, the second from the second half: they never
  overlap, and only one of them can hold the head of a file.
- Every first window occurs twice: linked with the second window of its file, and not linked with
  that of another file of the same folder. Every second window occurs twice as well, so either
  document alone, or any sum of what each says by itself, is right for exactly half of the records.
- No folder, and so no file, is in two splits; files of equal content count once, and no two records
  are equal. Files that differ a little, such as two versions of a module, are different files.

What the stand-in measures is whether a model compares: names, style and subject are shared within
a file, and part of that with its neighbours. Comparing byte histograms, or which words of five
letters or more both windows have, is right for 67 and 75 % of test records of 4,000 bytes each, 62
and 68 % of 1,024, where that was tried; what is installed decides. It needs less understanding
than citations do, and figures on it say nothing about figures on AAN.
"""

import ast
import collections
import dataclasses
import hashlib
import os
import platform
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from absl import logging

from spectral_pod import storage
from spectral_pod.data import byte_store, formats, origin
from spectral_pod.data.progress import Progress
from spectral_pod.data.tasks.task import StoredTask
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import Positive
from spectral_pod.seeds import entropy

CLASSES = ("unlinked", "linked")
FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
_COLUMNS = ("label", "id1", "id2", "text1", "text2")
_LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
_MAX_PER_FILE = 4  # windows that a file gives as the first of a pair, and as the second
_MAX_SHARE = 8  # no folder gives more than one part in this many of a split
_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages"}  # packages are a root of their own


@dataclasses.dataclass(frozen=True)
class Retrieval(StoredTask):
    """Pairs of documents; the class says whether they are linked."""

    name = "retrieval"
    version = 2
    num_classes = len(CLASSES)

    seed: int = 0  # of the stand-in: draws files, splits and windows
    # The folder with the published files, also on gs://; "" makes the stand-in.
    source: storage.Source = ""
    # Of the published files: texts that are bytes literals are decoded, or kept.
    literals: Literal["decode", "keep"] = "decode"
    window: Positive = 4000  # of the stand-in: bytes in each document
    train: int = 16_000  # of the stand-in: records, half of them linked; likewise the next two
    validation: int = 1_000
    test: int = 1_000
    # Of the stand-in: folders to search instead of the running interpreter's own.
    roots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, size in self._sizes.items() if not self.source else ():
            if size < 4 or size % 2:
                raise ConfigError(
                    f"config.data.options.{name} is {size}; half of the records are linked, so it "
                    "must be even, and at least 4"
                )

    @property
    def _sizes(self) -> dict[str, int]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def build(self, path: str) -> None:
        """Writes the pairs as a byte store.

        Raises:
          DataError: a published file is missing or a line malformed (names file and line), or there
            are too few files of Python source for the stand-in.
        """
        if self.source:
            self._write_published(path)
        else:
            self._write_stand_in(path)

    def check(self, store: byte_store.ByteStore) -> None:
        """Compares the published files with those that the store was written from, where they are
        still on this host; those of the stand-in are not compared.

        Raises:
          DataError: one has changed since.
        """
        for split, name in FILES.items() if self.source else ():
            file = _join(self.source, name)
            described = store.manifest["provenance"]["files"][split]
            origin.check(origin.on_this_host(file), described, file, store.path)

    def _write_published(self, path: str) -> None:
        files = {split: _join(self.source, name) for split, name in FILES.items()}
        for file in files.values():
            formats.files(file)  # all are there, before hours may go into the first
        decode = self.literals == "decode"
        byte_store.write(
            path,
            {split: published(file, decode=decode) for split, file in files.items()},
            classes=CLASSES,
            documents=2,
            provenance={
                "task": "retrieval",
                "documents": "AAN, as published with the Long Range Arena",
                "source": self.source,
                "literals": self.literals,
                "files": {split: origin.describe([file]) for split, file in files.items()},
            },
        )

    def _write_stand_in(self, path: str) -> None:
        started, sizes = time.monotonic(), self._sizes
        roots = self.roots or _interpreter_roots()
        logging.warning(
            "Retrieval without config.data.options.source is a stand-in and not AAN: windows of "
            "Python source, linked if they are of the same file"
        )
        rings = _rings(_cuts(self.seed, self.window, roots), sizes)
        for split, size in sizes.items():
            count = 2 * sum(map(len, rings[split]))
            if count < size:
                raise DataError(
                    f"config.data.options.{split} is {size}, and the stand-in for retrieval has "
                    f"only {count} records left for it, from Python source in files of "
                    f"{2 * self.window:,} bytes or more in {', '.join(roots)}; ask for fewer "
                    "records or a smaller window, or name a source"
                )
        byte_store.write(
            path,
            {split: _pairs(rings[split]) for split in sizes},
            classes=CLASSES,
            documents=2,
            provenance={
                "task": "retrieval",
                "documents": "a stand-in for AAN: windows of Python source, of one file or of two",
                "python": platform.python_version(),
                "seed": self.seed,
                "window": self.window,
                "roots": list(roots),
                "folders": {
                    split: len({ring[0].folder for ring in rings[split]}) for split in sizes
                },
                "files": {
                    split: len({cut.file for ring in rings[split] for cut in ring})
                    for split in sizes
                },
            },
        )
        logging.info("Stand-in for retrieval in %.1f s", time.monotonic() - started)


# ---- the published files


def published(file: str, *, decode: bool) -> Iterator[byte_store.Record]:
    """The records of one of the published files, in order; every line is one.

    Raises:
      DataError: a line is malformed, or there is none; names the file and the line.
    """
    progress = Progress(f"Reading {os.path.basename(file)}", 0, "lines")
    for row in formats.rows(file, format="tsv", columns=_COLUMNS):
        if isinstance(row, formats.Fault):
            raise DataError(f"{row.place}: {row.reason}; a line is {', '.join(_COLUMNS)}")
        label = _LABELS.get(row.fields["label"])
        if label is None:
            raise DataError(f"{row.place}: the label is {row.fields['label'][:40]!r}, not 0 or 1")
        texts = [row.fields["text1"], row.fields["text2"]]
        if decode:
            texts = [_decoded(text, row.place) for text in texts]
        yield byte_store.Record(tuple(texts), label)
        progress.add()
    progress.end()
    if not progress.done:
        raise DataError(f"{file} has no lines")


def _decoded(text: bytes, place: str) -> bytes:
    """What a text that is spelt as a bytes literal stands for; any other text as it is."""
    if not text.startswith((b"b'", b'b"')):
        return text
    try:
        value = ast.literal_eval(text.decode("ascii"))  # a literal has no other characters
    except (ValueError, SyntaxError):
        value = None
    if isinstance(value, bytes):
        return value
    raise DataError(
        f"{place}: a text starts as a Python bytes literal and is none: {text[:20]!r}...; "
        "config.data.options.literals = 'keep' takes texts as they are"
    )


def _join(folder: str, name: str) -> str:
    return os.path.join(storage.place(folder, "config.data.options.source", root=True), name)


# ---- the stand-in


class _Cut(NamedTuple):
    """A window of the first half of a file and one of its second half."""

    first: bytes
    second: bytes
    folder: str
    file: bytes  # digest of its content


def _interpreter_roots() -> tuple[str, ...]:
    names = ("stdlib", "purelib", "platlib")
    return tuple(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in names))


def _cuts(seed: int, window: int, roots: Sequence[str]) -> list[_Cut]:
    """What all files give, in random order, no window twice."""
    cuts: list[_Cut] = []
    seen: set[bytes] = set()
    for folder, file in _sources(roots):
        if os.path.getsize(file) < 2 * window:
            continue
        with open(file, "rb") as stream:
            content = stream.read()
        digest = _hash(content)
        if digest in seen:
            continue
        seen.add(digest)
        rng = np.random.default_rng([entropy(seed), int.from_bytes(digest, "little")])
        half = len(content) // 2
        count = min(_MAX_PER_FILE, half // window)
        # In each half one window at a random offset of each of `count` equal parts.
        offsets = (np.arange(count) + rng.random((2, count))) / count * (half - window + 1)
        for i, j in offsets.astype(int).T.tolist():
            first, second = content[i : i + window], content[half + j : half + j + window]
            digests = {_hash(first), _hash(second)}
            if len(digests) == 2 and not digests & seen:
                seen |= digests
                cuts.append(_Cut(first, second, folder, digest))
    return sorted(cuts, key=lambda cut: _hash(b"%d/" % seed + cut.first))


def _sources(roots: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(folder, path) of every file of Python source; the same folder in two roots is two."""
    for number, root in enumerate(roots):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _LEFT_OUT)
            for name in sorted(names):
                path = os.path.join(folder, name)
                if name.endswith(".py") and os.path.isfile(path):
                    yield f"{number}/{os.path.relpath(folder, root)}", path


def _rings(cuts: Sequence[_Cut], sizes: Mapping[str, int]) -> dict[str, list[list[_Cut]]]:
    """By split, cuts for so many records where there are enough, in rings.

    A ring is two or more cuts of different files of one folder. A folder is in one split, and
    gives no more than an eighth of it, or 3.
    """
    folders: dict[str, dict[int, list[_Cut]]] = {}
    of_file: collections.Counter[bytes] = collections.Counter()
    for cut in cuts:
        # The n-th cuts of all files of a folder are a ring: so none has two of a file.
        rings = folders.setdefault(cut.folder, {})
        rings.setdefault(of_file[cut.file], []).append(cut)
        of_file[cut.file] += 1
    taken: dict[str, list[list[_Cut]]] = {split: [] for split in sizes}
    free = list(folders.values())
    for split in sorted(sizes, key=lambda split: sizes[split]):
        missing, passed = sizes[split] // 2, []
        for rings in free:
            before = missing
            room = max(3, sizes[split] // 2 // _MAX_SHARE)
            for ring in rings.values():
                count = min(len(ring), room, missing)
                count -= missing - count == 1  # a single one would make no ring
                if count > 1:
                    taken[split].append(ring[:count])
                    room, missing = room - count, missing - count
            if missing == before:
                passed.append(rings)
        free = passed
    return taken


def _pairs(rings: Sequence[Sequence[_Cut]]) -> Iterator[byte_store.Record]:
    """Each cut linked with itself, and not linked with the one before it in its ring."""
    pairs = [(cut, ring[i - 1]) for ring in rings for i, cut in enumerate(ring)]
    for cut, other in sorted(pairs, key=lambda pair: _hash(pair[0].first)):
        yield byte_store.Record((cut.first, cut.second), CLASSES.index("linked"))
        yield byte_store.Record((cut.first, other.second), CLASSES.index("unlinked"))


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
