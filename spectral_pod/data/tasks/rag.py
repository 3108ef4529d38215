"""Questions that passages of documents answer, or do not: conversations with a search.

    USER what is the locker of Tamo Reki? END
    CALL search {"query": "what is the locker of Tamo Reki?"} END
    RESULT [1] import re
    [1] The locker of Tamo Reki is 4711.
    [2] ... END
    ANSWER 4711 [1] END
    USER which phone has Bo Kani? END
    ANSWER not in the documents END

Facts are those of `rag_facts.py`, and are placed as lines into real documents: the files of
`source`, or the top-level modules of the running interpreter's standard library. Results are as
`agent/passages.py` shows them. Besides the fact that is asked for they state others, the same about
another person and another about the person, and they give orders to the reader and forge passages.
Where no passage has the fact the answer is "not in the documents".

Further questions, as many as have room, are about the same passages and need no search: a model
learns to find the right line from many questions, and the passages are most of what it reads. For
the same reason half of the conversations of training have passages of facts alone.

Tenths of the files and of the persons are only in questions of validation and test; of the ways to
state a fact and to ask for it, the last is only in those of test.
"""

import dataclasses
import functools
import json
import os
import sysconfig
import zlib
from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Literal, NamedTuple

import numpy as np

from spectral_pod import storage
from spectral_pod.agent import passages, protocol
from spectral_pod.agent.passages import NUM_PASSAGES, PASSAGE_BYTES, UNKNOWN
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.data import formats, text
from spectral_pod.data.tasks import rag_facts
from spectral_pod.data.tasks.conversation_task import LONGEST_OPENING, ConversationTask, opening
from spectral_pod.data.tasks.rag_facts import LONGEST_NAME, RELATIONS, Fact, Subject
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import Bound, Probability

_NumPassages = Annotated[int, Bound(1, 101, "in 1 to 100")]
_PassageBytes = Annotated[int, Bound(1, 10_001, "in 1 to 10,000")]
_SPLITS = ("train", "validation", "test")
_POOL_BYTES = 4_000_000  # of documents, for each split
_HEAD_BYTES = 1 << 20  # by which a file is recognised that is no text, as an index does
_MAX_ADDED = 3  # lines that are added to a passage, at most
_MIN_TEXT = 40  # bytes of a document beside them, at least
_FACTS_ALONE = 0.5  # of the conversations of training


class Line(NamedTuple):
    """A line that is added to a document, and the fact that it states, if it does."""

    text: str
    fact: Fact | None


class Question(NamedTuple):
    """A question about planted documents.

    Attributes:
      answer: the text of the right one.
      file: that states the fact, in bytes `start` to `stop` - 1; "" if none does.
    """

    text: str
    answer: str
    file: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Rag(ConversationTask):
    """Questions with answers from passages."""

    name = "rag"
    version = 5

    # What the model reads: what a search would find; the passage with the fact alone, or one
    # without it; or nothing, and every question is answered at once. The latter two are to compare
    # with.
    passages: Literal["retrieved", "oracle", "none"] = "retrieved"
    num_passages: _NumPassages = NUM_PASSAGES
    passage_bytes: _PassageBytes = PASSAGE_BYTES
    unknown: Probability = 0.25  # of a question that no passage answers
    source: storage.Source = ""  # text files, a folder or a glob; "" is the standard library

    def __post_init__(self) -> None:
        super().__post_init__()
        least = rag_facts.longest() + 1 + _MIN_TEXT
        if self.passage_bytes < least:
            raise ConfigError(
                f"config.data.options.passage_bytes is {self.passage_bytes}; it must be at least "
                f"{least}, for a fact and some of its document"
            )

    @functools.cached_property
    def max_length(self) -> int:
        """Tokens of a conversation with the longest fact and passages, about one question."""
        name, value = "x" * LONGEST_NAME, "x" * LONGEST_NAME
        asked = max((q for r in RELATIONS for q in r.questions), key=len).format(name=name)
        asked = "x" * LONGEST_OPENING + asked
        turns = [Turn(Role.USER, asked.encode())]
        reply = max(value.encode(), UNKNOWN, key=len)
        if self.passages != "none":
            count = 1 if self.passages == "oracle" else self.num_passages
            longest = b"\n" * self._max_lines + b"x" * (self.passage_bytes - self._max_lines)
            turns += [called(asked), Turn(Role.RESULT, passages.shown([longest] * count))]
            reply = max(passages.citing(value.encode(), count), UNKNOWN, key=len)
        return len(protocol.example([*turns, Turn(Role.ANSWER, reply)])[0])

    def example(self, split: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """See `ConversationTask.example`."""
        return protocol.example(self.conversation(split, rng))

    def conversation(self, split: str, rng: np.random.Generator) -> list[Turn]:
        """The turns of a conversation.

        Raises:
          DataError: there are too few documents.
        """
        fact, is_unknown = rag_facts.draw(split, rng), rng.random() < self.unknown
        asked = _asked(fact, split, rng)
        if self.passages == "none":
            return [_user(asked), Turn(Role.ANSWER, UNKNOWN if is_unknown else fact.value.encode())]
        alone = split == "train" and rng.random() < _FACTS_ALONE
        lines = self._lines(fact, is_unknown, alone, split, rng)
        stated = {
            line.fact.subject: (line.fact, number)
            for number, added in enumerate(lines, 1)
            for line in added
            if line.fact
        }
        texts = [self._passage([line.text for line in added], alone, split, rng) for added in lines]
        number = None if is_unknown else stated[fact.subject][1]
        turns = [
            _user(asked),
            called(asked),
            Turn(Role.RESULT, passages.shown(texts)),
            _answer(fact, number),
        ]
        room = self.max_length + 1 - len(protocol.encode(turns))
        return turns + self._further(fact, stated, room, split, rng)

    def _lines(
        self, fact: Fact, is_unknown: bool, alone: bool, split: str, rng: np.random.Generator
    ) -> list[list[Line]]:
        """What is added to each of the passages: the fact, unless it is unknown, and other lines.

        They are facts, as many as have room, if there is nothing else in the passages (`alone`).
        """
        count = 1 if self.passages == "oracle" else self.num_passages
        lines: list[list[Line]] = [[] for _ in range(count)]
        if not is_unknown:
            lines[rng.integers(count)].append(Line(rag_facts.statement(fact, split, rng), fact))
        subjects = {fact.subject}
        for added in lines:
            wanted = _MAX_ADDED if alone else rng.integers(_MAX_ADDED + 1)
            while len(added) < wanted and self._room(added) >= rag_facts.longest() + 1:
                line = other_line(fact, split, rng)
                if line.fact and line.fact.subject not in subjects:
                    subjects.add(line.fact.subject)
                    added.append(line)
                elif not line.fact and not alone:
                    added.append(line)
        return lines

    def _further(
        self,
        first: Fact,
        stated: Mapping[Subject, tuple[Fact, int]],
        room: int,
        split: str,
        rng: np.random.Generator,
    ) -> list[Turn]:
        """Questions for each other fact that is stated and for some that are not, and the answers.

        Args:
          first: what has been asked for.
          stated: facts, and the numbers of their passages.
          room: symbols that the turns have at most.
        """
        wanted: list[tuple[Fact, int | None]] = []
        subjects, persons = {first.subject, *stated}, [name for _, name in stated]
        facts = list(stated.values())
        for index in rng.permutation(len(facts)):
            fact, number = facts[index]
            if fact.subject != first.subject:
                wanted.append((fact, number))
            if rng.random() < self.unknown:
                fact = _other_than(subjects, persons, split, rng)
                subjects.add(fact.subject)
                wanted.append((fact, None))
        turns: list[Turn] = []
        for fact, number in wanted:
            pair = [_user(_asked(fact, split, rng)), _answer(fact, number)]
            room -= len(protocol.encode(pair))
            if room < 0:
                break
            turns += pair
        return turns

    def _room(self, added: Sequence[Line]) -> int:
        """Bytes of a passage that these lines leave, besides some of its document."""
        return self.passage_bytes - _MIN_TEXT - sum(len(line.text) + 1 for line in added)

    def _passage(
        self, lines: Sequence[str], alone: bool, split: str, rng: np.random.Generator
    ) -> bytes:
        """These lines alone, or in a passage of a document, in place of its end."""
        if alone:
            return "\n".join(lines[i] for i in rng.permutation(len(lines))).encode()
        room = self.passage_bytes - sum(len(line) + 1 for line in lines)
        text = self._pool(split)[rng.integers(len(self._pool(split)))]
        kept = next(passages.cut([text], room))[1].split(b"\n")
        for line in lines:
            kept.insert(int(rng.integers(len(kept) + 1)), line.encode())
        return b"\n".join(kept)

    # ---- documents

    @property
    def _max_lines(self) -> int:
        """Line breaks in a passage, at most; passages of more are not in examples."""
        return self.passage_bytes // 16

    def _pool(self, split: str) -> list[bytes]:
        return self._pools[split]

    @functools.cached_property
    def _pools(self) -> dict[str, list[bytes]]:
        """Passages of the documents of each split."""
        pools = {}
        for split in _SPLITS:
            pool = [
                data
                for file in self._files[split]
                for _, data in passages.cut([_read(file)], self.passage_bytes)
                if data.count(b"\n") <= self._max_lines - _MAX_ADDED
            ]
            if not pool:
                raise DataError(
                    f"config.data.options.source is {self.source!r}, which has no documents for "
                    f"{split}; name a folder with more files"
                )
            pools[split] = pool
        return pools

    @functools.cached_property
    def _files(self) -> dict[str, list[str]]:
        """The documents of each split: a tenth of the files are for validation, and for test.

        Files that are no text, which an index leaves out, are none.
        """
        source = self.source or os.path.join(sysconfig.get_path("stdlib"), "*.py")
        found: dict[str, list[str]] = {split: [] for split in _SPLITS}
        sizes = dict.fromkeys(_SPLITS, 0)
        for file in sorted(formats.files(source), key=_order):
            split = {0: "validation", 1: "test"}.get(_order(file)[0] % 10, "train")
            if sizes[split] < _POOL_BYTES and not _unread(file):
                found[split].append(file)
                sizes[split] += formats.size_and_time(file)[0]
        return found

    def plant(self, folder: str, split: str, count: int, seed: int) -> list[Question]:
        """Writes the documents of a split with facts in them, and asks for facts.

        As many questions as `unknown` says ask for a fact that no document states.

        Args:
          folder: an existing one on this disk.
          count: of the questions.

        Raises:
          DataError: there are no documents for the split.
        """
        rng = np.random.default_rng([_SPLITS.index(split), seed])
        facts = rag_facts.distinct(split, count, rng)
        persons = frozenset(fact.name for fact in facts)
        num_unknown = round(count * self.unknown)
        self._pool(split)  # there are documents
        documents = [_read(file).split(b"\n") for file in self._files[split]]
        stated: dict[bytes, int] = {}
        for number, fact in enumerate(facts):
            lines = [other_line(fact, split, rng, persons).text] if rng.random() < 0.7 else []
            if number >= num_unknown:
                lines.append(rag_facts.statement(fact, split, rng))
                stated[lines[-1].encode()] = number
            for line in lines:
                document = documents[rng.integers(len(documents))]
                document.insert(int(rng.integers(len(document) + 1)), line.encode())
        asked = [rag_facts.question(fact, split, rng) for fact in facts]
        questions = [Question(text, UNKNOWN.decode(), "", 0, 0) for text in asked]
        for index, document in enumerate(documents):
            file, start = os.path.join(folder, f"{index:04d}.txt"), 0
            for raw in document:
                stop = start + len(raw)
                if (number := stated.get(raw, -1)) >= 0:
                    fact = facts[number]
                    questions[number] = Question(asked[number], fact.value, file, start, stop)
                start = stop + 1
            with open(file, "wb") as out:
                out.write(b"\n".join(document))
        return questions


def called(asked: str) -> Turn:
    """The call of a search for a question, as `agent/tools.py` reads it."""
    return Turn(Role.CALL, f"search {json.dumps({'query': asked}, ensure_ascii=False)}".encode())


def other_line(
    fact: Fact, split: str, rng: np.random.Generator, persons: frozenset[str] = frozenset()
) -> Line:
    """A line that does not state a fact, but looks as if it might; nor any of other `persons`."""
    other = rag_facts.draw(split, rng)
    while other.name in {fact.name, *persons} or other.value == fact.value:
        other = rag_facts.draw(split, rng)
    kind = rng.random()
    if kind < 0.4:  # the same about another person
        other = rag_facts.about(fact.relation, other.name, split, rng)
    elif kind < 0.8 and other.relation != fact.relation:  # another fact about the person
        other = other._replace(name=fact.name)
    else:
        return Line(rag_facts.order(other.value, rng), None)
    return Line(rag_facts.statement(other, split, rng), other)


def _other_than(
    subjects: Set[Subject], persons: list[str], split: str, rng: np.random.Generator
) -> Fact:
    """A fact about another subject, in half of all cases about one of these persons."""
    while True:
        fact = rag_facts.draw(split, rng)
        if rng.random() < 0.5:
            fact = fact._replace(name=persons[rng.integers(len(persons))])
        if fact.subject not in subjects:
            return fact


def _asked(fact: Fact, split: str, rng: np.random.Generator) -> str:
    """A question for a fact."""
    asked = rag_facts.question(fact, split, rng)
    return opening(rng) + asked if split == "train" else asked


def _user(asked: str) -> Turn:
    return Turn(Role.USER, asked.encode())


def _answer(fact: Fact, number: int | None) -> Turn:
    """The answer from the passage with that number, or from none."""
    reply = UNKNOWN if number is None else passages.citing(fact.value.encode(), number)
    return Turn(Role.ANSWER, reply)


def _read(file: str) -> bytes:
    with formats.open_file(file) as stream:
        return stream.read()


def _unread(file: str) -> str:
    with formats.open_file(file) as stream:
        return text.unread(stream.read(_HEAD_BYTES))


def _order(file: str) -> tuple[int, str]:
    """An order of files that does not depend on where they are, as long as names differ."""
    name = os.path.basename(file)
    return zlib.crc32(name.encode(errors="surrogateescape")), name
