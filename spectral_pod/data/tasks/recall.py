"""Recall: text that gives names their values, and then asks for some of them.

    c=7, a=10, k=42, b=3. What is k? 42. What is a? 10.

Only the digits of the answers are scored. Names are single letters, each has one value, and no two
values are equal, so a right answer has been looked up.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from spectral_pod.data.tasks.task import DrawnTask
from spectral_pod.errors import ConfigError

NAMES = "abcdefghijklmnopqrstuvwxyz"
NUM_VALUES = 100  # 0 to 99

Pairs = Sequence[tuple[int, int]]  # an index into NAMES, and a value


@dataclasses.dataclass(frozen=True)
class Recall(DrawnTask):
    """Assignments, and questions about them."""

    name = "recall"
    version = 1

    num_pairs: int = 8  # names that get a value
    num_questions: int = 4  # names that are asked for, each once

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_pairs <= len(NAMES):
            raise ConfigError(
                f"config.data.options.num_pairs is {self.num_pairs}; there are {len(NAMES)} names"
            )
        if not 1 <= self.num_questions <= self.num_pairs:
            raise ConfigError(
                f"config.data.options.num_questions is {self.num_questions}; each of the "
                f"num_pairs = {self.num_pairs} names is asked for at most once"
            )

    @property
    def max_length(self) -> int:
        """Tokens of a text whose values all have as many digits as values can have."""
        return longest(self.num_pairs, self.num_questions)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels int32 [n] of one text; labels are -1 where nothing is scored."""
        names = rng.choice(len(NAMES), self.num_pairs, replace=False)
        values = rng.choice(NUM_VALUES, self.num_pairs, replace=False)
        asked = rng.choice(self.num_pairs, self.num_questions, replace=False)
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
