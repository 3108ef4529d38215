"""Passages of documents: where they are cut, how a model reads them, and how an answer names one.

A passage is a range of bytes of a file. What a search finds is one turn, a result:

    [1] the first passage
    [1] its second line
    [2] another one

Every line begins with the number of its passage, so that none can be taken for one of another
passage, whatever it holds; its bytes are those of the file otherwise. An answer ends with the
number of the passage that it stands in, `4711 [2]`, or is `UNKNOWN`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

NUM_PASSAGES = 3  # that a search gives, unless asked for others
PASSAGE_BYTES = 200  # of a passage, at most, likewise
NOTHING = b"nothing found"  # the result of a search without passages
UNKNOWN = b"not in the documents"  # the answer to what no passage says

# Where a passage may end, the best first: a paragraph, a sentence, a line, a word.
_ENDS = tuple(map(re.compile, (rb"\n[ \t\r]*\n", rb"[.!?][\"')\]]*\s", rb"\n", rb"\s")))
_CITED = re.compile(rb"(.*) \[([0-9]{1,9})\]", re.DOTALL)


class Passage(NamedTuple):
    """Bytes `start` to `stop` - 1 of a file, counted from 0."""

    file: str
    start: int
    stop: int
    data: bytes

    @property
    def place(self) -> str:
        """The file and the range."""
        return f"{self.file}:{self.start}-{self.stop}"


def cut(blocks: Iterable[bytes], limit: int) -> Iterator[tuple[int, bytes]]:
    """The passages of a text of any bytes, in order, with their first positions in it.

    They leave out nothing but white space between them. One ends, in its second half, with a
    paragraph if it can, or else a sentence, a line or a word; where there is no such end it is cut
    between characters.

    Args:
      blocks: of the text, which make no difference.
      limit: bytes of a passage at most, at least 4.
    """
    rest, position = b"", 0
    for block in blocks:
        rest += block
        at = _skipped(rest, 0)
        while len(rest) - at > limit:
            end = at + _end(rest[at : at + limit + 1], limit)
            yield position + at, rest[at:end].rstrip()
            at = _skipped(rest, end)
        rest, position = rest[at:], position + at
    if rest := rest.rstrip():
        yield position, rest


def _skipped(text: bytes, at: int) -> int:
    """The first position from `at` on that is no white space."""
    found = re.compile(rb"\S").search(text, at)
    return found.start() if found else len(text)


def _end(window: bytes, limit: int) -> int:
    """How many of these `limit` + 1 bytes are a passage, with the white space after it."""
    for pattern in _ENDS:
        ends = [found.end() for found in pattern.finditer(window)]
        if ends and 2 * ends[-1] > limit:
            return ends[-1]
    for end in range(limit, limit - 4, -1):
        if window[end] & 0xC0 != 0x80:  # a character of UTF-8 begins here
            return end
    return limit


def shown(passages: Sequence[bytes]) -> bytes:
    """The result of a search that found these passages, the best first."""
    numbered = (
        b"[%d] %s" % (number, line)
        for number, data in enumerate(passages, 1)
        for line in data.split(b"\n")
    )
    return b"\n".join(numbered) or NOTHING


def citing(text: bytes, number: int) -> bytes:
    """An answer that stands in the passage of this number."""
    return b"%s [%d]" % (text, number)


def cited(answer: bytes) -> tuple[bytes, int | None]:
    """The text of an answer, and the number of the passage that it names, if it does."""
    found = _CITED.fullmatch(answer)
    return (found[1], int(found[2])) if found else (answer, None)
