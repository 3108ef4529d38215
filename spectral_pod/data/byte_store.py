"""The byte store: labelled records of any length, on disk or in Google Cloud Storage.

A store is a folder with one sub-folder a split and a manifest:

    STORE/manifest.json           counts, classes, sha256 of every array, provenance
    STORE/train/bytes/            zarr3, uint8[total]: all records, end to end
    STORE/train/offsets/          zarr3, int64[n + 1]: record i is bytes[offsets[i]:offsets[i + 1]]
    STORE/train/labels/           zarr3, int32[n]

The arrays are sharded zarr3, read and written by tensorstore: large files for object storage, small
chunks for random access, each chunk with a crc32c, so a damaged chunk is an error and never data.
The manifest is written last: a folder without one is an unfinished write and is written anew.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from absl import logging

from spectral_pod.errors import DataError

FORMAT = "spectral_pod.byte_store/1"
_SHARD_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 16
_DTYPES = {"bytes": "uint8", "offsets": "int64", "labels": "int32"}


class Record(NamedTuple):
    """One example: its bytes and the index of its class."""

    data: bytes
    label: int


class Split:
    """Random access to the records of one split."""

    def __init__(self, url: str, name: str, info: Mapping[str, Any], context: ts.Context):
        self.name = name
        self._url = f"{url}/{name}"
        self._bytes = _open(f"{self._url}/bytes", context)
        # int64[n + 1]: record i is bytes offsets[i] to offsets[i + 1]
        self.offsets: np.ndarray = self._load("offsets", info, context)
        self.labels: np.ndarray = self._load("labels", info, context)
        if len(self) != info["records"] or self._bytes.shape != (info["bytes"],):
            raise DataError(f"{self._url} does not hold what its manifest counts; delete the store")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """int64[n]: bytes in each record."""
        return np.diff(self.offsets)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The records at `indices` as uint8 arrays, in one burst of concurrent reads.

        Raises:
          DataError: a chunk is missing or fails its checksum; names the bytes.
        """
        return self.read_ranges([(self.offsets[i], self.offsets[i + 1]) for i in indices])

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """As `read`: bytes start to stop of the split, for each (start, stop)."""
        futures = [self._bytes[int(start) : int(stop)].read() for start, stop in ranges]
        try:
            return [future.result() for future in futures]
        except ValueError as error:
            places = ", ".join(f"{start}..{stop}" for start, stop in sorted(ranges)[:8])
            raise DataError(
                f"{self._url}/bytes is damaged near bytes {places}...; "
                f"delete the store to have it written again ({error})"
            ) from error

    def _load(self, array: str, info: Mapping[str, Any], context: ts.Context) -> np.ndarray:
        values = _open(f"{self._url}/{array}", context).read().result()
        if _digest(values) != info["sha256"][array]:
            raise DataError(f"{self._url}/{array} differs from its manifest; delete the store")
        return values


class ByteStore:
    """A finished store, opened for reading."""

    def __init__(self, path: str, cache_bytes: int = 1 << 28):
        """Reads the manifest of the store at `path`, a folder or a gs:// URL.

        `cache_bytes` bounds the decoded chunks that are kept in memory.

        Raises:
          DataError: there is no finished store, or it is of another format.
        """
        self.path = path
        raw = _kvstore(path).read("manifest.json").result()
        if raw.state != "value":
            raise DataError(f"{path} holds no finished byte store (no manifest.json)")
        self.digest = hashlib.sha256(raw.value).hexdigest()
        self.manifest: dict[str, Any] = json.loads(raw.value)
        if self.manifest.get("format") != FORMAT:
            raise DataError(f"{path} has format {self.manifest.get('format')!r}, not {FORMAT!r}")
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    def split(self, name: str) -> Split:
        """Opens one split; its offsets and labels are held in memory and checked."""
        splits = self.manifest["splits"]
        if name not in splits:
            raise DataError(f"{self.path} has splits {sorted(splits)}, not {name!r}")
        return Split(self.path, name, splits[name], self._context)


def exists(path: str) -> bool:
    """Whether a finished store is at `path`."""
    return _kvstore(path).read("manifest.json").result().state == "value"


def write(
    path: str,
    splits: Mapping[str, Iterable[Record]],
    *,
    classes: Sequence[str],
    provenance: Mapping[str, Any],
) -> None:
    """Streams every split to the store at `path` and then writes its manifest.

    Args:
      path: a folder or a gs:// URL; what an unfinished write left there is replaced.
      splits: records by split name; each iterable is consumed once, in order, in constant memory.
      classes: the name of every class, by label.
      provenance: JSON-able facts about where the records came from.

    Raises:
      DataError: a label has no class; names the split and the record.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "schema": _DTYPES,
        "classes": list(classes),
        "splits": {
            name: _write_split(f"{path}/{name}", records, len(classes))
            for name, records in splits.items()
        },
        # Provenance may be completed while the splits are consumed, so it is read last.
        "provenance": dict(provenance),
    }
    encoded = json.dumps(manifest, indent=1, sort_keys=True).encode()
    _kvstore(path).write("manifest.json", encoded).result()
    counts = {name: info["records"] for name, info in manifest["splits"].items()}
    logging.info("Wrote byte store %s: records %s", path, counts)


def verify(path: str) -> None:
    """Reads the whole store and compares every array with the manifest's sha256.

    Raises:
      DataError: names the first array that differs or cannot be read.
    """
    store = ByteStore(path)
    for name, info in store.manifest["splits"].items():
        for array, expected in info["sha256"].items():
            url = f"{path}/{name}/{array}"
            handle, digest = _open(url, ts.Context()), hashlib.sha256()
            step = _SHARD_BYTES // handle.dtype.numpy_dtype.itemsize
            try:
                for start in range(0, handle.shape[0], step):
                    part = handle[start : min(start + step, handle.shape[0])].read().result()
                    digest.update(part.tobytes())
            except ValueError as error:
                raise DataError(f"{url} cannot be read whole: {error}") from error
            if digest.hexdigest() != expected:
                raise DataError(f"{url} differs from its manifest; delete the store")


def _write_split(url: str, records: Iterable[Record], num_classes: int) -> dict[str, Any]:
    stream, digest = _create(f"{url}/bytes", "bytes"), hashlib.sha256()
    buffer, written = bytearray(), 0
    offsets, labels = [0], []
    for i, (data, label) in enumerate(records):
        if not 0 <= label < num_classes:
            raise DataError(f"{url}: record {i} has label {label}, outside 0..{num_classes - 1}")
        buffer += data
        offsets.append(offsets[-1] + len(data))
        labels.append(label)
        while len(buffer) >= _SHARD_BYTES:  # whole shards only: each file is written once
            written = _append(stream, buffer[:_SHARD_BYTES], written, digest)
            del buffer[:_SHARD_BYTES]
    written = _append(stream, buffer, written, digest)
    arrays: dict[str, np.ndarray] = {
        "offsets": np.asarray(offsets, np.int64),
        "labels": np.asarray(labels, np.int32),
    }
    for name, values in arrays.items():
        handle = _create(f"{url}/{name}", name)
        handle.resize(exclusive_max=[len(values)]).result().write(values).result()
    return {
        "records": len(labels),
        "bytes": written,
        "longest_record": int(np.diff(arrays["offsets"]).max(initial=0)),
        "class_counts": np.bincount(arrays["labels"], minlength=num_classes).tolist(),
        "sha256": {"bytes": digest.hexdigest()} | {n: _digest(v) for n, v in arrays.items()},
    }


def _append(stream: Any, part: bytearray, written: int, digest: Any) -> int:
    stop = written + len(part)
    digest.update(part)
    handle = stream.resize(exclusive_max=[stop]).result()
    handle[written:stop].write(np.frombuffer(part, np.uint8)).result()
    return stop


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _kvstore_spec(url: str) -> dict[str, Any]:
    if url.startswith("gs://"):
        bucket, _, path = url.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    return {"driver": "file", "path": f"{os.path.abspath(url)}/"}


def _kvstore(url: str) -> ts.KvStore:
    return ts.KvStore.open(_kvstore_spec(url)).result()


def _open(url: str, context: ts.Context) -> Any:
    try:
        # By default a missing chunk reads as zeros: here a lost file is an error.
        spec = {
            "driver": "zarr3",
            "kvstore": _kvstore_spec(url),
            "fill_missing_data_reads": False,
        }
        # Stores never change once written: metadata and chunks need no revalidation.
        return ts.open(spec, read=True, context=context, recheck_cached=False).result()
    except ValueError as error:
        raise DataError(f"{url} cannot be opened; delete the store ({error})") from error


def _create(url: str, array: str) -> Any:
    dtype = np.dtype(_DTYPES[array])
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc32c = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [_CHUNK_BYTES // dtype.itemsize],
        "codecs": [little, {"name": "zstd", "configuration": {"level": 1}}, crc32c],
        "index_codecs": [little, crc32c],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore_spec(url),
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [0],
            "data_type": _DTYPES[array],
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [_SHARD_BYTES // dtype.itemsize]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }
    return ts.open(spec, create=True, delete_existing=True).result()
