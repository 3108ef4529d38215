"""Tasks that draw conversations, in the symbols of `agent/protocol.py`."""

import abc
import dataclasses
import functools

import numpy as np

from spectral_pod.agent import protocol
from spectral_pod.data.tasks.task import Draw, DrawnTask


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
