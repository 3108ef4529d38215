"""Overwrite: `recall` where some names get a new value later; the newest is the answer.

    c=7, a=10, c=58, k=42, b=3, k=0. What is k? 0. What is a? 10.

The first question or a later one asks for a name that was overwritten, in every example. Names are
written in random order, a name may be overwritten more than once, and no value is written twice,
so an answer shows which assignment it is from.
"""

import dataclasses

import numpy as np

from spectral_pod.data.tasks import recall
from spectral_pod.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Overwrite(recall.Recall):
    """Assignments, some of which replace others, and questions about them."""

    name = "overwrite"
    version = 1

    num_overwrites: int = 4  # assignments to names that have a value already

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_overwrites <= recall.NUM_VALUES - self.num_pairs:
            raise ConfigError(
                f"config.data.options.num_overwrites is {self.num_overwrites}; with num_pairs it "
                f"must make at most {recall.NUM_VALUES} values, and at least 1 is overwritten"
            )

    @property
    def max_length(self) -> int:
        """Tokens of a text whose values all have as many digits as values can have."""
        return recall.longest(self.num_pairs + self.num_overwrites, self.num_questions)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels int32 [n] of one text; labels are -1 where nothing is scored."""
        names = rng.choice(len(recall.NAMES), self.num_pairs, replace=False)
        overwritten = rng.choice(names, self.num_overwrites)
        written = rng.permutation(np.concatenate([names, overwritten]))
        values = rng.choice(recall.NUM_VALUES, len(written), replace=False)
        assignments = list(zip(written, values))
        newest = dict(assignments)
        # One that was overwritten, then any others, asked in random order.
        others = rng.permutation(names[names != overwritten[0]])[: self.num_questions - 1]
        asked = rng.permutation(np.append(others, overwritten[0]))
        return recall.write(assignments, [(name, newest[name]) for name in asked])
