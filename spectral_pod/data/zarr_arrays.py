"""The arrays of byte stores: sharded zarr3, by tensorstore.

Large files suit object storage, and small chunks random access. Each chunk has a crc32c, so that a
damaged one raises an error.
"""

import contextlib
import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from spectral_pod import errors, storage
from spectral_pod.errors import DataError, UserError

PART_BYTES = 1 << 26  # the record that reaches this size ends a part
DTYPES = {"bytes": "uint8", "offsets": "int64", "labels": "int32"}
_CHUNK_BYTES = 1 << 15
_POLL_SECONDS = 0.1


def _metadata(array: str, size: int) -> dict[str, Any]:
    dtype = np.dtype(DTYPES[array])
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc32c = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [_CHUNK_BYTES // dtype.itemsize],
        "codecs": [little, {"name": "zstd", "configuration": {"level": 1}}, crc32c],
        "index_codecs": [little, crc32c],
    }
    shard = PART_BYTES // dtype.itemsize
    return {
        "shape": [size],
        "data_type": DTYPES[array],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def open_array(url: str, context: ts.Context) -> Any:
    """A future of an array to read."""
    # By default a missing chunk reads as zeros; here a lost file must be an error.
    kvstore = storage.kvstore_spec(url)
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
    # Stores never change once written, so metadata and chunks need no revalidation.
    return ts.open(spec, read=True, context=context, recheck_cached=False)


def create_array(url: str, array: str, values: np.ndarray) -> Any:
    """A future of the completed write of an array."""
    spec = {
        "driver": "zarr3",
        "kvstore": storage.kvstore_spec(url),
        "store_data_equal_to_fill_value": True,
        "metadata": _metadata(array, len(values)),
    }
    return _created(spec).write(values)


def _created(spec: dict[str, Any], attempts: int = 5) -> ts.TensorStore:
    """A new array in place of what is there.

    Where the answer to a request is lost, tensorstore repeats it, finds the metadata that it has
    itself written, and says that they exist.
    """
    while True:
        attempts -= 1
        try:
            opened = ts.open(spec, create=True, delete_existing=True, context=storage.uncached())
            return opened.result()
        except ValueError as error:
            if "ALREADY_EXISTS" not in str(error) or not attempts:
                raise


def results(futures: Sequence[Any], urls: Sequence[str]) -> list[Any]:
    """The results of the futures of arrays at `urls`; a failure raises a `UserError`."""
    found = []
    for future, url in zip(futures, urls, strict=True):
        try:
            found.append(future.result())
        except ValueError as error:
            raise unreadable(url, error) from error
    return found


def unreadable(what: str, error: ValueError) -> UserError:
    """The error to raise where tensorstore has raised `error` about the array or bytes `what`."""
    if fault := errors.storage_error(error, what):
        return fault
    if "UNAVAILABLE" in str(error):
        return DataError(f"{what} cannot be read: {error}")
    return DataError(f"{what} is damaged; delete the store to have it written again ({error})")


def read_verified(
    opened: Sequence[Any],
    urls: Sequence[str],
    array: str,
    facts: Sequence[Mapping[str, Any]],
    documents: int,
) -> list[np.ndarray]:
    """The values of one array of each part, verified against the manifest.

    Args:
      opened: futures of the arrays.
      urls: of the parts.
      array: its name.
      facts: the manifest's, of each part.
      documents: per record.
    """
    array_urls = [f"{url}/{array}" for url in urls]
    arrays = results(opened, array_urls)
    for held, url, fact in zip(arrays, array_urls, facts, strict=True):
        check_form(held, url, array, fact, documents)
    values = results([held.read() for held in arrays], array_urls)
    for part, url, fact in zip(values, array_urls, facts, strict=True):
        if sha256(part) != fact["sha256"][array]:
            raise DataError(f"{url} differs from its manifest; delete the store")
    return values


def check_form(held: Any, url: str, array: str, fact: Mapping[str, Any], documents: int) -> None:
    """Checks the shape and the dtype of an opened array against the manifest.

    Raises:
      DataError: they differ.
    """
    sizes = {
        "bytes": fact["bytes"],
        "offsets": fact["records"] * documents + 1,
        "labels": fact["records"],
    }
    if held.shape != (sizes[array],) or held.dtype.name != DTYPES[array]:
        raise DataError(
            f"{url} is {held.dtype.name}{list(held.shape)}, and its manifest says "
            f"{DTYPES[array]}[{sizes[array]}]; delete the store to have it written again"
        )


def verify(url: str, expected: str, stopped: threading.Event) -> None:
    """Compares the content of an array with its sha256, unless the process ends first.

    Raises:
      ValueError: it differs, or cannot be read.
    """
    reading = open_array(url, storage.uncached()).result().read()
    while not stopped.is_set():
        with contextlib.suppress(TimeoutError):
            if sha256(reading.result(timeout=_POLL_SECONDS)) == expected:
                return
            raise ValueError("its content differs from its sha256 in the manifest")


def sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
