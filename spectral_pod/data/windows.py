"""Windows of a stream of bytes or tokens with the next one as label, for language modelling.

The stream concatenates the documents of a split, each followed by EOS:

    position      0   1   2   3   4   5   6
    stream        a   b   c  EOS  d   e  EOS          documents "abc" and "de"
    tokens            b   c  EOS  d                   the window of 4 that starts at 1
    labels            c  EOS  d   e

What is a byte here can also be a token of a larger vocabulary (`data/vocabulary.py`).
"""

from collections.abc import Mapping

import numpy as np

from spectral_pod.data.byte_store import Split
from spectral_pod.data.pipeline import Batch
from spectral_pod.data.vocabulary import Vocabulary
from spectral_pod.errors import DataError
from spectral_pod.seeds import entropy
from spectral_pod.shapes import EOS, PAD, symbol

_BYTES = Vocabulary()
EOS_CLASS = _BYTES.num_tokens  # the class of byte b is b
NUM_CLASSES = EOS_CLASS + 1


class Windows:
    """Batches of windows of one split: endless with random starts, or once in order."""

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seq_len: int,
        num_documents: int = 0,
        shuffle_seed: int | None = None,
        vocabulary: Vocabulary = _BYTES,
        totals: Mapping[str, int] | None = None,
    ):
        """Reads the first `num_documents` documents of `split`, or all of them if that is 0.

        Without a `shuffle_seed` windows are read in order: every token of the stream but the first
        is predicted exactly once, and the last window is padded. With one, the start of every
        window is uniformly distributed. The documents are tokens of a `vocabulary`, in its dtype.
        `totals` are facts about their text that an evaluation needs (`objectives.NextToken`).

        Raises:
          DataError: the stream is empty, or, if shuffled, too short for one window.
        """
        self._split, self.batch_size, self.seq_len = split, batch_size, seq_len
        self._seed, self._vocabulary, self.totals = shuffle_seed, vocabulary, dict(totals or {})
        size = vocabulary.dtype.itemsize
        self._ends = split.offsets[1 : 1 + (num_documents or len(split))] // size
        self._eos = self._ends + np.arange(len(self._ends))  # positions of EOS in the stream
        self._stop = int(self._eos[-1]) + 1 if len(self._eos) else 0
        if self._stop < 2:
            raise DataError(f"split {split.name!r} holds no bytes to predict")
        if shuffle_seed is not None and self._stop <= seq_len:
            raise DataError(
                f"split {split.name!r} has {self._stop} bytes and document ends, too few for "
                f"windows of config.data.seq_len = {seq_len}; it must be below that"
            )

    @property
    def num_records(self) -> int:
        """The number of consecutive windows that cover the stream."""
        return -(-(self._stop - 1) // self.seq_len)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that contain as many windows, the last one padded."""
        return -(-self.num_records // self.batch_size)

    def starts(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Where the windows in the given rows of a step's batch start in the stream, int64 [b]."""
        if self._seed is None:
            return (step * self.batch_size + rows) * self.seq_len
        # One generator per step draws the starts of all rows, so every process gets the same ones.
        rng = np.random.default_rng(np.random.SeedSequence(entropy(self._seed), spawn_key=(step,)))
        return rng.integers(self._stop - self.seq_len, size=self.batch_size)[rows]

    def rows(self, step: int, rows: np.ndarray) -> Batch:
        """The given rows of a step's batch, as numpy arrays [b, L]: see `pipeline.Source`."""
        starts = np.minimum(self.starts(step, rows), self._stop)
        stops = np.minimum(starts + self.seq_len + 1, self._stop)
        before, after = np.searchsorted(self._eos, starts), np.searchsorted(self._eos, stops)
        first, last = starts - before, stops - after  # byte offsets: without the document ends
        shape = len(rows), self.seq_len
        tokens = np.full(shape, PAD, np.int32)
        labels, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
        dtype, end = self._vocabulary.dtype, self._vocabulary.num_tokens
        ranges = list(zip(first * dtype.itemsize, last * dtype.itemsize))
        for row, data in enumerate(self._split.read_ranges(ranges)):
            ends = self._ends[before[row] : after[row]] - first[row]
            window = np.insert(data.view(dtype).astype(np.int32), ends, end)
            n = len(window[1:])
            tokens[row, :n] = np.where(window[:n] == end, EOS, symbol(window[:n]))
            labels[row, :n], valid[row, :n] = window[1:], True
        return {"tokens": tokens, "labels": labels, "valid": valid}
