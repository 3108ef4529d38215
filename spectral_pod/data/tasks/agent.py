"""Conversations about questions that can be checked, with calls of tools and without, for agents.

    USER what is 412 * 77? END  CALL calculator {"expression": "412*77"} END  RESULT 31724 END
    ANSWER 31724 END

Symbols, and what the loss is of, are those of `agent/protocol.py`; results are those that the tools
of `agent/` give. The kinds of questions, and what of them is held out, are in `agent_kinds.py`:
arithmetic, which the calculator does; strings, lists and dates, for Python; and what needs no tool.
In some conversations

- the tool fails, and is called again;
- the call is wrong, its result is an error, and the call is corrected. The wrong call is not
  scored: a model is to learn to correct mistakes, and not to make them.
"""

import dataclasses
import functools

import numpy as np

from spectral_pod.agent import calculator, protocol
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.data.tasks import agent_kinds
from spectral_pod.data.tasks.agent_kinds import Question
from spectral_pod.data.tasks.conversation_task import LONGEST_OPENING, ConversationTask, opening
from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive, Probability

FAILURES = ("error: it did not end within 10 s", "error: ConnectionError", "error: OSError: busy")
_MISTAKES = 3


@dataclasses.dataclass(frozen=True)
class AgentTask(ConversationTask):
    """Questions with correct answers, and the calls that find them."""

    name = "agent"
    version = 2

    digits: Positive = 6  # of a number, at most; each length is equally likely
    tool: bool = True  # otherwise every question is answered at once, for comparison
    plain: Probability = 0.2  # of a question that needs no tool
    python: Probability = 0.0  # of a question for Python, among those that need a tool
    failing: Probability = 0.15  # of a tool that fails at its first call, likewise
    mistaken: Probability = 0.1  # of a call that is wrong at first, likewise

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits > 100:
            raise ConfigError(
                f"config.data.options.digits is {self.digits}; it must be at most 100"
            )

    @functools.cached_property
    def max_length(self) -> int:
        """Tokens of a conversation about the longest question, with a failure and a mistake."""
        longest, failure = 0, max(FAILURES, key=len)
        for question in agent_kinds.longest(self.digits, python=self.python > 0):
            for number in range(_MISTAKES):
                turns = [Turn(Role.USER, question.text)]
                if self.tool and question.call:
                    turns += _mistake(question, number)
                    turns += _called(question.call, failure.encode())
                    turns += _called(question.call, question.result)
                turns += [Turn(Role.ANSWER, question.answer)]
                longest = max(longest, len(protocol.example(turns)[0]))
        return longest + LONGEST_OPENING

    def question(self, split: str, rng: np.random.Generator) -> Question:
        """A question of a split."""
        question = self._bare_question(split, rng)
        if split != "train":
            return question
        return question._replace(text=opening(rng).encode() + question.text)

    def _bare_question(self, split: str, rng: np.random.Generator) -> Question:
        if rng.random() < self.plain:
            return agent_kinds.plain(split, rng)
        if rng.random() < self.python:
            return agent_kinds.coded(split, rng)
        return agent_kinds.arithmetic(split, self.digits, rng)

    def conversation(self, split: str, rng: np.random.Generator) -> tuple[list[Turn], int | None]:
        """The turns of a conversation, and the index of a call that is a mistake."""
        question, mistake = self.question(split, rng), None
        turns = [Turn(Role.USER, question.text)]
        if self.tool and question.call:
            if rng.random() < self.mistaken:
                mistake = len(turns)
                turns += _mistake(question, int(rng.integers(_MISTAKES)))
            if rng.random() < self.failing:
                turns += _called(question.call, str(rng.choice(FAILURES)).encode())
            turns += _called(question.call, question.result)
        return [*turns, Turn(Role.ANSWER, question.answer)], mistake

    def example(self, split: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """See `ConversationTask.example`."""
        turns, mistake = self.conversation(split, rng)
        return protocol.example(turns, not_scored=() if mistake is None else (mistake,))


def _called(call: bytes, result: bytes) -> list[Turn]:
    return [Turn(Role.CALL, call), Turn(Role.RESULT, result)]


def _mistake(question: Question, number: int) -> list[Turn]:
    """A wrong call, one of `_MISTAKES`, and the error that it has for its result."""
    written = question.call.removesuffix(b'"}')
    if question.tool == "python":
        if number == 0:
            call, error = written + b')"}', "unmatched ')'"
        else:
            call, error = written.removesuffix(b")") + b'"}', "'(' was never closed"
        result = f"error: line 1: SyntaxError: {error}\n"
    else:
        tool, _, expression = written.decode().partition(': "')
        expression = (f"{expression})", f"({expression}", f"{expression}=")[number]
        call = f'{tool}: "{expression}"}}'.encode()
        result = f"error: {_refusal(expression)}"
    return _called(call, result.encode())


def _refusal(expression: str) -> str:
    """What the calculator says of an expression that it refuses."""
    try:
        calculator.calculate(expression)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"the calculator does not refuse {expression}")
