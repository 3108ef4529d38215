"""Examples that are drawn where they are needed; nothing is stored.

Example i of a split follows from (seed, split, i) alone, so any process can draw any row.
"""

from collections.abc import Callable

import numpy as np

from spectral_pod.data.pipeline import Batch
from spectral_pod.errors import ConfigError
from spectral_pod.seeds import entropy
from spectral_pod.shapes import PAD

SPLITS = ("train", "validation", "test")


class Drawn:
    """Batches of the examples of a drawn task: without end, or in order and once."""

    def __init__(
        self,
        draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
        split: str,
        *,
        max_length: int,
        batch_size: int,
        seq_len: int,
        seed: int,
        num_records: int,
        repeat: bool = False,
    ):
        """Examples 0 to `num_records` - 1 of a split, once or, with `repeat`, again and again.

        With `repeat`, `num_records` 0 means that no example comes twice. `draw` and `max_length`
        are those of a `tasks.DrawnTask`.

        Raises:
          ConfigError: there is no such split, it would be empty, or examples may be longer than
            `seq_len`.
        """
        if split not in SPLITS:
            raise ConfigError(f"drawn tasks have splits {list(SPLITS)}, not {split!r}")
        if not (num_records or repeat):
            raise ConfigError(f"split {split!r} would hold no examples")
        if max_length > seq_len:
            raise ConfigError(
                f"config.data.seq_len is {seq_len}; with these config.data.options examples have "
                f"up to {max_length} tokens: raise it, or ask for shorter ones"
            )
        self._draw, self._seed, self._split = draw, seed, split
        self._repeat = repeat
        self.batch_size, self.seq_len, self.num_records = batch_size, seq_len, num_records

    @property
    def steps_per_epoch(self) -> int:
        """Batches that cover every example, the last one padded; 0 where there is no end."""
        return -(-self.num_records // self.batch_size)

    def records(self, step: int, rows: np.ndarray) -> np.ndarray:
        """int64 [b]: the example in each of those rows of a step's batch; -1 is padding."""
        position = step * self.batch_size + rows.astype(np.int64)
        if self._repeat:
            return position % self.num_records if self.num_records else position
        return np.where(position < self.num_records, position, -1)

    def rows(self, step: int, rows: np.ndarray) -> Batch:
        """Those rows of a step's batch, as numpy arrays [b, L]: see `pipeline.Source`."""
        shape = len(rows), self.seq_len
        tokens, labels = np.full(shape, PAD, np.int32), np.full(shape, -1, np.int32)
        for row, record in enumerate(self.records(step, rows)):
            if record >= 0:
                data, answers = self.draw(int(record))
                tokens[row, : len(data)], labels[row, : len(answers)] = data, answers
        valid = labels >= 0
        return {"tokens": tokens, "labels": np.where(valid, labels, 0), "valid": valid}

    def draw(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels int32 [n] of one example; -1 is the label of what is not scored."""
        return self._draw(generator(self._seed, self._split, record))


def generator(seed: int, split: str, record: int) -> np.random.Generator:
    """The random numbers of an example."""
    key = np.random.SeedSequence(entropy(seed), spawn_key=(SPLITS.index(split), record))
    return np.random.default_rng(key)
