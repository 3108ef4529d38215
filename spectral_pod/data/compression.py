"""Decompression of files as streams, in bounded memory, with an error for truncated data.

The standard library ignores damage after the first of several concatenated streams, and zstandard
does not detect a truncated file. Neither limits what a few bytes may expand to.
"""

import bz2
import functools
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import zstandard

_BLOCK_BYTES = 1 << 20
# Compressed bytes per step. zstandard has no limit for what it returns, and one of its bytes may
# expand to 32 kB.
_PIECE_BYTES = 1 << 10
_LZMA_BYTES = 1 << 30  # memory of the decoder; presets take up to 65 MB


class _Zstandard:
    """A decompressor with the interface of those of the standard library."""

    def __init__(self) -> None:
        # The largest possible window: `zstd --long=31` is common for large text.
        self._stream = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._stream.decompress(data) if data else b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_GZIP = functools.partial(zlib.decompressobj, 16 + zlib.MAX_WBITS)
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": _GZIP,
    ".bgz": _GZIP,  # many gzip streams, as of bgzip
    ".bz2": bz2.BZ2Decompressor,
    ".xz": functools.partial(lzma.LZMADecompressor, memlimit=_LZMA_BYTES),
    ".zst": _Zstandard,
}
SUFFIXES = tuple(_DECOMPRESSORS)
# Raised by damaged data; bz2 raises an OSError.
ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def decompressed(stream: IO[bytes], suffix: str) -> IO[bytes]:
    """The decompressed content of all the compressed streams that are concatenated in `stream`.

    It takes some megabytes of memory, at most 70 for .zst, and for .xz and .zst also the window
    that the file asks for, at most 1 and 2 gigabytes.

    Args:
      stream: the compressed bytes.
      suffix: one of `SUFFIXES`.

    Raises:
      one of `ERRORS`, on reading: the data are damaged or truncated.
    """
    return as_stream(_decompress(stream, _DECOMPRESSORS[suffix]))


def as_stream(pieces: Iterator[bytes]) -> IO[bytes]:
    """A buffered stream of the bytes that an iterator yields."""
    return io.BufferedReader(_Pieces(pieces), _BLOCK_BYTES)


def _decompress(stream: IO[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    data = stream.read(_PIECE_BYTES)
    while True:
        decompressor = new()
        while not decompressor.eof:
            piece = decompressor.decompress(data, _BLOCK_BYTES)
            # zlib returns what it has not used; the others keep it, and need no more for now.
            data = getattr(decompressor, "unconsumed_tail", b"")
            if not data and getattr(decompressor, "needs_input", True) and not decompressor.eof:
                data = stream.read(_PIECE_BYTES)
                if not data and not piece:
                    raise EOFError("the compressed data end before their mark of the end")
            yield piece
        data = decompressor.unused_data
        while not (data := data.lstrip(b"\0")):  # files may be padded with zeros
            if not (data := stream.read(_PIECE_BYTES)):
                return


class _Pieces(io.RawIOBase):
    """A raw stream of the bytes that an iterator yields."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._piece = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count
