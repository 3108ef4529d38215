"""Compressed files as streams: in constant memory, and cut short is an error.

The standard library's files ignore what cannot be read after the first of several in a row, and
zstandard's do not notice a missing end.
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
_PIECE_BYTES = 1 << 13  # of compressed data at once: they may stand for a thousand times as many

_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": functools.partial(zlib.decompressobj, 16 + zlib.MAX_WBITS),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    # The largest window there is: `zstd --long=31` is common for large text.
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
SUFFIXES = tuple(_DECOMPRESSORS)
DAMAGES = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)  # what reading may raise


def decompressed(stream: IO[bytes], suffix: str) -> IO[bytes]:
    """The content of compressed files, one after the other in `stream`, by one of SUFFIXES.

    Raises:
      one of DAMAGES, while it is read: the data are damaged or cut short.
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
        while not (data := data.lstrip(b"\0")):  # zeros may pad a file
            if not (data := stream.read(_PIECE_BYTES)):
                return


class _Pieces(io.RawIOBase):
    """A stream of the bytes of an iterator."""

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
