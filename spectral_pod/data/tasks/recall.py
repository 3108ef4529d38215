"""Recall: text that gives names their values, and then asks for some of them.

    c=7, a=10, k=42, b=3. What is k? 42. What is a? 10.

Only the digits of the answers are scored. Names are single letters, each has one value, and no two
values are equal, so a right answer has been looked up.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from spectral_pod import shapes
from spectral_pod.errors import ConfigError

VERSION = 1
OBJECTIVE = "positions"
NAMES = "abcdefghijklmnopqrstuvwxyz"
NUM_VALUES = 100  # 0 to 99

Pairs = Sequence[tuple[int, int]]  # an index into NAMES, and a value


def num_classes(**options: Any) -> int:
    """Byte b is class b."""
    return 256


def vocab_size(**options: Any) -> int:
    """Rows of the embedding: bytes and special tokens."""
    return shapes.VOCAB_SIZE


def max_length(*, num_pairs: int = 8, num_questions: int = 4) -> int:
    """Tokens in the longest example of `draw` with the same options.

    Raises:
      ConfigError: the options are impossible.
    """
    check(num_pairs, num_questions)
    return longest(num_pairs, num_questions)


def draw(
    rng: np.random.Generator, *, num_pairs: int = 8, num_questions: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels int32 [n] of one text; labels are -1 where nothing is scored."""
    names = rng.choice(len(NAMES), num_pairs, replace=False)
    values = rng.choice(NUM_VALUES, num_pairs, replace=False)
    asked = rng.choice(num_pairs, num_questions, replace=False)
    return write(list(zip(names, values)), [(names[i], values[i]) for i in asked])


def write(assignments: Pairs, answers: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The text of assignments and answered questions as tokens and labels, int32 [n]."""
    text = ", ".join(f"{NAMES[name]}={value}" for name, value in assignments) + "."
    scored = [False] * len(text)
    for name, value in answers:
        question, answer = f" What is {NAMES[name]}? ", str(value)
        text += f"{question}{answer}."
        scored += [False] * len(question) + [True] * len(answer) + [False]
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    # A label is the byte that follows; the text ends with the last byte that is scored.
    return data[:-2], np.where(scored, data, -1)[1:-1]


def longest(num_assignments: int, num_questions: int) -> int:
    """Tokens in a text whose values all have as many digits as values can have."""
    value = NUM_VALUES - 1
    tokens, _ = write([(0, value)] * num_assignments, [(0, value)] * num_questions)
    return len(tokens)


def check(num_pairs: int, num_questions: int) -> None:
    """Raises a ConfigError where there cannot be so many names, or questions about them."""
    if not 1 <= num_pairs <= len(NAMES):
        raise ConfigError(
            f"config.data.options.num_pairs is {num_pairs}; there are {len(NAMES)} names"
        )
    if not 1 <= num_questions <= num_pairs:
        raise ConfigError(
            f"config.data.options.num_questions is {num_questions}; each of the num_pairs = "
            f"{num_pairs} names is asked for at most once"
        )
