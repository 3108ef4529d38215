"""Questions that agents are asked, by kind, with their answers and the calls that find them.

Of questions that need a tool, numbers whose two first digits are in `HELD_OUT`, words that begin
with a letter of `HELD_OUT_LETTERS` and dates of years whose two last digits are in `HELD_OUT` are
only in those of validation and test: of each question the first of these that it has. The ways to
ask that are held out are only in those of test.
"""

import datetime
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from spectral_pod.agent import calculator
from spectral_pod.data.tasks.conversation_task import LETTERS, random_word

HELD_OUT = range(37, 46)  # a tenth of all
HELD_OUT_LETTERS = "hqt"  # likewise
QUESTIONS = (
    "what is {a} {op} {b}?", "calculate {a}{op}{b}", "{a} {op} {b} =", "how much is {a}{op}{b}?",
)  # fmt: skip
HELD_OUT_QUESTIONS = ("please tell me {a} {op} {b}", "I need the value of {a}{op}{b}")
REPEAT = "repeat {word}"
TABLES = ("{table}. what is {key}?", "of {table}, {key} is")
HELD_OUT_TABLES = ("tell me {key}, given {table}",)
MAX_WORD, MAX_NUMBERS, MAX_ROWS, MAX_KEY = 8, 5, 4, 4
_KINDS = {"+": "addition", "-": "subtraction", "*": "multiplication"}


class Question(NamedTuple):
    """A question with its answer.

    Attributes:
      kind: "addition", "subtraction" or "multiplication"; "strings", "lists" or "dates"; and, where
        no tool is needed, "digits", "repeat" or "table".
      call: of the tool that finds the answer; b"" where none is needed.
      digits: of the longer number; 0 where there is none to calculate with.
    """

    text: bytes
    answer: bytes
    kind: str
    call: bytes
    digits: int

    @property
    def tool(self) -> str:
        """The name of the tool that finds the answer, or ""."""
        return self.call.partition(b" ")[0].decode()

    @property
    def result(self) -> bytes:
        """What its call has for its result: Python's is what the code prints."""
        return self.answer + b"\n" * (self.tool == "python")


class Code(NamedTuple):
    """A question that a line of Python answers.

    Attributes:
      texts: ways to ask; the last is held out.
      code: what prints the answer.
      answer: the same from the values that fill `texts` and `code`.
    """

    kind: str
    texts: tuple[str, ...]
    code: str
    answer: Callable[..., object]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(", ")]


def _date(text: str) -> datetime.date:
    return datetime.date.fromisoformat(text)


CODE = (
    Code(
        "strings",
        ("spell {word} backwards", "reverse the word {word}", "write {word} from its end"),
        "print('{word}'[::-1])",
        lambda word, **_: "".join(reversed(word)),
    ),
    Code(
        "strings",
        ("write {word} in capitals", "{word} in upper case", "the capital letters of {word}"),
        "print('{word}'.upper())",
        lambda word, **_: word.upper(),
    ),
    Code(
        "strings",
        ("how often is {letter} in {word}?", "count {letter} in {word}",
         "how many {letter} are in {word}?"),
        "print('{word}'.count('{letter}'))",
        lambda word, letter, **_: sum(one == letter for one in word),
    ),
    Code(
        "lists",
        ("sort {numbers}", "in order: {numbers}", "{numbers}, sorted"),
        "print(sorted([{numbers}]))",
        lambda numbers, **_: sorted(_numbers(numbers)),
    ),
    Code(
        "lists",
        ("add up {numbers}", "the sum of {numbers}", "what do {numbers} add up to?"),
        "print(sum([{numbers}]))",
        lambda numbers, **_: sum(_numbers(numbers)),
    ),
    Code(
        "lists",
        ("the largest of {numbers}", "what is the greatest of {numbers}?", "max of {numbers}"),
        "print(max([{numbers}]))",
        lambda numbers, **_: sorted(_numbers(numbers))[-1],
    ),
    Code(
        "dates",
        ("which weekday was {date}?", "the day of the week of {date}", "what day was {date}?"),
        "from datetime import date; print(date.fromisoformat('{date}').strftime('%A'))",
        lambda date, **_: _date(date).strftime("%A"),
    ),
    Code(
        "dates",
        ("how many days are from {date} to {to}?", "days between {date} and {to}",
         "{date} to {to} in days"),
        "from datetime import date; a, b = map(date.fromisoformat, ['{date}', '{to}']); "
        "print((b - a).days)",
        lambda date, to, **_: _date(to).toordinal() - _date(date).toordinal(),
    ),
)  # fmt: skip


def arithmetic(split: str, digits: int, rng: np.random.Generator) -> Question:
    """Two numbers of at most that many digits, the first in the ranges of the split."""
    least = 1 if split == "train" else min(2, digits)
    first = _number(int(rng.integers(least, digits + 1)), rng)
    while first > 9 and is_held_out(first) == (split == "train"):
        first = _number(len(str(first)), rng)
    second = _number(int(rng.integers(1, digits + 1)), rng)
    sign = str(rng.choice(list("+-*")))
    asked = HELD_OUT_QUESTIONS if split == "test" else QUESTIONS
    return calculation(str(rng.choice(asked)), first, sign, second)


def calculation(text: str, first: int, sign: str, second: int) -> Question:
    """A question of `arithmetic`, asked like that."""
    expression = f"{first}{sign}{second}"
    return Question(
        text.format(a=first, op=sign, b=second).encode(),
        calculator.calculate(expression).encode(),
        _KINDS[sign],
        call("calculator", expression=expression),
        len(str(max(first, second))),
    )


def coded(split: str, rng: np.random.Generator) -> Question:
    """A question of `CODE`, about a word, numbers or dates of the split."""
    code = CODE[rng.integers(len(CODE))]
    word = random_word(1, MAX_WORD, rng)
    while (word[0] in HELD_OUT_LETTERS) == (split == "train"):
        word = random_word(1, MAX_WORD, rng)
    numbers = rng.integers(100, size=rng.integers(2, MAX_NUMBERS + 1))
    while (int(numbers[0]) in HELD_OUT) == (split == "train"):
        numbers[0] = rng.integers(100)
    date, to = _day(rng), _day(rng)
    while (date.year % 100 in HELD_OUT) == (split == "train"):
        date = _day(rng)
    letter = str(rng.choice(list(word) if rng.random() < 0.7 else list(LETTERS)))
    text = code.texts[-1] if split == "test" else str(rng.choice(code.texts[:-1]))
    values = {"word": word, "letter": letter, "date": str(date), "to": str(to)}
    return fill(code, text, values | {"numbers": ", ".join(map(str, numbers))})


def fill(code: Code, text: str, values: dict[str, str]) -> Question:
    """The question with these values, asked like that."""
    return Question(
        text.format(**values).encode(),
        str(code.answer(**values)).encode(),
        code.kind,
        call("python", code=code.code.format(**values)),
        0,
    )


def plain(split: str, rng: np.random.Generator) -> Question:
    """A question that needs no tool: two digits, a word to repeat, or a value of a table."""
    kind = rng.integers(3)
    if kind == 0:
        first, second = (int(x) for x in rng.integers(10, size=2))
        text = str(rng.choice(QUESTIONS)).format(a=first, op="+", b=second)
        return Question(text.encode(), str(first + second).encode(), "digits", b"", 1)
    if kind == 1:
        word = random_word(1, MAX_WORD, rng)
        return Question(REPEAT.format(word=word).encode(), word.encode(), "repeat", b"", 0)
    count = int(rng.integers(2, MAX_ROWS + 1))
    rows = {random_word(2, MAX_KEY, rng): str(rng.integers(1000)) for _ in range(count)}
    key = str(rng.choice(list(rows)))
    asked = HELD_OUT_TABLES if split == "test" else TABLES
    return looked_up(str(rng.choice(asked)), rows, key)


def looked_up(text: str, rows: dict[str, str], key: str) -> Question:
    """A question for the value of a key, asked like that."""
    table = ", ".join(f"{name} is {value}" for name, value in rows.items())
    asked = text.format(table=table, key=key).encode()
    return Question(asked, rows[key].encode(), "table", b"", 0)


def longest(digits: int, *, python: bool) -> Iterator[Question]:
    """Questions of each kind that are as long as can be."""
    most = int("9" * digits)
    yield calculation(max(QUESTIONS + HELD_OUT_QUESTIONS, key=len), most, "*", most)
    word = "x" * MAX_WORD
    yield Question(REPEAT.format(word=word).encode(), word.encode(), "repeat", b"", 0)
    keys = [letter * MAX_KEY for letter in LETTERS[:MAX_ROWS]]
    text = max(TABLES + HELD_OUT_TABLES, key=len)
    yield looked_up(text, dict.fromkeys(keys, "999"), keys[0])
    if python:
        values = {"word": word, "letter": "x", "date": "1900-01-01", "to": "2099-12-31"}
        values["numbers"] = ", ".join(["99"] * MAX_NUMBERS)
        for code in CODE:
            yield fill(code, max(code.texts, key=len), values)


def call(tool: str, **arguments: Any) -> bytes:
    """A call as `agent/tools.py` reads it."""
    return f"{tool} {json.dumps(arguments)}".encode()


def is_held_out(number: int) -> bool:
    """Whether a number is kept out of training."""
    return number > 9 and int(str(number)[:2]) in HELD_OUT


def _number(digits: int, rng: np.random.Generator) -> int:
    """A number of exactly that many digits."""
    first = "" if digits == 1 else str(rng.integers(1, 10))
    return int(first + "".join(map(str, rng.integers(10, size=digits - len(first)))))


def _day(rng: np.random.Generator) -> datetime.date:
    """A day of the years 1900 to 2099."""
    first, last = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
    return datetime.date.fromordinal(int(rng.integers(first, last + 1)))
