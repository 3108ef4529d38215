"""Multi-query associative recall: keys with values, then the keys again; what were the values?

    symbols    2   8   4   7   0   0   4   0   0   0   2   0
    labels     -   -   -   -   -   -   7   -   -   -   8   -

The generator of Zoology (Arora et al. 2023, arXiv:2312.04927; `zoology/data/multiquery_ar.py`), one
example at a time: keys from 1 to V/2 - 1, values from V/2 to V - 1, none twice; the gap of a query
follows a power law; the label of a query is its value, at the query itself; other places hold
random symbols, which may be keys or values.
"""

from typing import Any

import numpy as np

from spectral_pod import shapes
from spectral_pod.errors import ConfigError

VERSION = 1
OBJECTIVE = "positions"

Settings = tuple[tuple[int, int], ...]  # (symbols, keys) of an example

# Those of Zoology's figure on recall. There the first training setting has five times the examples
# of any other; here all are drawn equally often.
TRAIN_SETTINGS: Settings = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
TEST_SETTINGS: Settings = (
    (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256),
)  # fmt: skip

_SPECIAL = range(256, shapes.VOCAB_SIZE)


def num_classes(*, vocab_size: int = 8192, **options: Any) -> int:
    """Symbol s is class s."""
    return vocab_size


def vocab_size(*, vocab_size: int = 8192, **options: Any) -> int:
    """Rows of the embedding: one a symbol, and the special tokens."""
    return max(vocab_size, _SPECIAL.start) + len(_SPECIAL)


def tokens_of(symbols: np.ndarray) -> np.ndarray:
    """Symbols as tokens: from 256 on they make room for the special tokens of every vocabulary."""
    return np.where(symbols < _SPECIAL.start, symbols, symbols + len(_SPECIAL))


def max_length(
    *,
    settings: Settings = TRAIN_SETTINGS,
    vocab_size: int = 8192,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> int:
    """Tokens in the longest example of `draw` with the same options.

    Raises:
      ConfigError: the options are impossible.
    """
    if not settings:
        raise ConfigError("config.data.options.settings is empty; mqar needs at least one")
    if power_a <= 0:
        raise ConfigError(f"config.data.options.power_a is {power_a}; it must be positive")
    for length, num_pairs in settings:
        if length % 2 or not 1 <= num_pairs <= length // 4:
            raise ConfigError(
                f"config.data.options.settings has {(length, num_pairs)}: a length must be even "
                "and hold four symbols for each of its keys"
            )
        if num_pairs > vocab_size // 2 - 1:
            raise ConfigError(
                f"config.data.options.vocab_size is {vocab_size}, too small for the {num_pairs} "
                f"keys of the setting {(length, num_pairs)}"
            )
    return max(length for length, _ in settings)


def draw(
    rng: np.random.Generator,
    *,
    settings: Settings = TRAIN_SETTINGS,
    vocab_size: int = 8192,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels int32 [n] of one example; labels are -1 where nothing is scored.

    Args:
      settings: pairs (n, number of keys); one is drawn for each example.
      vocab_size: V, even or odd; the embedding needs `vocab_size()` rows.
      power_a: the probability of the g-th place for a query is proportional to g^(power_a - 1).
      random_non_queries: whether places without a query hold random symbols; else they hold 0.
    """
    length, num_pairs = settings[rng.integers(len(settings))]
    keys = 1 + rng.choice(vocab_size // 2 - 1, num_pairs, replace=False)
    values = vocab_size // 2 + rng.choice(vocab_size - vocab_size // 2, num_pairs, replace=False)

    num_places = length // 2 - num_pairs  # every second symbol after the pairs
    weights = np.arange(1, num_places + 1) ** (power_a - 1)
    places = rng.choice(num_places, num_pairs, replace=False, p=weights / weights.sum())
    queries = 2 * (num_pairs + places)

    symbols = np.zeros(length, np.int64)
    symbols[0 : 2 * num_pairs : 2], symbols[1 : 2 * num_pairs : 2] = keys, values
    symbols[queries] = keys
    labels = np.full(length, -1, np.int32)
    labels[queries] = values
    if random_non_queries:
        empty = symbols == 0
        symbols[empty] = rng.integers(vocab_size, size=empty.sum())
    return tokens_of(symbols).astype(np.int32), labels
