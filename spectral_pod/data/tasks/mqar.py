"""Multi-query associative recall: keys with values, then the keys again; what were the values?

    symbols    2   8   4   7   0   0   4   0   0   0   2   0
    labels     -   -   -   -   -   -   7   -   -   -   8   -

The generator of Zoology (Arora et al. 2023, arXiv:2312.04927; `zoology/data/multiquery_ar.py`), one
example at a time: keys from 1 to V/2 - 1, values from V/2 to V - 1, none twice; the gap of a query
follows a power law; the label of a query is its value, at the query itself; other places hold
random symbols, which may be keys or values.
"""

import dataclasses

import numpy as np

from spectral_pod import shapes
from spectral_pod.data.tasks.task import DrawnTask, renamed
from spectral_pod.errors import ConfigError

Settings = tuple[tuple[int, int], ...]  # (symbols, keys) of an example

# Those of Zoology's figure on recall. There the first training setting has five times the examples
# of any other; here all are drawn equally often.
TRAIN_SETTINGS: Settings = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
TEST_SETTINGS: Settings = (
    (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256),
)  # fmt: skip

_SPECIAL = range(256, shapes.VOCAB_SIZE)


@dataclasses.dataclass(frozen=True)
class Mqar(DrawnTask):
    """Keys with their values, and queries of all keys."""

    name = "mqar"
    version = 1

    settings: Settings = TRAIN_SETTINGS  # one of these is drawn for each example
    num_symbols: int = renamed("vocab_size", 8192)  # V, even or odd
    # The probability of the g-th place for a query is proportional to g^(power_a - 1).
    power_a: float = 0.01
    random_non_queries: bool = True  # places without a query hold random symbols, or else 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.settings:
            raise ConfigError("config.data.options.settings is empty; mqar needs at least one")
        if self.power_a <= 0:
            raise ConfigError(f"config.data.options.power_a is {self.power_a}; it must be positive")
        for length, num_pairs in self.settings:
            if length % 2 or not 1 <= num_pairs <= length // 4:
                raise ConfigError(
                    f"config.data.options.settings has {(length, num_pairs)}: a length must be "
                    "even and hold four symbols for each of its keys"
                )
            if num_pairs > self.num_symbols // 2 - 1:
                raise ConfigError(
                    f"config.data.options.vocab_size is {self.num_symbols}, too small for the "
                    f"{num_pairs} keys of the setting {(length, num_pairs)}"
                )

    @property
    def num_classes(self) -> int:
        """Symbol s is class s."""
        return self.num_symbols

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: one for each symbol, and the special tokens."""
        return max(self.num_symbols, _SPECIAL.start) + len(_SPECIAL)

    @property
    def max_length(self) -> int:
        """Symbols of the longest setting."""
        return max(length for length, _ in self.settings)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels int32 [n] of one example; labels are -1 where nothing is scored."""
        length, num_pairs = self.settings[rng.integers(len(self.settings))]
        first_value = self.num_symbols // 2
        keys = 1 + rng.choice(first_value - 1, num_pairs, replace=False)
        values = rng.choice(self.num_symbols - first_value, num_pairs, replace=False) + first_value

        num_places = length // 2 - num_pairs  # every second symbol after the pairs
        weights = np.arange(1, num_places + 1) ** (self.power_a - 1)
        places = rng.choice(num_places, num_pairs, replace=False, p=weights / weights.sum())
        queries = 2 * (num_pairs + places)

        symbols = np.zeros(length, np.int64)
        symbols[0 : 2 * num_pairs : 2], symbols[1 : 2 * num_pairs : 2] = keys, values
        symbols[queries] = keys
        labels = np.full(length, -1, np.int32)
        labels[queries] = values
        if self.random_non_queries:
            empty = symbols == 0
            symbols[empty] = rng.integers(self.num_symbols, size=empty.sum())
        return tokens_of(symbols).astype(np.int32), labels


def tokens_of(symbols: np.ndarray) -> np.ndarray:
    """Symbols as tokens: from 256 on they make room for the special tokens of every vocabulary."""
    return np.where(symbols < _SPECIAL.start, symbols, symbols + len(_SPECIAL))
