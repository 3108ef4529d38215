"""Records in files, whatever the format: JSON lines, CSV, Parquet, FASTA, ...

    for path in formats.files("reviews/*.jsonl.xz"):
        for row in formats.rows(path):
            ...  # a Row, or a Fault where there is a record that cannot be read

| format  | files                        | a record is      | its fields                           |
| ------- | ---------------------------- | ---------------- | ------------------------------------ |
| jsonl   | .jsonl .ndjson               | a line           | those of the object                  |
| csv     | .csv                         | a row (RFC 4180) | those of the header                  |
| tsv     | .tsv                         | a line (IANA)    | those of the header; no quotes       |
| parquet | .parquet                     | a row            | the columns                          |
| npz     | .npz                         | an index         | the arrays, of one length            |
| fasta   | .fasta .fa .fna .ffn .faa    | a sequence       | id, description, sequence            |
| fastq   | .fastq .fq                   | four lines       | id, description, sequence, quality   |
| text    | .txt                         | a line           | text                                 |
| whole   | any; must be asked for       | a file           | bytes                                |

The last four also have `folder`, the name of the folder that the file is in, and `name`, that of
the file without its suffixes. All but parquet, npz and whole may be compressed: .gz .bz2 .xz .zst.

Text is bytes and stays what it was, also where it is no UTF-8. Memory holds one record, of
parquet files a part of a row group, of npz files everything. Nothing is left out unsaid; a blank
line holds no record of jsonl, csv, tsv, fasta or fastq, and is an empty one of text.
"""

import codecs
import collections
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from spectral_pod import storage
from spectral_pod.data import compression
from spectral_pod.errors import DataError

MAX_BYTES = 256_000_000  # of a line, a sequence or a whole file; more is a fault
_PARQUET_ROWS = 256
_BLOCK_BYTES = 1 << 20
_ESCAPING = "utf-8", "surrogateescape"


class Row(NamedTuple):
    """One record: where it is, such as 'reviews.jsonl.xz:17' or 'x.npz[3]', and its fields.

    Lines count from 1, indices from 0. Text is bytes, a list of numbers from parquet an array;
    anything else is what the library of the format makes of it.
    """

    place: str
    fields: Mapping[str, Any]


class Fault(NamedTuple):
    """A record that cannot be read, and why: the kind of fault, then ': ' and what is special."""

    place: str
    reason: str


def files(source: str) -> list[str]:
    """The files of a source, sorted: a file, a folder with all below it, or a glob; also on gs://.

    Paths are absolute. Folders are read without hidden files and folders.

    Raises:
      DataError: there is no such file.
    """
    system, path = _file_system(source)
    try:
        if system.isfile(path):
            found = [path]
        elif system.isdir(path):
            found = [p for p in system.find(path) if not _is_hidden(posixpath.relpath(p, path))]
        else:
            found = [p for p in system.glob(path) if system.isfile(p)]
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be listed: {error}") from error
    if not found:
        raise DataError(f"{source}: there is no such file, folder with files, or glob that matches")
    return sorted("gs://" + p if storage.is_remote(source) else p for p in found)


def open_file(path: str) -> IO[bytes]:
    """A file on disk or gs://, for reading.

    Raises:
      DataError: it cannot be opened.
    """
    system, path_there = _file_system(path)
    try:
        if not storage.is_remote(path):
            return open(path_there, "rb", _BLOCK_BYTES)
        # fsspec's files read lines slowly, and of any length.
        return io.BufferedReader(system.open(path_there, "rb"), 8 * _BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error}") from error


def size_and_time(path: str) -> tuple[int, str]:
    """Bytes in a file, and when it was modified."""
    system, path = _file_system(path)
    return system.size(path), system.modified(path).isoformat()


def sha256(path: str) -> str:
    """Of the bytes of a file, in constant memory.

    Raises:
      DataError: it cannot be opened.
    """
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def rows(
    file: str,
    *,
    format: str = "auto",
    columns: Sequence[str] = (),
    on_position: Callable[[int], None] = lambda position: None,
) -> Iterator[Row | Fault]:
    """The records of a file, in order.

    Args:
      file: a path or a gs:// URL, as `files` gives them.
      format: a name in the table above; 'auto' goes by the suffix.
      columns: the names of the columns of csv and tsv files that have no header.
      on_position: is told, after every record, how many bytes of the file have been read.

    Raises:
      DataError: the suffix is unknown, the file is damaged or cut short (names the last good
        record), or its fields cannot be told apart.
    """
    compressed, suffix = _suffixes(file)
    if format == "auto":
        if suffix not in _SUFFIXES:
            raise DataError(
                f"{file}: the suffix {suffix!r} says no format; known are {' '.join(_SUFFIXES)}, "
                f"each also compressed ({' '.join(compression.SUFFIXES)}); or name the format: "
                f"{', '.join(_READERS)}"
            )
        format = _SUFFIXES[suffix]
    if format not in _READERS:
        raise DataError(f"format {format!r} is unknown; there are auto, {', '.join(_READERS)}")
    if compressed and format in _SEEKING:
        raise DataError(f"{file}: {format} has compression of its own; decompress the file first")
    if columns and format not in _TABLES:
        raise DataError(f"{file}: columns are named for {' and '.join(_TABLES)}, not for {format}")
    read = _READERS[format]
    last = "its start"
    try:
        with open_file(file) as raw:
            decompress = compressed and format != "whole"
            stream = compression.decompressed(raw, compressed) if decompress else raw
            for row in read(file, stream, columns) if columns else read(file, stream):
                yield row
                on_position(raw.tell())
                if isinstance(row, Row):
                    last = row.place
    except _DAMAGES as error:
        raise DataError(
            f"{file} is damaged or cut short after {last} ({type(error).__name__}: {error})"
        ) from error


def encode(text: str) -> bytes:
    """A decoded text as the bytes that it was: UTF-8, and what was no UTF-8 escaped as surrogates.

    A lone surrogate that escapes no byte, which JSON can spell, is three bytes as in CESU-8.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        escaped = rb"\xed[\xb2\xb3][\x80-\xbf]"  # U+DC80 to U+DCFF, each for one byte
        return re.sub(
            escaped,
            lambda found: found[0].decode("utf-8", "surrogatepass").encode(*_ESCAPING),
            text.encode("utf-8", "surrogatepass"),
        )


# ---- readers: (file, stream) -> rows and faults


def _jsonl(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    for number, line in _lines(stream):
        place = f"{file}:{number}"
        if line is None:
            yield _too_long(place)
        elif line and not line.isspace():
            try:
                text = line.decode(*_ESCAPING)
                value = json.loads(text, strict=False, object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                yield Fault(place, f"invalid JSON: {error}")
                continue
            if isinstance(value, dict):
                yield Row(
                    place, {k: encode(v) if isinstance(v, str) else v for k, v in value.items()}
                )
            else:
                yield Fault(place, f"no JSON object: a {type(value).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return values


def _csv(
    file: str,
    stream: IO[bytes],
    columns: Sequence[str] = (),
    *,
    delimiter: str = ",",
    quoting: Any = csv.QUOTE_MINIMAL,
) -> Iterator[Row | Fault]:
    number = 0  # of the last line read; that of `csv` omits lines that cannot be decoded

    def decoded(numbered: tuple[int, bytes | None]) -> str:
        nonlocal number
        number, line = numbered
        if line is None:
            raise csv.Error(f"a line of more than {MAX_BYTES:,} bytes")
        return line.decode(*_ESCAPING)

    # A limit for the whole process: without it fields end at 131,072 characters.
    csv.field_size_limit(MAX_BYTES)
    # `map` goes on after an exception, and so does the reader, with the next line.
    lines = map(decoded, _lines(stream))
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        place = f"{file}:{number + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if not columns:
                raise DataError(f"{place}: the header cannot be read: {error}") from error
            yield Fault(place, f"malformed row: {error}")
            continue
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if not columns:
            columns = cells
            _check_distinct(place, columns)
        elif len(cells) != len(columns):
            yield Fault(place, f"wrong columns: {len(cells)}, not {len(columns)}")
        else:
            yield Row(place, dict(zip(columns, map(encode, cells))))


def _parquet(file: str, stream: IO[bytes]) -> Iterator[Row]:
    table = pa.parquet.ParquetFile(stream)
    names = table.schema_arrow.names
    _check_distinct(file, names)
    number = 0
    for batch in table.iter_batches(_PARQUET_ROWS):
        for values in zip(*map(_values, batch.columns)):
            yield Row(f"{file}[{number}]", dict(zip(names, values)))
            number += 1


def _values(column: Any) -> list[Any]:
    """A column of a parquet file as Python values; lists of numbers are arrays."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.string())  # as datetime it might lose nanoseconds
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    kind = column.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and (
        pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)
    ):
        return [v.values.to_numpy(zero_copy_only=False) if v.is_valid else None for v in column]
    return column.to_pylist()


def _npz(file: str, stream: IO[bytes]) -> Iterator[Row]:
    try:
        loaded = np.load(stream, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("a single array")
        arrays = dict(loaded)
    except ValueError as error:  # also arrays of objects
        raise DataError(f"{file} is no .npz file of arrays of numbers or texts: {error}") from error
    lengths = {array.shape[:1] for array in arrays.values()}
    if len(lengths) != 1 or () in lengths:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise DataError(f"{file}: the arrays need an equal first axis; there are {shapes}")
    for i in range(len(next(iter(arrays.values())))):
        yield Row(f"{file}[{i}]", {name: _element(array[i]) for name, array in arrays.items()})


def _element(value: Any) -> Any:
    value = value if np.ndim(value) else value.item()
    return encode(value) if isinstance(value, str) else value


def _fasta(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    place, header, parts, room = "", None, list[bytes](), 0
    for number, line in itertools.chain(_lines(stream), [(0, b">")]):
        if line is not None and line.startswith(b">"):
            if header is not None:
                fields = _described(header) | {"sequence": b"".join(parts)}
                yield Row(place, fields | _names(file)) if room >= 0 else _too_long(place)
            place, header, parts, room = f"{file}:{number}", line[1:], [], MAX_BYTES
        elif header is None:
            if line is None or line.split():
                yield Fault(f"{file}:{number}", "no FASTA: a line before the first that starts '>'")
        else:
            letters = b"".join(line.split()) if line is not None else b""
            room = room - len(letters) if line is not None and room >= 0 else -1
            if room >= 0:
                parts.append(letters)


def _fastq(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    lines = _lines(stream)
    window: collections.deque[tuple[int, bytes]] = collections.deque()
    lost = False
    while True:
        for number, line in itertools.islice(lines, 4 - len(window)):
            # A line too long becomes one that fits nowhere.
            window.append((number, b"?" if line is None else line.rstrip(b"\r\n")))
        if not window:
            return
        number, header = window[0]
        record = [line for _, line in window]
        if not header:
            window.popleft()
        elif (
            len(record) == 4
            and header.startswith(b"@")
            and record[2].startswith(b"+")
            and len(record[1]) == len(record[3])
        ):
            fields = _described(header[1:]) | {"sequence": record[1], "quality": record[3]}
            yield Row(f"{file}:{number}", fields | _names(file))
            window.clear()
            lost = False
        else:
            if not lost:  # one fault up to where the next record starts
                yield Fault(
                    f"{file}:{number}", "no FASTQ: not '@', a sequence, '+', qualities as many"
                )
            window.popleft()
            lost = True


def _described(header: bytes) -> dict[str, bytes]:
    words = header.strip().split(None, 1)
    return dict(zip(("id", "description"), (*words, b"", b"")))


def _text(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    names = _names(file)
    for number, line in _lines(stream):
        place = f"{file}:{number}"
        if line is None:
            yield _too_long(place)
        else:
            text = line.removesuffix(b"\n").removesuffix(b"\r")
            yield Row(place, {"text": text, **names})


def _whole(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        yield _too_long(file)
    else:
        yield Row(file, {"bytes": content, **_names(file)})


_READERS: dict[str, Callable[..., Iterator[Row | Fault]]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tsv": functools.partial(_csv, delimiter="\t", quoting=csv.QUOTE_NONE),
    "parquet": _parquet,
    "npz": _npz,
    "fasta": _fasta,
    "fastq": _fastq,
    "text": _text,
    "whole": _whole,
}
_SEEKING = ("parquet", "npz")
_TABLES = ("csv", "tsv")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".npz": "npz", ".fasta": "fasta", ".fa": "fasta", ".fna": "fasta", ".ffn": "fasta",
    ".faa": "fasta", ".fastq": "fastq", ".fq": "fastq", ".txt": "text",
}  # fmt: skip
_DAMAGES = (*compression.DAMAGES, OSError, zipfile.BadZipFile, pa.ArrowException)


# ---- what they share


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their ends, counted from 1; None stands for one of more than MAX_BYTES."""
    for number in itertools.count(1):
        line = stream.readline(MAX_BYTES + 1)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line:
            return
        if len(line) <= MAX_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_BLOCK_BYTES)
        yield number, None


def _too_long(place: str) -> Fault:
    return Fault(place, f"too long: more than {MAX_BYTES:,} bytes")


def _check_distinct(place: str, columns: Sequence[str]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{place}: columns of one name, {', '.join(map(repr, twice))}; rename them")


def _names(file: str) -> dict[str, bytes]:
    folder, name = posixpath.split(file)
    compressed, suffix = _suffixes(name)
    stem = name[: len(name) - len(compressed)]
    stem = stem[: len(stem) - len(suffix)] if suffix in _SUFFIXES else stem
    return {"folder": os.fsencode(posixpath.basename(folder)), "name": os.fsencode(stem)}


def _suffixes(file: str) -> tuple[str, str]:
    """The suffix of a compression, or '', and that before it, in lower case."""
    rest, suffix = posixpath.splitext(file.lower())
    return (suffix, posixpath.splitext(rest)[1]) if suffix in compression.SUFFIXES else ("", suffix)


def _file_system(path: str) -> tuple[Any, str]:
    if storage.is_remote(path):
        return fsspec.filesystem("gs"), path.removeprefix("gs://")
    return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(path))


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))
