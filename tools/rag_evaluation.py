"""How well a model answers from documents: exact answers, right passages, questions without one."""

import difflib
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from spectral_pod.agent import retrieval
from spectral_pod.agent.loop import Agent
from spectral_pod.agent.passages import Passage
from spectral_pod.agent.protocol import Role
from spectral_pod.agent.retrieval import Index, Search
from spectral_pod.agent.tools import Tools
from spectral_pod.agent.traces import Trace
from spectral_pod.data.progress import Progress
from spectral_pod.data.tasks.rag import Question, Rag


class Row(NamedTuple):
    """What became of questions, in counts.

    Attributes:
      name: what the model read.
      asked: with an answer in the documents; of these
      found: those whose passage the model read,
      exact: those answered as expected, and of these
      cited: those whose passage holds the fact.
      unanswerable: without an answer in the documents; of these
      unknown: those answered "not in the documents".
    """

    name: str
    asked: int
    found: int
    exact: int
    cited: int
    unanswerable: int
    unknown: int


def measure(
    agent: Callable[[Tools], Agent], task: Rag, *, count: int, seed: int, batch: int
) -> list[Row]:
    """Asks about facts in the documents of the test split, which are written to a temporary folder.

    Args:
      agent: makes one with the given tools.
      task: of the model; its options say what that reads.
      count: of the questions; `batch` of them are asked at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        documents = os.path.join(folder, "documents")
        os.mkdir(documents)
        questions = task.plant(documents, "test", count, seed)
        index = retrieval.build(
            documents, os.path.join(folder, "index"), passage_bytes=task.passage_bytes
        )
        search, oracle = Search(index, task.num_passages), _Oracle(index, questions)
        rows = [("retrieved", search.tools(), search), ("oracle", oracle.tools(), oracle)]
        if task.passages == "none":
            rows = [("none", Tools(), search)]
        found = []
        for name, tools, tool in rows:
            traces, progress = [], Progress(f"Asking, {name}", count, "questions")
            for start in range(0, count, batch):
                asked = questions[start : start + batch]
                traces += agent(tools).run([question.text for question in asked])
                progress.add(len(asked))
            progress.end()
            found.append(_row(name, questions, traces, tool))
        return found


class _Oracle(Search):
    """Finds the passage with the fact that the nearest of the questions asks for; where there is
    none, the one that fits best.
    """

    def __init__(self, index: Index, questions: Sequence[Question]):
        super().__init__(index, 1)
        self._questions = {question.text: question for question in questions}

    def search(self, query: str) -> bytes:
        """The passage with the answer to a question."""
        (near,) = difflib.get_close_matches(query, self._questions, n=1, cutoff=0.0)
        question = self._questions[near]
        if not question.file:
            return super().search(near)
        return self.remember([self.index.holding(question.file, question.start, question.stop)])


def _row(name: str, questions: Sequence[Question], traces: Sequence[Trace], search: Search) -> Row:
    asked = found = exact = cited = unknown = 0
    for question, trace in zip(questions, traces):
        answer = None if trace.answer is None else retrieval.cited(trace, search)
        if not question.file:
            unknown += answer is not None and answer.is_unknown
            continue
        asked += 1
        results = [turn.data for turn in trace.turns if turn.role == Role.RESULT]
        found += any(_holds(p, question) for data in results for p in search.passages(data))
        if answer is not None and answer.text == question.answer.encode():
            exact += 1
            cited += answer.passage is not None and _holds(answer.passage, question)
    return Row(name, asked, found, exact, cited, len(questions) - asked, unknown)


def _holds(passage: Passage, question: Question) -> bool:
    is_in = passage.start <= question.start and question.stop <= passage.stop
    return passage.file == question.file and is_in


def _parts(row: Row) -> dict[str, tuple[int, int]]:
    """Each column, as a count and what it is a share of."""
    return {
        "found": (row.found, row.asked),
        "exact": (row.exact, row.asked),
        "cited": (row.cited, row.exact),
        "unknown": (row.unknown, row.unanswerable),
    }


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """The shares, and how many questions had an answer and had none."""
    return {
        "rows": [
            {"read": row.name, "asked": row.asked, "unanswerable": row.unanswerable}
            | {name: part / of if of else None for name, (part, of) in _parts(row).items()}
            for row in rows
        ]
    }


def table(rows: Sequence[Row]) -> str:
    """Shares, with their counts."""
    lines = [f"{'read':<12}{'found':>18}{'exact':>18}{'cited':>18}{'unknown':>18}"]
    for row in rows:
        shares = "".join(f"{_share(*part):>18}" for part in _parts(row).values())
        lines.append(f"{row.name:<12}{shares}")
    return "\n".join(lines) + "\n"


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%} ({count}/{total})" if total else "-"
