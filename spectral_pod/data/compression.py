"""Decompression of files as streams, in constant memory, with an error for truncated data.

The standard library ignores damage after the first of several concatenated streams, and zstandard
does not detect a truncated file.
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
_PIECE_BYTES = 1 << 13  # compressed bytes per step; they may expand a thousandfold

_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": functools.partial(zlib.decompressobj, 16 + zlib.MAX_WBITS),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    # The largest possible window: `zstd --long=31` is common for large text.
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
SUFFIXES = tuple(_DECOMPRESSORS)
ERRORS = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)  # raised by damaged data


def decompressed(stream: IO[bytes], suffix: str) -> IO[bytes]:
    """The decompressed content of all the compressed streams that are concatenated in `stream`.

    Args:
      stream: the compressed bytes.
      suffix: one of `SUFFIXES`.

    Raises:
      one of `ERRORS`, on reading: the data are damaged or truncated.
    """
    return io.BufferedReader(_Pieces(_decompress(stream, _DECOMPRESSORS[suffix])), _BLOCK_BYTES)


def _decompress(stream: IO[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    data = stream.read(_PIECE_BYTES)
    while True:
        decompressor = new()
        while not decompressor.eof:
            if not data:
                raise EOFError("the compressed data end before their mark of the end")
            yield decompressor.decompress(data)
            data = decompressor.unused_data if decompressor.eof else stream.read(_PIECE_BYTES)
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
