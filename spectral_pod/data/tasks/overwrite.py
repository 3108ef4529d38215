"""Overwrite: `recall` where some names get a new value later; the newest is the answer.

    c=7, a=10, c=58, k=42, b=3, k=0. What is k? 0. What is a? 10.

The first question or a later one asks for a name that was overwritten, in every example. Names are
written in random order, a name may be overwritten more than once, and no value is written twice,
so an answer tells which write it is from.
"""

import numpy as np

from spectral_pod.data.tasks import recall
from spectral_pod.errors import ConfigError

VERSION = 1
OBJECTIVE = recall.OBJECTIVE
num_classes = recall.num_classes
vocab_size = recall.vocab_size


def max_length(*, num_pairs: int = 8, num_overwrites: int = 4, num_questions: int = 4) -> int:
    """Tokens in the longest example of `draw` with the same options.

    Raises:
      ConfigError: the options are impossible.
    """
    recall.check(num_pairs, num_questions)
    if not 1 <= num_overwrites <= recall.NUM_VALUES - num_pairs:
        raise ConfigError(
            f"config.data.options.num_overwrites is {num_overwrites}; with num_pairs it must make "
            f"at most {recall.NUM_VALUES} values, and at least 1 is overwritten"
        )
    return recall.longest(num_pairs + num_overwrites, num_questions)


def draw(
    rng: np.random.Generator,
    *,
    num_pairs: int = 8,
    num_overwrites: int = 4,
    num_questions: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels int32 [n] of one text; labels are -1 where nothing is scored."""
    names = rng.choice(len(recall.NAMES), num_pairs, replace=False)
    overwritten = rng.choice(names, num_overwrites)
    written = rng.permutation(np.concatenate([names, overwritten]))
    values = rng.choice(recall.NUM_VALUES, len(written), replace=False)
    assignments = list(zip(written, values))
    newest = dict(assignments)
    # One that was overwritten, then any others, asked in random order.
    others = rng.permutation(names[names != overwritten[0]])[: num_questions - 1]
    asked = rng.permutation(np.append(others, overwritten[0]))
    return recall.write(assignments, [(name, newest[name]) for name in asked])
