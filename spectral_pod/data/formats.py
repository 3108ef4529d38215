"""Readers of records in files of many formats: JSON lines, CSV, Parquet, FASTA, ...

    for path in formats.files("reviews/*.jsonl.xz"):
        for row in formats.rows(path):
            ...  # a Row, or a Fault for a record that cannot be read

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
| whole   | any, on request only         | a file           | bytes                                |
| document | any, on request only        | a file, any size | text                                 |

The last five formats also have the fields `folder`, the name of the file's folder, and `name`, the
file's name without suffixes. All but parquet, npz and whole may be compressed: .gz .bgz .bz2 .xz
.zst. A document, which otherwise may have any size, then expands to 256 MB at most.

Text is kept as the original bytes, even if it is not valid UTF-8; UTF-16 and UTF-32 with a byte
order mark become UTF-8. One record is in memory at a time; for parquet a part of a row group, for
npz everything. No record is skipped silently. Blank lines are ignored in jsonl, csv, tsv, fasta and
fastq; in text they are empty records.
"""

import collections
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import fsspec

from spectral_pod import storage
from spectral_pod.data import columnar, compression, listing, text
from spectral_pod.data.text import encode
from spectral_pod.errors import DataError

MAX_BYTES = 256_000_000  # limit for a line, a sequence or a whole file; beyond it is a fault
MAX_COMMAS = 10_000_000  # limit for a line of JSON, whose smallest values take some 70 bytes
# Limit for a row of CSV of several lines; an unclosed quote is noticed there at the latest.
MAX_OPEN_BYTES = 64_000_000
_BLOCK_BYTES = 1 << 20


class Row(NamedTuple):
    """One record: its position, such as 'reviews.jsonl.xz:17' or 'x.npz[3]', and its fields.

    Line numbers start at 1, indices at 0. Text is bytes, and a list of numbers from parquet is an
    array; other values are as returned by the format's library.
    """

    place: str
    fields: Mapping[str, Any]


class Fault(NamedTuple):
    """A record that cannot be read, and why: the kind of fault, then ': ' and details."""

    place: str
    reason: str


def files(source: str) -> list[str]:
    """The sorted absolute paths of a source's files.

    Links are followed. Of a folder, all files below it are its files, except those that are hidden
    or in hidden folders, and those that Spark writes beside data, such as _SUCCESS and .crc files.

    Args:
      source: a file, a folder, or a glob; on disk or gs://.

    Raises:
      ConfigError: the source names no place.
      DataError: there is no such file; or a link is broken, or leads to a folder that it is in.
    """
    source = storage.place(source, "a source", root=True)
    system, path = _file_system(source)
    remote = storage.is_remote(source)
    try:
        if system.isfile(path):
            found = [path]
        elif not remote:
            found = listing.in_folder(path) if os.path.isdir(path) else listing.matching(path)
            if not found and os.path.islink(path):
                raise DataError(f"{source} is a broken link, to {os.readlink(path)}")
        elif system.isdir(path):
            found = [
                p for p in system.find(path) if not listing.is_left_out(posixpath.relpath(p, path))
            ]
        else:
            found = [
                p for p in filter(listing.is_meant(path), system.glob(path)) if system.isfile(p)
            ]
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be listed: {error}") from error
    if not found:
        raise DataError(f"{source}: there is no such file, folder with files, or glob that matches")
    return sorted("gs://" + p if remote else p for p in found)


def open_file(path: str) -> IO[bytes]:
    """Opens a file on disk or gs:// for reading.

    Raises:
      DataError: it cannot be opened.
    """
    system, system_path = _file_system(path)
    try:
        if not storage.is_remote(path):
            return open(system_path, "rb", _BLOCK_BYTES)
        # The buffer makes up for fsspec's slow line reading, which also lacks a length limit.
        return io.BufferedReader(system.open(system_path, "rb"), 8 * _BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error}") from error


def size_and_time(path: str) -> tuple[int, str]:
    """The size of a file in bytes, and the time of its last modification."""
    system, path = _file_system(path)
    return system.size(path), system.modified(path).isoformat()


def sha256(path: str) -> str:
    """The sha256 of a file's content, in constant memory.

    Raises:
      DataError: it cannot be opened.
    """
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def format_of(file: str) -> str | None:
    """The format that a file's suffix says, or None."""
    return _SUFFIXES.get(_suffixes(file)[1])


def rows(
    file: str,
    *,
    format: str = "auto",
    columns: Sequence[str] = (),
    on_position: Callable[[int], None] = lambda position: None,
) -> Iterator[Row | Fault]:
    """The records of a file, in order.

    Args:
      file: a path or a gs:// URL, from `files`.
      format: a name from the table above, or 'auto' to use the suffix.
      columns: the names of the columns of csv and tsv files without a header.
      on_position: called after every record with the number of bytes read from the file so far.

    Raises:
      DataError: the suffix is unknown, the file is damaged or truncated (the message names the last
        good record), or field names are not distinct.
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
    if compressed and format in _SELF_COMPRESSED:
        raise DataError(f"{file}: {format} has compression of its own; decompress the file first")
    if columns and format not in _TABLES:
        raise DataError(f"{file}: columns are named for {' and '.join(_TABLES)}, not for {format}")
    read = _READERS[format]
    damage: tuple[type[BaseException], ...] = (*compression.ERRORS, UnicodeDecodeError)
    if format in _SELF_COMPRESSED:
        damage += columnar.ERRORS
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
    except text.NoTextError as error:
        raise DataError(f"{file} is no text in UTF-8, but looks like {error}") from error
    except damage as error:
        raise DataError(
            f"{file} is damaged or cut short after {last} ({type(error).__name__}: {error})"
        ) from error


# ---- readers: (file, stream) -> rows and faults


def _jsonl(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    for number, line in text.lines(stream, MAX_BYTES):
        place = f"{file}:{number}"
        if line is None:
            yield _too_long(place)
        elif line.count(b",") > MAX_COMMAS:
            yield Fault(place, f"too many values: more than {MAX_COMMAS:,} commas")
        elif line and not line.isspace():
            try:
                value = json.loads(
                    line.decode(*text.ESCAPING), strict=False, object_pairs_hook=_unique
                )
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


class _DecodedLines:
    """The lines of a stream as text, for `csv`, which can go back to a line of the latest row.

    Attributes:
      number: the number of the last line read.
    """

    def __init__(self, stream: IO[bytes]):
        self.number = 0
        self._lines = text.lines(stream, MAX_BYTES)
        self._row = bytearray()  # its lines so far
        self._again = io.BytesIO()  # lines to be read again
        self._size = 0  # of `_again`
        self._too_long = set[int]()  # numbers of lines that are blank in `_row` and `_again`

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again.tell() < self._size:
            self.number, line = self.number + 1, self._again.readline()
        else:
            self.number, new = next(self._lines)
            if new is None:
                self._too_long.add(self.number)
            line = new or b"\n"
        is_first = not self._row
        self._row += line
        if self.number in self._too_long:
            raise csv.Error(f"a line of more than {MAX_BYTES:,} bytes")
        if len(self._row) > MAX_OPEN_BYTES and not is_first:
            raise csv.Error(f"a quote that is open for more than {MAX_OPEN_BYTES:,} bytes")
        return line.decode(*text.ESCAPING)

    def start_row(self) -> None:
        self._row.clear()

    def quotes(self) -> int:
        """The number of quotes in the row."""
        return self._row.count(b'"')

    def reread(self) -> None:
        """Goes back to the second line of the row."""
        rest = self._row[self._row.find(b"\n") + 1 :] if b"\n" in self._row else b""
        self.number -= rest.count(b"\n") + bool(rest and not rest.endswith(b"\n"))
        if self._again.tell() < self._size:
            self._again.seek(-len(rest), io.SEEK_CUR)
        else:
            self._again, self._size = io.BytesIO(rest), len(rest)


def _csv(
    file: str,
    stream: IO[bytes],
    columns: Sequence[str] = (),
    *,
    delimiter: str = ",",
    quoting: Any = csv.QUOTE_MINIMAL,
) -> Iterator[Row | Fault]:
    # This limit is global to the process; by default fields are limited to 131,072 characters.
    csv.field_size_limit(MAX_BYTES)
    lines = _DecodedLines(stream)
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    has_header, recovering = not columns, False
    while True:
        lines.start_row()
        place = f"{file}:{lines.number + 1}"
        try:
            cells = next(reader, None)
            if recovering and lines.quotes() % 2:
                raise csv.Error("a quote without another, after a malformed row")
            recovering = False
        except csv.Error as error:
            if not columns:
                raise DataError(f"{place}: the header cannot be read: {error}") from error
            yield Fault(place, f"malformed row: {error}")
            # A quote that is not closed takes in rows that follow it. They are found again from the
            # next line on; the end of a text with quotes in it is taken for no row, though.
            lines.reread()
            recovering = quoting != csv.QUOTE_NONE
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
        elif has_header and len(cells) > 1 and cells == columns:
            yield Fault(place, "a second header")
        else:
            yield Row(place, dict(zip(columns, map(encode, cells))))


def _parquet(file: str, stream: IO[bytes]) -> Iterator[Row]:
    names, rows = columnar.parquet(stream)
    _check_distinct(file, names)
    for number, fields in enumerate(rows):
        yield Row(f"{file}[{number}]", fields)


def _npz(file: str, stream: IO[bytes]) -> Iterator[Row]:
    try:
        arrays = columnar.npz(stream)
    except ValueError as error:  # raised for arrays of objects, too
        raise DataError(f"{file} is no .npz file of arrays of numbers or texts: {error}") from error
    lengths = {array.shape[:1] for array in arrays.values()}
    if len(lengths) != 1 or () in lengths:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise DataError(f"{file}: the arrays need an equal first axis; there are {shapes}")
    for i in range(len(next(iter(arrays.values())))):
        fields = {name: columnar.element(array[i]) for name, array in arrays.items()}
        yield Row(f"{file}[{i}]", fields)


def _fasta(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    place, header, parts, remaining = "", None, list[bytes](), 0
    for number, line in itertools.chain(text.lines(stream, MAX_BYTES), [(0, b">")]):
        if line is not None and line.startswith(b">"):
            if header is not None:
                fields = _header_fields(header) | {"sequence": b"".join(parts)}
                yield Row(place, fields | _names(file)) if remaining >= 0 else _too_long(place)
            place, header, parts, remaining = f"{file}:{number}", line[1:], [], MAX_BYTES
        elif header is None:
            if line is None or line.split():
                yield Fault(f"{file}:{number}", "no FASTA: a line before the first that starts '>'")
        else:
            letters = b"".join(line.split()) if line is not None else b""
            remaining = remaining - len(letters) if line is not None and remaining >= 0 else -1
            if remaining >= 0:
                parts.append(letters)


def _fastq(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    lines = text.lines(stream, MAX_BYTES)
    window: collections.deque[tuple[int, bytes]] = collections.deque()
    resyncing = False
    while True:
        for number, line in itertools.islice(lines, 4 - len(window)):
            # A line that is too long is replaced by one that is invalid everywhere.
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
            fields = _header_fields(header[1:]) | {"sequence": record[1], "quality": record[3]}
            yield Row(f"{file}:{number}", fields | _names(file))
            window.clear()
            resyncing = False
        else:
            if not resyncing:  # one fault until the start of the next record
                yield Fault(
                    f"{file}:{number}", "no FASTQ: not '@', a sequence, '+', qualities as many"
                )
            window.popleft()
            resyncing = True


def _header_fields(header: bytes) -> dict[str, bytes]:
    words = header.strip().split(None, 1)
    return dict(zip(("id", "description"), (*words, b"", b"")))


def _text(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    names = _names(file)
    for number, line in text.lines(stream, MAX_BYTES):
        place = f"{file}:{number}"
        if line is None:
            yield _too_long(place)
        else:
            content = line.removesuffix(b"\n").removesuffix(b"\r")
            yield Row(place, {"text": content, **names})


def _whole(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        yield _too_long(file)
    else:
        yield Row(file, {"bytes": content, **_names(file)})


def _document(file: str, stream: IO[bytes]) -> Iterator[Row | Fault]:
    is_compressed = bool(_suffixes(file)[0])  # otherwise its size can be seen, and needs no limit
    content = stream.read(MAX_BYTES + 1 if is_compressed else -1)
    if is_compressed and len(content) > MAX_BYTES:
        yield Fault(file, f"{_too_long(file).reason} once decompressed; decompress the file itself")
    else:
        yield Row(file, {"text": content, **_names(file)})


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
    "document": _document,
}
_SELF_COMPRESSED = ("parquet", "npz")
_TABLES = ("csv", "tsv")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".npz": "npz", ".fasta": "fasta", ".fa": "fasta", ".fna": "fasta", ".ffn": "fasta",
    ".faa": "fasta", ".fastq": "fastq", ".fq": "fastq", ".txt": "text",
}  # fmt: skip


# ---- helpers


def _too_long(place: str) -> Fault:
    return Fault(place, f"too long: more than {MAX_BYTES:,} bytes")


def _check_distinct(place: str, columns: Sequence[str]) -> None:
    dups = sorted({name for name in columns if columns.count(name) > 1})
    if dups:
        raise DataError(f"{place}: columns of one name, {', '.join(map(repr, dups))}; rename them")


def _names(file: str) -> dict[str, bytes]:
    folder, name = posixpath.split(file)
    compressed, suffix = _suffixes(name)
    stem = name[: len(name) - len(compressed)]
    stem = stem[: len(stem) - len(suffix)] if suffix in _SUFFIXES else stem
    return {"folder": os.fsencode(posixpath.basename(folder)), "name": os.fsencode(stem)}


def _suffixes(file: str) -> tuple[str, str]:
    """The suffix of the compression, or '', and the suffix before it, both in lower case."""
    rest, suffix = posixpath.splitext(file.lower())
    return (suffix, posixpath.splitext(rest)[1]) if suffix in compression.SUFFIXES else ("", suffix)


def _file_system(path: str) -> tuple[Any, str]:
    if storage.is_remote(path):
        return fsspec.filesystem("gs"), path.removeprefix("gs://")
    return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(path))
