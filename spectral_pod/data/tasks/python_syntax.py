"""Python syntax: does a piece of source parse?

The pieces are cut from the running interpreter's standard library. A piece is a run of whole
statements of one body, with the comments between them and without their indentation, as many as fit
into `window` bytes; a statement that does not fit is opened, and its bodies give pieces. To each
piece belongs an invalid one, in which one fragment is missing in its place and surplus in another:

- a bracket, a quote, a colon or a keyword stands elsewhere,
- some of the indentation of a line stands before another one, or
- two neighbouring tokens are exchanged.

So the bytes of both are the same in another order, and any rule that looks at byte counts or at the
length is right for exactly half of the records. The label is what `ast.parse` says of the record.
What only the compiler refuses, such as a `return` outside a function, is valid here.

No file is in two splits, files of equal content count once, and no two records are equal. The
library's version decides the pieces: one interpreter and one seed always give the same records.
"""

import ast
import collections
import dataclasses
import hashlib
import io
import itertools
import keyword
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from spectral_pod.data import byte_store
from spectral_pod.data.progress import Progress
from spectral_pod.data.tasks.task import StoredTask
from spectral_pod.errors import DataError
from spectral_pod.fields import Positive
from spectral_pod.seeds import entropy

CLASSES = ("invalid", "valid")
SPLITS = ("train", "validation", "test")
KINDS = ("bracket", "quote", "colon", "keyword", "indentation", "exchange")
_TRIES = 20  # places for a fragment of one kind, before another kind is tried
_MIN_SHARE = 8  # a piece has at least one part in this many of a window
_MAX_SHARE = 64  # no file gives more than one part in this many of a split, or 4 pieces
_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages"}
_TOKENIZER_ERRORS = (tokenize.TokenError, SyntaxError)


class Span(NamedTuple):
    """Characters `start` to `stop` of a source."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class PythonSyntax(StoredTask):
    """Pieces of Python source, each as it is and with one fragment elsewhere."""

    name = "python_syntax"
    version = 1
    num_classes = len(CLASSES)

    seed: int = 0  # draws the split of a file, and what is changed in a piece
    window: Positive = 512  # bytes in a record, at most
    train: Positive = 10_000  # pairs of a valid and an invalid record; likewise the next two
    validation: Positive = 500
    test: Positive = 500
    roots: tuple[str, ...] = ()  # folders to search instead of the standard library

    def build(self, path: str) -> None:
        """Writes the pairs as a byte store; the manifest counts what was changed, by kind.

        Raises:
          DataError: there are too few files of Python source.
        """
        roots = self.roots or (os.path.realpath(sysconfig.get_path("stdlib")),)
        files, seen = _files(roots, self.seed), set[bytes]()
        sizes = {"test": self.test, "validation": self.validation, "train": self.train}
        drawn: dict[str, list[Pair]] = {}
        for split, size in sizes.items():  # test first: it is the same beside any training split
            drawn[split] = self._draw(split, size, files, seen)
            if len(drawn[split]) < size:
                raise DataError(
                    f"config.data.options.{split} is {size} pairs, and {', '.join(roots)} has only "
                    f"{len(drawn[split])} pieces of Python source left for it; ask for fewer, or "
                    "name other folders with config.data.options.roots"
                )
        changed = {split: collections.Counter(p.kind for p in drawn[split]) for split in SPLITS}
        byte_store.write(
            path,
            {split: _records(drawn[split], self.seed) for split in SPLITS},
            classes=CLASSES,
            provenance={
                "task": self.name,
                "python": platform.python_version(),
                "seed": self.seed,
                "window": self.window,
                "roots": list(roots),
                "files": {split: len({p.file for p in drawn[split]}) for split in SPLITS},
                "changed": {split: {k: changed[split][k] for k in KINDS} for split in SPLITS},
            },
        )

    def _draw(
        self, split: str, size: int, files: Iterator[tuple[bytes, str]], seen: set[bytes]
    ) -> list["Pair"]:
        """Pairs of the next files, none of whose pieces is in `seen`; as many as there are."""
        pairs: list[Pair] = []
        progress = Progress(f"Breaking Python source, {split}", size, "pairs")
        while len(pairs) < size and (file := next(files, None)):
            room = min(max(4, size // _MAX_SHARE), size - len(pairs))
            pairs += itertools.islice(self._pairs(*file, seen), room)
            progress.at(len(pairs))
        progress.end()
        return pairs

    def _pairs(self, file: bytes, source: str, seen: set[bytes]) -> Iterator["Pair"]:
        """The pairs of a file, in random order."""
        found = {_hash(piece.encode()): piece for piece in pieces(source, self.window)}
        for digest in sorted(found.keys() - seen, key=lambda d: _hash(b"%d/" % self.seed + d)):
            seen.add(digest)
            rng = np.random.default_rng([entropy(self.seed), int.from_bytes(digest, "little")])
            invalid, kind = invalid_form(found[digest], rng) or ("", "")
            if invalid and (other := _hash(invalid.encode())) not in seen:
                seen.add(other)
                yield Pair(found[digest].encode(), invalid.encode(), kind, file)


class Pair(NamedTuple):
    """A piece, its invalid form, what was changed (of KINDS), and the digest of its file."""

    valid: bytes
    invalid: bytes
    kind: str
    file: bytes


def _records(pairs: Sequence[Pair], seed: int) -> Iterator[byte_store.Record]:
    """Each piece, followed by its invalid form, in random order of the pieces."""
    for pair in sorted(pairs, key=lambda pair: _hash(b"%d/" % seed + pair.valid)):
        yield byte_store.Record(pair.valid, CLASSES.index("valid"))
        yield byte_store.Record(pair.invalid, CLASSES.index("invalid"))


def parses(source: bytes) -> bool:
    """Whether bytes are Python source that `ast.parse` accepts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes
        try:
            ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


# ---- pieces


def pieces(source: str, window: int) -> Iterator[str]:
    """Runs of whole statements of a module, each of at most `window` bytes; no line is in two."""
    lines = source.split("\n")
    for first, stop in _runs(ast.parse(source).body, lines, window):
        indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        piece = "".join(line.removeprefix(indent) + "\n" for line in lines[first:stop])
        size = len(piece.encode())
        if window // _MIN_SHARE <= size <= window and parses(piece.encode()):
            yield piece


def _runs(body: Sequence[ast.AST], lines: Sequence[str], window: int) -> Iterator[tuple[int, int]]:
    """The first line of each run of statements, and the line after its last one."""
    run: tuple[int, int] | None = None
    for node in body:
        first, stop = _lines_of(node)
        if run and first < run[1]:  # it shares a line with the statement before
            run = run[0], max(run[1], stop)
            continue
        joined = (run[0] if run else first), stop
        if _size(lines, *joined) <= window:
            run = joined
            continue
        if run:
            yield run
        run = None
        if _size(lines, first, stop) <= window:
            run = first, stop
            continue
        for inner in _bodies(node):
            yield from _runs(inner, lines, window)
    if run:
        yield run


def _lines_of(node: ast.AST) -> tuple[int, int]:
    decorators = [d.lineno for d in getattr(node, "decorator_list", [])]
    return min([node.lineno, *decorators]) - 1, node.end_lineno  # type: ignore[attr-defined]


def _bodies(node: ast.AST) -> Iterator[Sequence[ast.AST]]:
    """The blocks of statements in a statement, those of handlers and cases included."""
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield value
        elif isinstance(value, list):
            for part in value:
                if isinstance(part, ast.ExceptHandler | ast.match_case):
                    yield part.body


def _size(lines: Sequence[str], first: int, stop: int) -> int:
    """Bytes of these lines without the indentation of the first, or some more."""
    indent = len(lines[first]) - len(lines[first].lstrip())
    texts = (line[min(indent, len(line) - len(line.lstrip())) :] for line in lines[first:stop])
    return sum(len(text.encode()) + 1 for text in texts)


def _files(roots: Sequence[str], seed: int) -> Iterator[tuple[bytes, str]]:
    """The digest and the text of every file that parses, each content once, in random order."""
    found: dict[bytes, str] = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _LEFT_OUT)
            for name in sorted(names):
                path = os.path.join(folder, name)
                if name.endswith(".py") and os.path.isfile(path):
                    with open(path, "rb") as stream:
                        found.setdefault(_hash(stream.read()), path)
    for digest in sorted(found, key=lambda d: _hash(b"%d/" % seed + d)):
        try:
            with tokenize.open(found[digest]) as stream:
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError):  # an unknown encoding, or not what it says
            continue
        if parses(text.encode()):
            yield digest, text


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


# ---- invalid forms


def invalid_form(source: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """The characters of a piece in another order, in which it does not parse, and the kind of
    change; None where every change that was tried left it valid.
    """
    try:
        tokens = _tokens(source)
    except _TOKENIZER_ERRORS:
        return None
    for kind in rng.permutation(KINDS).tolist():
        for _ in range(_TRIES):
            changed = _changed(source, tokens, kind, rng)
            if changed is None:
                break
            if not parses(changed.encode()):
                return changed, kind
    return None


def _changed(
    source: str,
    tokens: Sequence[tuple[tokenize.TokenInfo, Span]],
    kind: str,
    rng: np.random.Generator,
) -> str | None:
    """A source after one change of a kind; None where there is nothing to change."""
    if kind == "exchange":
        if len(tokens) < 2:
            return None
        i = int(rng.integers(len(tokens) - 1))
        (_, one), (_, two) = tokens[i : i + 2]
        parts = source[two.start : two.stop], source[one.stop : two.start]
        return "".join(
            (source[: one.start], *parts, source[one.start : one.stop], source[two.stop :])
        )
    if kind == "indentation":
        starts = [0, *(i + 1 for i, x in enumerate(source[:-1]) if x == "\n")]
        widths = [len(source[i:]) - len(source[i:].lstrip(" \t")) for i in starts]
        indented = [(i, n) for i, n in zip(starts, widths) if n]
        if not indented:
            return None
        start, width = indented[rng.integers(len(indented))]
        return _moved(source, Span(start, start + int(rng.integers(1, width + 1))), starts, rng)
    fragments = [span for token, span in tokens for span in _fragments(source, token, span, kind)]
    if not fragments:
        return None
    places = sorted({place for _, span in tokens for place in span})
    return _moved(source, fragments[rng.integers(len(fragments))], places, rng)


def _moved(source: str, span: Span, places: Sequence[int], rng: np.random.Generator) -> str:
    """A source with the fragment at another one of these places, or at its own again."""
    place = places[int(rng.integers(len(places)))]
    fragment = source[span.start : span.stop]
    if place <= span.start:
        return source[:place] + fragment + source[place : span.start] + source[span.stop :]
    place = max(place, span.stop)
    return source[: span.start] + source[span.stop : place] + fragment + source[place:]


def _fragments(source: str, token: tokenize.TokenInfo, span: Span, kind: str) -> Iterator[Span]:
    """What may be moved of a token, in a change of a kind."""
    text = token.string
    if text in {"bracket": tuple("()[]{}"), "colon": (":",)}.get(kind, ()):
        yield span
    elif kind == "keyword" and token.type == tokenize.NAME and keyword.iskeyword(text):
        yield Span(span.start, span.stop + (source[span.stop : span.stop + 1] == " "))
    elif kind == "quote" and text[-1] in "'\"" and token.type != tokenize.COMMENT:
        first = span.start + min(text.find(quote) for quote in "'\"" if quote in text)
        yield Span(first, first + 1)
        yield Span(span.stop - 1, span.stop)


def _tokens(source: str) -> list[tuple[tokenize.TokenInfo, Span]]:
    """The tokens that are written, ends of lines and indentation left out, and where they stand."""
    starts = [0, 0, *(i + 1 for i, x in enumerate(source) if x == "\n")]  # lines count from 1
    found: list[tuple[tokenize.TokenInfo, Span]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, start), (last, stop) = token.start, token.end
        span = Span(starts[first] + start, starts[last] + stop)
        # Parts of f-strings overlap in some versions of Python.
        if token.string.strip() and (not found or span.start >= found[-1][1].stop):
            found.append((token, span))
    return found
