"""What a language model predicts: bytes, or the tokens of a Hugging Face tokenizer.

A vocabulary numbers its tokens from 0. The class of token t is t, the next class is the end of a
document, and the symbol that a model reads for it is `shapes.symbol(t)`.
"""

import functools
import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from spectral_pod.data import formats
from spectral_pod.errors import ConfigError, DataError

OPTION = "config.data.options.tokenizer"
_PIECE = 1_000_000  # characters that are encoded at once, up to the end of a line


class Vocabulary:
    """Bytes, of which each is a token.

    Attributes:
      num_tokens: how many there are.
      unit: what a token is called.
      content: of the tokenizer's file; empty for bytes.
      sha256: of the content; "" for bytes.
    """

    num_tokens = 256
    unit = "byte"
    content = b""
    sha256 = ""

    @property
    def dtype(self) -> np.dtype:
        """What tokens are stored as, unsigned and little-endian."""
        sizes = (1, 2, 4)
        return np.dtype(f"<u{next(s for s in sizes if self.num_tokens <= 1 << (8 * s))}")

    def encode(self, text: bytes, *, cut: bool = False) -> np.ndarray:
        """The tokens of a text, in `dtype` [n].

        Args:
          cut: it may begin and end within a character, whose bytes become U+FFFD in tokens.

        Raises:
          DataError: it is to be tokens, and is not UTF-8.
        """
        return np.frombuffer(text, self.dtype)

    def decoder(self, before: Sequence[int] = ()) -> Callable[[Sequence[int]], bytes]:
        """A function from the tokens that follow, piece by piece, to their text.

        Args:
          before: the tokens that they follow.
        """
        return bytes


class Tokenizer(Vocabulary):
    """The tokens of a file `tokenizer.json`, as the library `tokenizers` reads it.

    No tokens are added at the start or the end of a text, and nothing is cut or padded. Text is
    encoded in pieces of about a million characters, which end with a line.
    """

    unit = "token"

    def __init__(self, file: str):
        """Reads a tokenizer from a file on disk or gs://.

        Raises:
          ConfigError: `tokenizers` is not installed.
          DataError: the file is missing, or holds no tokenizer.
        """
        self._library = _library()
        try:
            with formats.open_file(file) as stream:
                self.content = stream.read()
        except DataError as error:
            raise DataError(f"{OPTION} = {file!r}: {error}") from error
        try:
            self._tokenizer = self._library.Tokenizer.from_buffer(self.content)
        except Exception as error:  # the library raises no other
            raise DataError(
                f"{OPTION} = {file!r} is no tokenizer of the library tokenizers, such as a "
                f"tokenizer.json: {error}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.num_tokens = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: bytes, *, cut: bool = False) -> np.ndarray:
        """See `Vocabulary.encode`."""
        try:
            pieces = list(_pieces(text.decode(errors="replace" if cut else "strict")))
        except UnicodeDecodeError as error:
            raise DataError(
                f"a text is not UTF-8 at byte {error.start}, and the model reads tokens of UTF-8"
            ) from error
        encoded = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return np.asarray([token for piece in encoded for token in piece.ids], self.dtype)

    def decoder(self, before: Sequence[int] = ()) -> Callable[[Sequence[int]], bytes]:
        """See `Vocabulary.decoder`; a character is given once all of its tokens are there."""
        stream = self._library.decoders.DecodeStream(skip_special_tokens=False)

        def decode(tokens: Sequence[int]) -> bytes:
            texts = (stream.step(self._tokenizer, int(token)) for token in tokens)
            return "".join(text or "" for text in texts).encode()

        decode(before)
        return decode


@functools.cache
def of(file: str) -> Vocabulary:
    """The vocabulary of a tokenizer's file; of bytes without one."""
    return Tokenizer(file) if file else Vocabulary()


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ConfigError(
            f"{OPTION} needs the library tokenizers: pip install 'spectral-pod[tokenizers]'"
        ) from error


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:stop]
        start = stop
