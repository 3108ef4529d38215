"""Copy: repeat, after SEP, the bytes that came before it.

    tokens    3   1   2  SEP  3   1
    labels    -   -   -   3   1   2

The bytes are uniform, so nothing but a memory of them helps. Lengths vary from example to example:
for one fixed length, a constant delay would be enough.
"""

import dataclasses

import numpy as np

from spectral_pod import shapes
from spectral_pod.data.tasks.task import DrawnTask
from spectral_pod.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Copy(DrawnTask):
    """Bytes, and the same bytes again."""

    name = "copy"
    version = 1

    length: int = 32  # the most bytes that are copied
    min_length: int = 1  # the fewest; each number between them is equally likely
    alphabet: int = 16  # bytes are below this number

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_length <= self.length:
            raise ConfigError(
                f"config.data.options.min_length, length are {self.min_length}, {self.length}; "
                "copy needs 1 <= min_length <= length"
            )
        if not 2 <= self.alphabet <= 256:
            raise ConfigError(
                f"config.data.options.alphabet is {self.alphabet}; copy has 2 to 256 bytes"
            )

    @property
    def max_length(self) -> int:
        """The bytes twice."""
        return 2 * self.length

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels int32 [2 n], n uniform in `min_length`..`length`."""
        num_bytes = rng.integers(self.min_length, self.length + 1)
        data = rng.integers(self.alphabet, size=num_bytes, dtype=np.int32)
        tokens = np.concatenate([data, np.asarray([shapes.SEP], np.int32), data[:-1]])
        return tokens, np.concatenate([np.full_like(data, -1), data])
