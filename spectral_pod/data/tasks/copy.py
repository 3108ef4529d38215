"""Copy: say again, after SEP, the bytes that came before it.

    tokens    3   1   2  SEP  3   1
    labels    -   -   -   3   1   2

The bytes are uniform, so nothing but a memory of them helps. Lengths vary from example to example:
for one fixed length, a constant delay would be enough.
"""

from typing import Any

import numpy as np

from spectral_pod import shapes
from spectral_pod.errors import ConfigError

VERSION = 1
OBJECTIVE = "positions"


def num_classes(**options: Any) -> int:
    """Byte b is class b."""
    return 256


def vocab_size(**options: Any) -> int:
    """Rows of the embedding: bytes and special tokens."""
    return shapes.VOCAB_SIZE


def max_length(*, length: int = 32, min_length: int = 1, alphabet: int = 16) -> int:
    """Tokens in the longest example of `draw` with the same options.

    Raises:
      ConfigError: the options are impossible.
    """
    if not 1 <= min_length <= length:
        raise ConfigError(
            f"config.data.options.min_length, length are {min_length}, {length}; copy needs "
            "1 <= min_length <= length"
        )
    if not 2 <= alphabet <= 256:
        raise ConfigError(f"config.data.options.alphabet is {alphabet}; copy has 2 to 256 bytes")
    return 2 * length


def draw(
    rng: np.random.Generator, *, length: int = 32, min_length: int = 1, alphabet: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels int32 [2 n], n uniform in `min_length`..`length`, bytes below `alphabet`.

    Labels are -1 where nothing is scored.
    """
    num_bytes = rng.integers(min_length, length + 1)
    data = rng.integers(alphabet, size=num_bytes, dtype=np.int32)
    tokens = np.concatenate([data, np.asarray([shapes.SEP], np.int32), data[:-1]])
    return tokens, np.concatenate([np.full_like(data, -1), data])
