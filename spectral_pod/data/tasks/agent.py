"""Conversations about arithmetic, with calls of the calculator and without, for agents.

    USER what is 412 * 77? END  CALL calculator {"expression": "412*77"} END  RESULT 31724 END
    ANSWER 31724 END

Symbols, and what the loss is of, are those of `agent/protocol.py`; results are those that
`agent/calculator.py` gives. In some conversations

- the tool fails, and is called again;
- the call is wrong, its result is an error, and the call is corrected. The wrong call is not
  scored: a model is to learn to correct mistakes, and not to make them;
- there is nothing to calculate: one digit plus another, or a word to repeat.

Numbers whose two first digits are in `HELD_OUT` are only in questions of validation and test; ways
to ask that are in `HELD_OUT_QUESTIONS` only in those of test.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from spectral_pod.agent import calculator, protocol
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.data.tasks.conversation_task import ConversationTask
from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive, Probability

HELD_OUT = range(37, 46)  # the two first digits of the first number: a tenth of all
QUESTIONS = (
    "what is {a} {op} {b}?", "calculate {a}{op}{b}", "{a} {op} {b} =", "how much is {a}{op}{b}?",
)  # fmt: skip
HELD_OUT_QUESTIONS = ("please tell me {a} {op} {b}", "I need the value of {a}{op}{b}")
FAILURES = ("error: it did not end within 10 s", "error: ConnectionError", "error: OSError: busy")
_KINDS = {"+": "addition", "-": "subtraction", "*": "multiplication"}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MAX_WORD = 8


class Question(NamedTuple):
    """A question with its answer.

    Attributes:
      kind: "addition", "subtraction", "multiplication"; without a tool "digits" and "repeat".
      expression: what the tool is to calculate; "" where no tool is needed.
      digits: of the longer number; 0 where there is none.
    """

    text: bytes
    answer: bytes
    kind: str
    expression: str
    digits: int


@dataclasses.dataclass(frozen=True)
class AgentTask(ConversationTask):
    """Questions with correct answers, and the calls that find them."""

    name = "agent"
    version = 1

    digits: Positive = 6  # of a number, at most; each length is equally likely
    tool: bool = True  # otherwise every question is answered at once, for comparison
    plain: Probability = 0.2  # of a question that needs no tool
    failing: Probability = 0.15  # of a tool that fails at its first call, among those that need it
    mistaken: Probability = 0.1  # of a call that is wrong at first, likewise

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits > 100:
            raise ConfigError(
                f"config.data.options.digits is {self.digits}; it must be at most 100"
            )

    @functools.cached_property
    def max_length(self) -> int:
        """Tokens of a conversation with the longest numbers and texts, a failure and a mistake."""
        most = "9" * self.digits
        asked = max(QUESTIONS + HELD_OUT_QUESTIONS, key=len)
        question, expression = asked.format(a=most, op="*", b=most), f"{most}*{most}"
        turns = [Turn(Role.USER, question.encode())]
        if self.tool:
            turns += _tried(_called(f"({expression}"))
            turns += [_called(expression), Turn(Role.RESULT, max(FAILURES, key=len).encode())]
            turns += _tried(_called(expression))
        turns += [Turn(Role.ANSWER, calculator.calculate(expression).encode())]
        word = "x" * _MAX_WORD
        plain = [Turn(Role.USER, _repeat(word)), Turn(Role.ANSWER, word.encode())]
        return max(len(protocol.example(one)[0]) for one in (turns, plain))

    def question(self, split: str, rng: np.random.Generator) -> Question:
        """A question of a split."""
        if rng.random() < self.plain:
            return _plain(rng)
        first, second = self._numbers(split, rng)
        sign = str(rng.choice(list("+-*")))
        asked = HELD_OUT_QUESTIONS if split == "test" else QUESTIONS
        text = str(rng.choice(asked)).format(a=first, op=sign, b=second)
        expression = f"{first}{sign}{second}"
        answer, digits = calculator.calculate(expression), len(str(max(first, second)))
        return Question(text.encode(), answer.encode(), _KINDS[sign], expression, digits)

    def conversation(self, split: str, rng: np.random.Generator) -> tuple[list[Turn], int | None]:
        """The turns of a conversation, and the index of a call that is a mistake."""
        question, mistake = self.question(split, rng), None
        expression, turns = question.expression, [Turn(Role.USER, question.text)]
        if self.tool and expression:
            if rng.random() < self.mistaken:
                mistake = len(turns)
                turns += _tried(_called(_wrong(expression, rng)))
            if rng.random() < self.failing:
                failure = str(rng.choice(FAILURES))
                turns += [_called(expression), Turn(Role.RESULT, failure.encode())]
            turns += _tried(_called(expression))
        return [*turns, Turn(Role.ANSWER, question.answer)], mistake

    def example(self, split: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """See `ConversationTask.example`."""
        turns, mistake = self.conversation(split, rng)
        return protocol.example(turns, not_scored=() if mistake is None else (mistake,))

    def _numbers(self, split: str, rng: np.random.Generator) -> tuple[int, int]:
        """Two numbers, of which the first is in the ranges of the split."""
        least = 1 if split == "train" else min(2, self.digits)
        first = _number(int(rng.integers(least, self.digits + 1)), rng)
        while first > 9 and is_held_out(first) == (split == "train"):
            first = _number(len(str(first)), rng)
        return first, _number(int(rng.integers(1, self.digits + 1)), rng)


def is_held_out(number: int) -> bool:
    """Whether a number is kept out of training."""
    return number > 9 and int(str(number)[:2]) in HELD_OUT


def _number(digits: int, rng: np.random.Generator) -> int:
    """A number of exactly that many digits."""
    first = "" if digits == 1 else str(rng.integers(1, 10))
    return int(first + "".join(map(str, rng.integers(10, size=digits - len(first)))))


def _called(expression: str) -> Turn:
    return Turn(Role.CALL, f'calculator {{"expression": "{expression}"}}'.encode())


def _tried(call: Turn) -> list[Turn]:
    """A call of the calculator, and its result as `agent/tools.py` gives it."""
    expression = call.data.decode().partition('": "')[2].removesuffix('"}')
    try:
        result = calculator.calculate(expression)
    except ValueError as error:
        result = f"error: {error}"
    return [call, Turn(Role.RESULT, result.encode())]


def _wrong(expression: str, rng: np.random.Generator) -> str:
    """An expression that the calculator refuses."""
    return str(rng.choice([f"({expression}", f"{expression})", f"{expression}="]))


def _plain(rng: np.random.Generator) -> Question:
    """A question without anything to calculate."""
    if rng.random() < 0.5:
        first, second = (int(x) for x in rng.integers(10, size=2))
        text = str(rng.choice(QUESTIONS)).format(a=first, op="+", b=second)
        return Question(text.encode(), str(first + second).encode(), "digits", "", 1)
    letters = rng.choice(list(_LETTERS), size=rng.integers(1, _MAX_WORD + 1))
    word = "".join(letters)
    return Question(_repeat(word), word.encode(), "repeat", "", 0)


def _repeat(word: str) -> bytes:
    return f"repeat {word}".encode()
