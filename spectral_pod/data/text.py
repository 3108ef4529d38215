"""Texts as bytes: as they were in their file, or in UTF-8."""

import codecs
import itertools
import re
from collections.abc import Iterator
from typing import IO

from spectral_pod.data import compression

ESCAPING = "utf-8", "surrogateescape"
_BLOCK_BYTES = 1 << 20
_MARKS = {  # those of UTF-32 first, as one of them starts with one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNMARKED = re.compile(rb"([\t\n\r -~]\0){2}|(\0[\t\n\r -~]){2}")  # UTF-16
# How files begin that are of no use as they are.
_PACKED = re.compile(
    rb"""(?P<gzip>\x1f\x8b\x08) | (?P<bzip2>BZh[1-9]1AY&SY) | (?P<xz>\xfd7zXZ\x00) |
    (?P<zstd>\x28\xb5\x2f\xfd) | (?P<lz4>\x04\x22\x4d\x18) | (?P<zip>PK\x03\x04) |
    (?P<sevenzip>7z\xbc\xaf\x27\x1c) | (?P<rar>Rar!\x1a\x07) | (?P<tar>.{257}ustar) |
    (?P<parquet>PAR1.*PAR1\Z) | (?P<arrow>ARROW1\x00\x00)""",
    re.DOTALL | re.VERBOSE,
)
_SUFFIX = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "zstd": ".zst", "parquet": ".parquet"}


class NoTextError(ValueError):
    """The message says what the content of a file is instead of text."""


def packed(data: bytes, *, by_suffix: bool = True) -> str:
    """What compressed file, archive or table begins so, and what to do with it; "" if none does.

    Args:
      by_suffix: whether such files are read where their suffix says what they are.
    """
    found = _PACKED.match(data)
    if not found:
        return ""
    kind = str(found.lastgroup)
    has_suffix = by_suffix and kind in _SUFFIX
    named = f", or give it the suffix {_SUFFIX[kind]}" if has_suffix else ""
    return f"a file of {kind}; unpack it{named}"


def wide(data: bytes) -> str:
    """What text in UTF-16 or UTF-32 begins so, and what to do with it; "" if none does."""
    marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "")
    name = marked or ("utf-16" if _UNMARKED.match(data) else "")
    return f"text in {name.upper()}; convert it to UTF-8" if name else ""


def unread(data: bytes) -> str:
    """Why a file that begins so is no text, and what to do with it; "" if it is."""
    return packed(data, by_suffix=False) or wide(data)


def encode(text: str) -> bytes:
    """The original bytes of a decoded text: UTF-8, with invalid bytes escaped as surrogates.

    A lone surrogate that escapes no byte, which JSON allows, becomes three bytes as in CESU-8.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        escaped = rb"\xed[\xb2\xb3][\x80-\xbf]"  # U+DC80 to U+DCFF, each standing for one byte
        return re.sub(
            escaped,
            lambda found: found[0].decode("utf-8", "surrogatepass").encode(*ESCAPING),
            text.encode("utf-8", "surrogatepass"),
        )


def lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """The numbered lines, from 1, with their ends; None stands for a line of more bytes than that.

    There is no byte order mark; UTF-16 and UTF-32 with one become UTF-8, a lone surrogate as well.

    Raises:
      NoTextError: it is no text that can be read, but what the message says.
      UnicodeDecodeError: the text is not of the encoding of its mark.
    """
    line = _line(stream, limit)
    if what := packed(line or b""):
        raise NoTextError(what)
    if line and _UNMARKED.match(line):
        raise NoTextError("UTF-16 without a byte order mark")
    encoding = next((name for mark, name in _MARKS.items() if line and line.startswith(mark)), "")
    if line and encoding:
        stream = compression.as_stream(_recoded(line, stream, encoding))
        line = _line(stream, limit)
    line = line and line.removeprefix(codecs.BOM_UTF8)
    for number in itertools.count(1):
        if line == b"":
            return
        yield number, line
        line = _line(stream, limit)


def _line(stream: IO[bytes], limit: int) -> bytes | None:
    part = stream.readline(_BLOCK_BYTES)
    size, parts = len(part), [part]
    while len(part) == _BLOCK_BYTES and not part.endswith(b"\n"):
        part = stream.readline(_BLOCK_BYTES)
        size += len(part)
        parts = [*parts, part] if size <= limit else []
    return b"".join(parts) if size <= limit else None


def _recoded(start: bytes, rest: IO[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    for block in itertools.chain([start], iter(lambda: rest.read(_BLOCK_BYTES), b"")):
        yield decoder.decode(block).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
