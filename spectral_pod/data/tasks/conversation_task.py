"""Tasks that draw conversations, in the symbols of `agent/protocol.py`.

Half of the questions of training begin with words that mean nothing: a model that has always seen
what it has to copy in a few places of a question copies from there, whatever stands in them.
"""

import abc
import dataclasses
import functools

import numpy as np

from spectral_pod.agent import protocol
from spectral_pod.data.tasks.task import Draw, DrawnTask

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS, _WORD = 2, 5  # of an opening, at most, and the letters of each
LONGEST_OPENING = _WORDS * (_WORD + 1)  # bytes


@dataclasses.dataclass(frozen=True)
class ConversationTask(DrawnTask):
    """A task of conversations, whose splits have questions of their own."""

    num_classes = protocol.NUM_CLASSES

    @property
    def vocab_size(self) -> int:
        """See `Task.vocab_size`."""
        return protocol.VOCAB_SIZE

    @abc.abstractmethod
    def example(self, split: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels int32 [n] of a conversation of a split: see `protocol.example`."""

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An example for training."""
        return self.example("train", rng)

    def drawer(self, split: str) -> Draw:
        """See `DrawnTask.drawer`."""
        return functools.partial(self.example, split)


def opening(rng: np.random.Generator) -> str:
    """In half of all cases words that mean nothing, each with a space behind it; else ""."""
    if rng.random() < 0.5:
        return ""
    words = [random_word(1, _WORD, rng) for _ in range(rng.integers(1, _WORDS + 1))]
    return " ".join([*words, ""])


def random_word(least: int, most: int, rng: np.random.Generator) -> str:
    """A word of that many random letters."""
    return "".join(rng.choice(list(LETTERS), size=rng.integers(least, most + 1)))
