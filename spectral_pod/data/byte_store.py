"""The byte store: labelled records of any length, on disk or in Google Cloud Storage.

A store is a folder with a manifest and one sub-folder per split, divided into parts:

    STORE/manifest.json                 counts, classes, sha256 of every array, provenance
    STORE/train/00000/bytes/            zarr3, uint8[total]: all documents, concatenated
    STORE/train/00000/offsets/          zarr3, int64[n * k + 1]: where each document starts
    STORE/train/00000/labels/           zarr3, int32[n]

A record is one document, or k of them (`documents` in the manifest; a pair to compare has 2). A
part holds about 64 MB, is written by one process and never changes. So parts can be written in
parallel, an interrupted write continues with the missing parts, and parts can be copied whole.

The arrays are sharded zarr3, read and written by tensorstore: large files for object storage, small
chunks for random access, each with a crc32c, so that a damaged chunk raises an error. The manifest
is written last: a folder without one is an unfinished write. While it is written it also has its
writer's lease, `lease.json`.
"""

import bisect
import functools
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from absl import logging

from spectral_pod import project_files, storage
from spectral_pod.data import local_copies, store_lease, zarr_arrays
from spectral_pod.data.local_copies import LocalCopies
from spectral_pod.data.verification import Verification
from spectral_pod.errors import DataError

FORMAT = "spectral_pod.byte_store/2"
_RESERVED = ("manifest.json", store_lease.FILE, "unfinished")  # beside the folders of splits
# The keys of a store's files, with the notes of `parallel_write`.
_FILES = re.compile(
    rb"(manifest|lease)\.json|unfinished/[^/]+|[^/]+/\d{5,}/(bytes|offsets|labels)/.*"
)


class Record(NamedTuple):
    """One example: its bytes, or those of each of its documents, and its class index."""

    data: bytes | tuple[bytes, ...]
    label: int


class Split:
    """Random access to the records of one split.

    Attributes:
      documents: k, the number of documents per record.
      offsets: int64 [n * k + 1]; document j of record i is bytes offsets[i * k + j] to the next.
      labels: int32 [n].
      provenance: of the records of the whole store.
    """

    def __init__(self, store: "ByteStore", name: str):
        self.name = name
        self._store = store
        info = store.manifest["splits"][name]
        self.documents: int = store.manifest["documents"]
        self.provenance: Mapping[str, Any] = store.manifest["provenance"]
        parts = info["parts"]
        self._names = [f"{name}/{part['name']}" for part in parts]
        urls = [f"{store.path}/{part}" for part in self._names]
        # All parts at once: on object storage each takes a request or two of some milliseconds.
        opened = {
            array: [zarr_arrays.open_array(f"{url}/{array}", store.context) for url in urls]
            for array in zarr_arrays.DTYPES
        }
        starts = np.cumsum([0] + [part["bytes"] for part in parts])
        offsets = zarr_arrays.read_verified(
            opened["offsets"], urls, "offsets", parts, self.documents
        )
        offsets = [part[:-1] + start for part, start in zip(offsets, starts)]
        self.offsets: np.ndarray = np.concatenate([*offsets, starts[-1:]])
        labels = zarr_arrays.read_verified(opened["labels"], urls, "labels", parts, self.documents)
        self.labels: np.ndarray = np.concatenate([np.zeros(0, np.int32), *labels])
        self._starts: list[int] = starts.tolist()  # first byte of each part, and the total
        self._remote = zarr_arrays.results(opened["bytes"], [f"{url}/bytes" for url in urls])
        self._folders = [self._original(part) for part in range(len(parts))]  # of `_arrays`
        for held, url, facts in zip(self._remote, self._folders, parts, strict=True):
            zarr_arrays.check_form(held, url, "bytes", facts, self.documents)
        self._check_facts(info)
        self._arrays = list(self._remote)  # with the local copies of parts, where there are any
        self._sha256 = [part["sha256"]["bytes"] for part in parts]
        self._copied: set[int] = set()
        self._swapping = threading.Lock()  # of a part's array together with its folder
        self._requested: set[int] = set()  # parts whose content is verified, or will be
        if store.copies:
            for part in range(len(parts)):
                store.copies.request(self._copy(part), functools.partial(self._use_copy, part))

    def _check_facts(self, info: Mapping[str, Any]) -> None:
        """Checks what the manifest says about this split against its verified arrays."""
        num_classes = len(self._store.classes)
        if (
            (len(self), self._starts[-1]) != (info["records"], info["bytes"])
            or len(self.offsets) != len(self) * self.documents + 1
            or np.diff(self.offsets).max(initial=0) != info["longest"]
            or len(info["class_counts"]) != num_classes
            or _class_counts(self.labels, num_classes) != info["class_counts"]
        ):
            raise DataError(
                f"{self._store.path}/{self.name} does not hold what its manifest counts; delete "
                "the store"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """The number of bytes of each document, int64 [n * k]."""
        return np.diff(self.offsets)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Reads the documents at `indices` as uint8 arrays, all concurrently.

        Raises:
          DataError: a chunk is missing or fails its checksum; the message names the bytes.
        """
        first = np.asarray(indices, np.int64)
        starts, stops = self.offsets[first], self.offsets[first + 1]
        return self.read_ranges(list(zip(starts.tolist(), stops.tolist())))

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Reads bytes start to stop of the split, for each (start, stop), all concurrently.

        Raises:
          DataError: the bytes are damaged or missing, or storage does not answer for minutes.
        """
        pieces = [piece for start, stop in ranges for piece in self._pieces(start, stop)]
        self._verify({part for part, _ in pieces} - self._requested)
        if not pieces:
            return [np.empty(0, np.uint8) for _ in ranges]
        # Concatenated lazily, so that Python handles one result rather than hundreds.
        views = [self._arrays[part][where] for part, where in pieces]
        try:
            with ts.Batch() as batch:  # opens each file once and coalesces adjacent reads
                read = ts.concat(views, axis=0).read(batch=batch)
            data = read.result()
        except ValueError as error:
            if "UNAVAILABLE" in str(error):
                raise zarr_arrays.unreadable(self._store.path, error) from error
            # The error does not name the bytes, and a damaged local copy has a remote original.
            data = np.concatenate([self._read_piece(*piece) for piece in pieces])
        ends = np.cumsum([stop - start for start, stop in ranges])
        return np.split(data, ends[:-1])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The parts that contain these bytes, each with the slice within the part."""
        part = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            first, end = self._starts[part], self._starts[part + 1]
            yield part, slice(start - first, min(stop, end) - first)
            start, part = end, part + 1

    def _read_piece(self, part: int, where: slice) -> np.ndarray:
        try:
            try:
                return self._arrays[part][where].read().result()
            except ValueError as error:
                if part not in self._copied:
                    raise
                self._abandon_copy(part, error)
                return self._remote[part][where].read().result()
        except ValueError as error:
            what = f"{self._store.path}/{self._names[part]}, bytes {where.start} to {where.stop},"
            raise zarr_arrays.unreadable(what, error) from error

    def wait_verified(self) -> None:
        """Waits until the parts that were read are verified; raises if one differs."""
        self._store.verification.wait()

    def _verify(self, parts: set[int]) -> None:
        """Has the content of parts verified in the background, once each.

        Raises:
          DataError: the content of some part that was read before is not what its manifest says.
        """
        self._store.verification.raise_failure()
        copies = self._store.copies
        for part in parts:
            # A part that is about to be copied is read whole once, not twice.
            if not copies or copies.stopped or part in self._copied:
                self._requested.add(part)
                self._store.verification.request(functools.partial(self._verify_content, part))

    def _verify_content(self, part: int) -> None:
        """Verifies a part: its copy if there is one, and its original if that fails."""
        folder = self._folders[part]
        stopped = self._store.verification.stopped
        try:
            zarr_arrays.verify(folder, self._sha256[part], stopped)
        except ValueError as error:
            if folder != self._original(part):
                self._abandon_copy(part, error)
                self._verify_content(part)
                return
            fault = zarr_arrays.unreadable(f"{self._store.path}/{self._names[part]}", error)
            if "UNAVAILABLE" not in str(error) and isinstance(fault, DataError):
                raise fault from error
            self._requested.discard(part)  # its next read is going to tell
            logging.warning("A part that was read is not verified: %s", fault)

    def _original(self, part: int) -> str:
        return f"{self._store.path}/{self._names[part]}/bytes"

    def _copy(self, part: int) -> local_copies.Part:
        source = storage.kvstore(self._original(part))
        return local_copies.Part(self._store.digest, self._names[part], source)

    def _use_copy(self, part: int, folder: Path) -> None:
        try:
            copy = zarr_arrays.open_array(str(folder), self._store.context).result()
        except ValueError as error:
            self._drop_copy(part, error)
        else:
            self._copied.add(part)  # before the array is swapped in, as reads of it may fail
            with self._swapping:
                self._folders[part] = str(folder)
                self._arrays[part] = copy

    def _abandon_copy(self, part: int, error: ValueError) -> None:
        """Reads a part from its original again; nothing changes if another thread was faster."""
        with self._swapping:
            if self._arrays[part] is self._remote[part]:
                return
            self._arrays[part] = self._remote[part]
            self._folders[part] = self._original(part)
        self._drop_copy(part, error)

    def _drop_copy(self, part: int, error: ValueError) -> None:
        assert self._store.copies
        self._store.copies.drop(self._copy(part), error)


class ByteStore:
    """A complete store, opened for reading.

    Attributes:
      manifest: counts, classes, the sha256 of every array, and the provenance of the records.
      digest: sha256 of the manifest without its provenance; equal for stores of equal records.
    """

    def __init__(self, path: str, cache_bytes: int = 1 << 28, copies: LocalCopies | None = None):
        """Reads the manifest of the store at `path`, a folder or a gs:// URL.

        Args:
          path: where the store is.
          cache_bytes: limit on decoded chunks cached in memory.
          copies: local copies to make of the parts of a gs:// store and to read instead.

        Raises:
          DataError: there is no complete store at `path`, or it has another format.
        """
        self.path = path
        self.copies = copies if storage.is_remote(path) else None
        raw = storage.kvstore(path).read("manifest.json").result()
        if raw.state != "value":
            raise DataError(f"{path} holds no finished byte store (no manifest.json)")
        self.manifest = project_files.MANIFEST.parse(raw.value, f"{path}/manifest.json")
        data = {name: facts for name, facts in self.manifest.items() if name != "provenance"}
        self.digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        self.verification = Verification()
        self.context = ts.Context(storage.context(cache_bytes=cache_bytes))

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    def split(self, name: str) -> Split:
        """Opens one split; reads its offsets and labels into memory and verifies them.

        Raises:
          DataError: there is no such split, or it is damaged.
        """
        if name not in self.manifest["splits"]:
            available = sorted(self.manifest["splits"])
            raise DataError(f"{self.path} has splits {available}, not {name!r}")
        return Split(self, name)


def exists(path: str) -> bool:
    """Whether there is a complete store at `path`."""
    return storage.kvstore(path).read("manifest.json").result().state == "value"


def write(
    path: str,
    splits: Mapping[str, Iterable[Record]],
    *,
    classes: Sequence[str],
    provenance: Mapping[str, Any],
    documents: int = 1,
) -> None:
    """Writes all splits to a store at `path`, part by part, and then its manifest.

    Args:
      path: a folder or a gs:// URL; the remains of an unfinished write are replaced.
      splits: records by split name; each iterable is consumed once, in order, in constant memory.
      classes: the name of every class, in the order of labels.
      provenance: JSON-serializable facts about the origin of the records; may be completed while
        the splits are consumed.
      documents: the number of documents per record.

    Raises:
      DataError: a label has no class, or a record another number of documents; the message names
        the part and the record.
    """
    clear(path)
    parts = {
        name: [
            write_part(path, name, i, part, num_classes=len(classes), documents=documents)
            for i, part in enumerate(_parts(records))
        ]
        for name, records in splits.items()
    }
    finish(path, parts, classes=classes, provenance=provenance, documents=documents)


def clear(path: str) -> None:
    """Deletes all files of an earlier write at `path`.

    Raises:
      DataError: there are files of another kind, and nothing is deleted.
      TakenOverError: another process writes the store.
    """
    kvstore = storage.kvstore(path)
    for key in kvstore.list().result():
        if not _FILES.fullmatch(key):
            raise DataError(
                f"{path} holds {key.decode(errors='replace')!r}, which is of no byte store; give a "
                "new or an empty folder"
            )
    store_lease.check_of(path)()
    # All but the lease, beside which is lease.json.__lock while it is renewed.
    for others in ({"exclusive_max": store_lease.FILE}, {"inclusive_min": f"{store_lease.FILE}/"}):
        kvstore.delete_range(ts.KvStore.KeyRange(**others)).result()


def write_part(
    path: str,
    split: str,
    index: int,
    records: Sequence[Record],
    *,
    num_classes: int,
    documents: int = 1,
) -> dict[str, Any]:
    """Writes one part of a split and returns its entry for the manifest.

    Parts are ordered by index; indices may have gaps.

    Raises:
      DataError: a label has no class, a record another number of documents, or the split a name
        that it cannot have.
      TakenOverError: another process writes the store.
    """
    _check_split(path, split)
    name = f"{index:05}"
    url = f"{path}/{split}/{name}"
    data: list[bytes] = []
    for i, record in enumerate(records):
        if not 0 <= record.label < num_classes:
            raise DataError(
                f"{url}: record {i} has label {record.label}, outside 0..{num_classes - 1}"
            )
        contents = (record.data,) if isinstance(record.data, bytes) else record.data
        if len(contents) != documents:
            raise DataError(f"{url}: record {i} has {len(contents)} documents, not {documents}")
        data += contents
    arrays: dict[str, np.ndarray] = {
        "bytes": np.frombuffer(b"".join(data), np.uint8),
        "offsets": np.cumsum([0, *map(len, data)], dtype=np.int64),
        "labels": np.asarray([record.label for record in records], np.int32),
    }
    store_lease.check_of(path)()
    writes = [
        zarr_arrays.create_array(f"{url}/{name}", name, values) for name, values in arrays.items()
    ]
    for write in writes:
        write.result()
    return {
        "name": name,
        "records": len(records),
        "bytes": len(arrays["bytes"]),
        "longest": max(map(len, data), default=0),
        "class_counts": _class_counts(arrays["labels"], num_classes),
        "sha256": {name: zarr_arrays.sha256(values) for name, values in arrays.items()},
    }


def finish(
    path: str,
    parts: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    classes: Sequence[str],
    provenance: Mapping[str, Any],
    documents: int = 1,
) -> None:
    """Completes a store by its manifest, given the results of `write_part` by split, in order.

    Raises:
      DataError: a split has a name that it cannot have.
      TakenOverError: another process writes the store.
    """
    for split in parts:
        _check_split(path, split)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "classes": list(classes),
        "documents": documents,
        "splits": {
            name: {
                "records": sum(part["records"] for part in split_parts),
                "bytes": sum(part["bytes"] for part in split_parts),
                "longest": max((part["longest"] for part in split_parts), default=0),
                "class_counts": np.sum(
                    [part["class_counts"] for part in split_parts] or [[0] * len(classes)], axis=0
                ).tolist(),
                "parts": [
                    {key: part[key] for key in ("name", "records", "bytes", "sha256")}
                    for part in split_parts
                ],
            }
            for name, split_parts in parts.items()
        },
        "provenance": dict(provenance),
    }
    encoded = project_files.MANIFEST.encode(manifest)
    store_lease.check_of(path)()
    storage.kvstore(path).write("manifest.json", encoded).result()
    counts = {name: info["records"] for name, info in manifest["splits"].items()}
    logging.info("Wrote byte store %s: records %s", path, counts)


def verify(path: str, on_part: Callable[[str], None] = lambda part: None) -> None:
    """Reads the whole store, part by part, and compares every array with the manifest's sha256.

    Args:
      path: where the store is.
      on_part: called with the URL of each part that is intact.

    Raises:
      DataError: an array differs or cannot be read; the message names the first.
    """
    manifest = ByteStore(path).manifest
    for name, info in manifest["splits"].items():
        for facts in info["parts"]:
            url = f"{path}/{name}/{facts['name']}"
            for array in zarr_arrays.DTYPES:
                opened = zarr_arrays.open_array(f"{url}/{array}", storage.uncached())
                zarr_arrays.read_verified([opened], [url], array, [facts], manifest["documents"])
            on_part(url)


def _check_split(path: str, split: str) -> None:
    if split in _RESERVED or not project_files.is_name(split):
        raise DataError(
            f"{path}: no split can be named {split!r}; take a name of at most 200 characters, "
            f"without '/' and '\\', that does not start with '.' and is none of "
            f"{', '.join(_RESERVED)}"
        )


def _parts(records: Iterable[Record]) -> Iterator[list[Record]]:
    part, filled = list[Record](), 0
    for record in records:
        part.append(record)
        contents = (record.data,) if isinstance(record.data, bytes) else record.data
        filled += sum(map(len, contents))
        if filled >= zarr_arrays.PART_BYTES:
            yield part
            part, filled = [], 0
    if part:
        yield part


def _class_counts(labels: np.ndarray, num_classes: int) -> list[int]:
    counts: list[int] = np.bincount(labels, minlength=num_classes).tolist()
    return counts
