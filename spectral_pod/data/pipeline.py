"""Batches from records, and global arrays from batches; a batch is a pure function of (seed, step).

There is no iterator state to save: a run that starts at step s reads what an uninterrupted run
reads at step s, with any number of processes, each of which reads only its own rows.

Sources of batches are `Batches` of labelled records, defined here, `windows.Windows` of a stream of
bytes, and `drawn.Drawn`, examples that are generated on the fly.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np
from grain.experimental import index_shuffle
from jax.sharding import NamedSharding

from spectral_pod.data.byte_store import Split
from spectral_pod.errors import DataError
from spectral_pod.seeds import entropy
from spectral_pod.shapes import PAD

# tokens int32 [B, L], or [B, k * L] for records of k documents; labels int32 and valid bool, [B] or
# [B, L]. Only valid entries count in the loss and the metrics.
Batch = dict[str, Any]


class Source(Protocol):
    """Batches by number; sources constructed with equal arguments give equal batches."""

    batch_size: int
    seq_len: int

    @property
    def num_records(self) -> int:
        """Records, windows or examples per epoch; 0 if the source is endless."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, the last one padded."""

    def rows(self, step: int, rows: np.ndarray) -> Batch:
        """The given rows (int [b]) of a step's batch, as numpy arrays; called from threads.

        Where `valid` is False the label is 0; tokens are padded with PAD.
        """


class Batches:
    """Batches of the records of one split: shuffled and endless, or once in order."""

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seq_len: int,
        documents: int = 1,
        truncate: bool = False,
        num_records: int = 0,
        shuffle_seed: int | None = None,
    ):
        """Reads the first `num_records` records of `split`, or all of them if that is 0.

        A row concatenates the `documents` of a record, each padded to `seq_len`. Without a
        `shuffle_seed` records are read once, in order. `truncate` cuts documents to `seq_len`.

        Raises:
          DataError: the split is empty, its records have another number of documents, or one is
            longer than `seq_len` without `truncate`.
        """
        self._split, self.batch_size, self.seq_len = split, batch_size, seq_len
        self.num_records = min(num_records or len(split), len(split))
        self._seed = shuffle_seed
        if not self.num_records:
            raise DataError(f"split {split.name!r} holds no records")
        if split.documents != documents:
            raise DataError(
                f"split {split.name!r} has records of {split.documents} document(s), and "
                f"config.data.documents is {documents}"
            )
        self._documents = documents
        lengths = split.lengths[: self.num_records * documents]
        longest = int(np.argmax(lengths))
        if lengths[longest] > seq_len and not truncate:
            raise DataError(
                f"record {longest // documents} of split {split.name!r} has {lengths[longest]} "
                f"bytes, more than config.data.seq_len = {seq_len}; raise it, or set "
                "config.data.truncate"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches that contain every record once, the last one padded."""
        return -(-self.num_records // self.batch_size)

    def records(self, step: int, rows: Any = slice(None)) -> np.ndarray:
        """The record in each of the given rows of a step's batch, int64 [B]; -1 is padding.

        Shuffling applies a new permutation to every epoch, so each record occurs once per epoch.
        Batches in order end with padding.
        """
        position = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]
        if self._seed is None:
            return np.where(position < self.num_records, position, -1)
        epoch, index = np.divmod(position, self.num_records)
        # A keyed bijection of indices rather than a table needs constant memory.
        shuffle = functools.partial(index_shuffle, max_index=self.num_records - 1, rounds=4)
        seeds = {e: self._epoch_seed(e) for e in set(epoch.tolist())}
        pairs = zip(index.tolist(), epoch.tolist())
        return np.asarray([shuffle(i, seed=seeds[e]) for i, e in pairs], np.int64)

    def rows(self, step: int, rows: np.ndarray) -> Batch:
        """The given rows of a step's batch, as numpy arrays."""
        records = self.records(step, rows)
        labels, valid = np.zeros(len(rows), np.int32), records >= 0
        labels[valid] = self._split.labels[records[valid]]
        # A line of `tokens` is one document; those of a record are adjacent in its row.
        tokens = np.empty((len(rows) * self._documents, self.seq_len), np.int32)
        which = np.arange(self._documents)
        documents = (records[valid, None] * self._documents + which).ravel()
        lines = (np.flatnonzero(valid)[:, None] * self._documents + which).ravel()
        tokens[np.repeat(~valid, self._documents)] = PAD
        for line, data in zip(lines, self._split.read(documents), strict=True):
            tokens[line, : len(data)] = data[: self.seq_len]
            tokens[line, len(data) :] = PAD
        return {"tokens": tokens.reshape(len(rows), -1), "labels": labels, "valid": valid}

    def _epoch_seed(self, epoch: int) -> int:
        return int(np.random.SeedSequence([entropy(self._seed or 0), epoch]).generate_state(1)[0])


def load(
    source: Source,
    sharding: NamedSharding,
    start: int,
    stop: int,
    *,
    threads: int,
    prefetch: int,
) -> Iterator[Batch]:
    """Global arrays for steps start..stop-1, read ahead by threads.

    Args:
      source: where the batches come from; this process reads only the rows that it needs.
      sharding: how rows are split over devices.
      start, stop: the range of steps.
      threads: number of reading threads.
      prefetch: number of batches to read ahead.
    """
    indices = sharding.addressable_devices_indices_map((source.batch_size,))
    local_rows = sorted(
        {row for (s,) in indices.values() for row in range(*s.indices(source.batch_size))}
    )
    rows = np.asarray(local_rows)

    def read(step: int) -> Batch:
        return source.rows(int(step), rows)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    for local in grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options):
        yield {
            name: jax.make_array_from_callback(
                (source.batch_size, *values.shape[1:]), sharding, _picker(values, rows)
            )
            for name, values in local.items()
        }


def _picker(values: np.ndarray, rows: np.ndarray) -> Callable[[Any], np.ndarray]:
    """A function from a device's index into the global batch to its rows of `values`."""

    def pick(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(1 << 62)
        first, last = np.searchsorted(rows, [start, min(stop, rows[-1] + 1)])
        return values[first:last]

    return pick
