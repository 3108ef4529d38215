"""Readers of columnar files: the fields of every row of parquet and npz files."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from spectral_pod.data import text

_ROWS = 256  # of a parquet file at once
# Raised by damaged files, beside OSError: by PyArrow, NumPy and zipfile.
ERRORS = (pa.ArrowException, zipfile.BadZipFile, ValueError, TypeError, KeyError, EOFError,
          NotImplementedError, RuntimeError, MemoryError, OverflowError, SyntaxError)  # fmt: skip


class Unreadable(NamedTuple):
    """A value that is not read, of this type in the file."""

    type: str


def parquet(stream: IO[bytes]) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    """The names of the columns of a parquet file, and its rows; one part is in memory at a time.

    Texts are bytes, lists of numbers arrays, and timestamps texts. Checksums of pages are verified.

    Raises:
      one of `ERRORS` or OSError: the file is damaged; also on reading the rows.
    """
    table = pa.parquet.ParquetFile(stream, page_checksum_verification=True)
    names = table.schema_arrow.names

    def rows() -> Iterator[Mapping[str, Any]]:
        for batch in table.iter_batches(_ROWS):
            for values in zip(*map(_values, batch.columns), strict=True):
                yield dict(zip(names, values, strict=True))

    return names, rows()


def _values(column: Any) -> list[Any]:
    kind = column.type
    if isinstance(kind, pa.JsonType | pa.FixedShapeTensorType):
        return _values(column.storage)
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    try:
        if pa.types.is_timestamp(kind):
            column = column.cast(pa.string())  # a datetime could lose nanoseconds
        if any(is_text(column.type) for is_text in _TEXTS):
            column = column.cast(pa.large_binary())
        if any(is_list(kind) for is_list in _LISTS) and (
            pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)
        ):
            return [_array(scalar) for scalar in column]
        return column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):
        return [Unreadable(str(kind))] * len(column)


_TEXTS = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
_LISTS = (
    pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list,
    pa.types.is_list_view, pa.types.is_large_list_view,
)  # fmt: skip


def _array(scalar: Any) -> Any:
    """A list of numbers as an array; None for null, and a list if one of its numbers is null."""
    if not scalar.is_valid:
        return None
    values = scalar.values
    return values.to_pylist() if values.null_count else values.to_numpy(zero_copy_only=False)


def npz(stream: IO[bytes]) -> dict[str, np.ndarray]:
    """The arrays of an npz file.

    Raises:
      one of `ERRORS` or OSError: the file is damaged, or is no archive of arrays of numbers and
        texts, or would not fit into memory.
    """
    loaded = np.load(stream, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        raise ValueError("a single array")
    size = sum(entry.file_size for entry in loaded.zip.infolist())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory / 2:
        raise ValueError(f"its arrays take {size:,} bytes of this host's {memory:,}")
    return dict(loaded)


def element(value: Any) -> Any:
    """An entry of an array of an npz file as a field: texts are bytes, numbers Python's."""
    value = value if np.ndim(value) else value.item()
    return text.encode(value) if isinstance(value, str) else value
