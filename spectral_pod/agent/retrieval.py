"""Retrieval: an index of the passages of documents, searched by BM25, as a tool of a model.

    index = retrieval.build("DOCUMENTS", "INDEX")     # or Index("INDEX"), once it is written
    index.find("who wrote it?", 3)                    # passages: file, range and bytes

    search = Search(index)
    agent = Agent.from_checkpoint(WORKDIR, search.tools())
    answer(agent.run(["who wrote it?"])[0], search)   # its text, and the passage that it stands in

An index is a folder, on disk or gs://: index.json with the files, and passages.safetensors with the
ranges of their passages, a digest of each, and the weight of each word in it. The bytes of passages
stay in the files and are read from there; if they are no longer those of the index, that is an
error. Words are runs of letters and digits, regardless of case. Weights are by bm25s (Lù, 2024,
arXiv:2407.03618), in the form that Lucene uses: a word that is in n of N passages, and f times in
one of l words where the mean is m, counts

    ln(1 + (N - n + 0.5) / (n + 0.5)) f / (f + k1 (1 - b + b l / m))    with k1 = 1.5, b = 0.75
"""

import hashlib
import logging
import re
import sys
from array import array
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
import safetensors.numpy
from etils import epath

from spectral_pod import fields, lease, project_files, storage
from spectral_pod.agent import passages
from spectral_pod.agent.passages import NUM_PASSAGES, PASSAGE_BYTES, UNKNOWN, Passage
from spectral_pod.agent.protocol import Role
from spectral_pod.agent.tools import Tools
from spectral_pod.agent.traces import Trace
from spectral_pod.data import formats, text
from spectral_pod.data.progress import Progress
from spectral_pod.errors import ConfigError, DataError, UserError
from spectral_pod.fields import Bound

PassageBytes = Annotated[int, Bound(16, 2**31, "at least 16 and below 2^31")]
FORMAT = "spectral_pod.passages/1"
_INDEX, _PASSAGES = "index.json", "passages.safetensors"
_PARAMETERS = {"method": "lucene", "k1": 1.5, "b": 0.75}
_BLOCK_BYTES = 1 << 20
_DIGEST_BYTES = 16
_WORD = re.compile(r"[^\W_]+")


def words(data: bytes) -> list[str]:
    """The words of a text, by which it is found."""
    return _WORD.findall(data.decode(errors="replace").casefold())


# ---- making an index


def build(source: str, out: str, *, passage_bytes: int = PASSAGE_BYTES) -> "Index":
    """Writes an index of documents: whole, or not at all. The same files give the same bytes.

    Files that are no text as they are (compressed, archives, UTF-16), and those whose names are not
    UTF-8, are left out; the index lists them and why.

    Args:
      source: a file, a folder or a glob, on disk or gs://; see `formats.files`.
      out: a folder or a gs:// URL.
      passage_bytes: of a passage, at most; at least 16.

    Raises:
      ConfigError: bm25s is not installed, or `passage_bytes` is too small.
      DataError: `out` holds an index, or there is nothing to index.
      InUseError: another process is writing there.
    """
    library = _bm25s()
    fields.check(PassageBytes, passage_bytes, "passage_bytes")
    folder = epath.Path(out)
    _check_is_free(folder)
    found = _Passages(passage_bytes)
    files = formats.files(source)
    sizes = [formats.size_and_time(file)[0] for file in files]
    progress = Progress("Reading", sum(sizes), "bytes")
    for file in files:
        found.add(file, progress)
    progress.end()
    if not found.starts:
        raise DataError(f"{source} holds no words" + "".join(map(_reason, found.left_out[:1])))
    arrays = safetensors.numpy.save(found.arrays(library))
    facts = {
        "format": FORMAT,
        "source": source,
        "passage_bytes": passage_bytes,
        "files": found.files,
        "left_out": found.left_out,
        "passages": len(found.starts),
        "sha256": hashlib.sha256(arrays).hexdigest(),
    }
    with lease.Lease(f"{out}/lease.json", f"the index {out}"):
        _check_is_free(folder)
        storage.write_whole(folder / _PASSAGES, arrays)
        project_files.PASSAGES.write(folder / _INDEX, facts)
    return Index(out)


def _check_is_free(folder: Any) -> None:
    if (folder / _INDEX).exists():
        raise DataError(f"{folder} holds an index; delete it, or name another folder")


class _Passages:
    """The passages of files, as they are read.

    Attributes:
      files: the names of those that have passages.
      left_out: the others that are no text, and why.
      starts: the first position of each passage.
    """

    def __init__(self, passage_bytes: int):
        self.files: list[str] = []
        self.left_out: list[dict[str, str]] = []
        self.starts = array("q")
        self._limit = passage_bytes
        self._file, self._stops, self._digests = array("i"), array("q"), bytearray()
        self._vocabulary: dict[str, int] = {}
        self._ids: list[list[int]] = []  # of the words of each passage

    def add(self, file: str, progress: Progress) -> None:
        """The passages of a file."""
        before = len(self.starts)
        with formats.open_file(file) as stream:
            head = stream.read(_BLOCK_BYTES)
            if what := _fault(file, head):
                name = file.encode(errors="backslashreplace").decode()
                self.left_out.append({"name": name, "reason": what})
                return
            for start, data in passages.cut(_blocks(head, stream, progress), self._limit):
                self._add(start, data)
        if len(self.starts) > before:
            self.files.append(file)

    def _add(self, start: int, data: bytes) -> None:
        """A passage of the next file; one without words cannot be found, and is no passage."""
        if not (said := words(data)):
            return
        self.starts.append(start)
        self._stops.append(start + len(data))
        self._file.append(len(self.files))
        self._digests += _digest(data)
        self._ids.append([self._vocabulary.setdefault(w, len(self._vocabulary)) for w in said])

    def arrays(self, library: Any) -> dict[str, np.ndarray]:
        """What `Index` reads."""
        if not sys.stderr.isatty():
            print(f"Weighing the words of {len(self.starts):,} passages", file=sys.stderr)
        model = library.BM25(**_PARAMETERS)
        tokens = library.tokenization.Tokenized(ids=self._ids, vocab=self._vocabulary)
        model.index(tokens, create_empty_token=False, show_progress=sys.stderr.isatty())
        return {
            "weights": np.asarray(model.scores["data"], np.float32),
            "rows": np.asarray(model.scores["indices"], np.int32),
            "offsets": np.asarray(model.scores["indptr"], np.int64),
            "words": np.frombuffer("\n".join(self._vocabulary).encode(), np.uint8),
            "file": np.asarray(self._file, np.int32),
            "start": np.asarray(self.starts, np.int64),
            "stop": np.asarray(self._stops, np.int64),
            "digest": np.frombuffer(self._digests, np.uint8).reshape(-1, _DIGEST_BYTES),
        }


def _blocks(head: bytes, stream: Any, progress: Progress) -> Iterator[bytes]:
    block = head
    while block:
        yield block
        progress.add(len(block))
        block = stream.read(_BLOCK_BYTES)


def _fault(file: str, head: bytes) -> str:
    """Why a file cannot be indexed, or ""."""
    try:
        file.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    return text.unread(head)


def _reason(left_out: dict[str, str]) -> str:
    return f": {left_out['name']} is left out ({left_out['reason']})"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _bm25s() -> Any:
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise ConfigError("retrieval needs bm25s: pip install 'spectral-pod[rag]'") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets its own to DEBUG
    return bm25s


# ---- reading it


class Found(NamedTuple):
    """A passage, and how well it fits a question: BM25's score, which is above 0."""

    passage: Passage
    score: float


class Index:
    """An index of passages.

    Attributes:
      facts: see `project_files.PassageIndex`.
    """

    def __init__(self, folder: str):
        """Opens an index, and compares it with its sha256.

        Raises:
          ConfigError: bm25s is not installed.
          DataError: there is none, or it is damaged.
        """
        path = epath.Path(folder)
        library = _bm25s()
        self.facts = project_files.PASSAGES.read(path / _INDEX)
        try:
            raw = (path / _PASSAGES).read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise DataError(
                f"{path / _PASSAGES} is missing; {project_files.PASSAGES.remedy}"
            ) from error
        if hashlib.sha256(raw).hexdigest() != self.facts["sha256"]:
            raise DataError(
                f"{path / _PASSAGES} is damaged: its sha256 is not the one in {_INDEX}; "
                + project_files.PASSAGES.remedy
            )
        self._arrays = arrays = safetensors.numpy.load(raw)
        if len(arrays["file"]) != len(self) or arrays["file"].max() >= len(self.facts["files"]):
            raise DataError(
                f"{path / _INDEX} is not of these passages; {project_files.PASSAGES.remedy}"
            )
        vocabulary = arrays["words"].tobytes().decode().split("\n")
        self._ids = {word: number for number, word in enumerate(vocabulary)}
        self._model = library.BM25(**_PARAMETERS)
        self._model.nonoccurrence_array = None  # other forms of BM25 have one
        self._model.scores = {
            "data": arrays["weights"],
            "indices": arrays["rows"],
            "indptr": arrays["offsets"],
            "num_docs": len(self),
        }

    def __len__(self) -> int:
        return self.facts["passages"]

    def scores(self, question: bytes) -> np.ndarray:
        """How well each passage fits, float32 [n]; 0 where it has none of the words."""
        ids = [self._ids[word] for word in words(question) if word in self._ids]
        if not ids:
            return np.zeros(len(self), np.float32)
        return self._model.get_scores_from_ids(ids)

    def find(self, question: bytes | str, count: int = NUM_PASSAGES) -> list[Found]:
        """The passages that fit best, at most `count`; of equal ones the first of the first file.

        Raises:
          DataError: a file is no longer what was indexed.
        """
        raw = question if isinstance(question, bytes) else question.encode(errors="replace")
        scores = self.scores(raw)
        best = np.argsort(-scores, kind="stable")[:count].tolist()
        return [Found(self.passage(i), float(scores[i])) for i in best if scores[i] > 0]

    def passage(self, number: int) -> Passage:
        """A passage, 0 to n - 1, from its file.

        Raises:
          DataError: the file is no longer what was indexed.
        """
        start, stop = (int(self._arrays[name][number]) for name in ("start", "stop"))
        file = self.facts["files"][int(self._arrays["file"][number])]
        with formats.open_file(file) as stream:
            stream.seek(start)
            data = stream.read(stop - start)
        if _digest(data) != self._arrays["digest"][number].tobytes():
            raise DataError(
                f"{file} has changed since it was indexed, in bytes {start} to {stop}; "
                + project_files.PASSAGES.remedy
            )
        return Passage(file, start, stop, data)

    def holding(self, file: str, start: int, stop: int) -> Passage:
        """The passage with bytes `start` to `stop` - 1 of a file.

        Raises:
          DataError: they are in no passage, or the file is no longer what was indexed.
        """
        arrays, files = self._arrays, self.facts["files"]
        is_inside = (arrays["start"] <= start) & (stop <= arrays["stop"])
        for number in np.flatnonzero(is_inside).tolist():
            if files[arrays["file"][number]] == file:
                return self.passage(number)
        raise DataError(f"bytes {start} to {stop} of {file} are not in one passage")


# ---- as a tool


class Search:
    """A model's tool `search`, which remembers what it found.

    Attributes:
      index: what is searched.
    """

    def __init__(self, index: Index, count: int = NUM_PASSAGES):
        """`count` is of the passages that a search gives, at most."""
        self.index, self._count = index, count
        self._found: dict[bytes, list[Passage]] = {}
        self._faults: dict[bytes, UserError] = {}

    def search(self, query: str) -> bytes:
        """The passages of the documents that have the words of a query.

        A search that fails, as a file has changed, is a result as well.
        """
        try:
            found = self.index.find(query, self._count)
        except UserError as error:
            result = f"error: {error}".encode(errors="replace")
            self._faults[result] = error
            return result
        return self.remember([one.passage for one in found])

    def remember(self, found: list[Passage]) -> bytes:
        """The result that shows these passages."""
        result = passages.shown([passage.data for passage in found])
        self._found[result] = found
        return result

    def tools(self) -> Tools:
        """The tool alone, whose results are never cut off."""
        return Tools(self.search, output_bytes=sys.maxsize)

    def passages(self, result: bytes) -> list[Passage]:
        """Those in a result of this tool."""
        return self._found.get(result, [])

    def fault(self, result: bytes) -> UserError | None:
        """Why the search with this result failed, if it did."""
        return self._faults.get(result)


class Answer(NamedTuple):
    """What a model says, and the passage in which that stands; None where it is in none."""

    text: bytes
    passage: Passage | None

    @property
    def is_unknown(self) -> bool:
        """Whether the model says that the documents do not say it."""
        return self.text == UNKNOWN and self.passage is None


def cited(trace: Trace, search: Search) -> Answer:
    """The answer of a conversation, with the passage of the last search that it names, if any.

    Raises:
      UserError: there is no answer.
    """
    if trace.answer is None:
        cure = "; ask for fewer passages, or index shorter ones" if trace.end == "bytes" else ""
        raise UserError(f"there is no answer: {trace.note}{cure}")
    said, number = passages.cited(trace.answer)
    found = search.passages(_last_result(trace))
    if number is None or not 1 <= number <= len(found):
        return Answer(trace.answer, None)
    return Answer(said, found[number - 1])


def _last_result(trace: Trace) -> bytes:
    return next((turn.data for turn in reversed(trace.turns) if turn.role == Role.RESULT), b"")


def answer(trace: Trace, search: Search) -> Answer:
    """An answer that can be checked: it stands, as it is, in the passage that it names; or it says
    that the documents do not say it.

    Raises:
      UserError: there is no answer, or none such; or a search failed.
    """
    if fault := search.fault(_last_result(trace)):
        raise fault
    found = cited(trace, search)
    if found.is_unknown or (found.passage and found.text and found.text in found.passage.data):
        return found
    where = f"is not in the passage that it names, {found.passage.place}" if found.passage else (
        "names no passage that was found"
    )  # fmt: skip
    raise UserError(
        f"the model's answer {found.text.decode(errors='replace')!r} {where}; it is not to be "
        "trusted. Ask in other words, or train the model further"
    )
