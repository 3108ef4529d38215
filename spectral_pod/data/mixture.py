"""Batches that mix rows of several sources in proportion to weights.

The rows of all batches, in order, are assigned to the sources as evenly as the weights allow, and
each source supplies its own rows in its own order. So a mixed batch, too, is a pure function of its
number, and among the first n rows each source has its share of n to within a few rows.
"""

from collections.abc import Sequence

import grain
import numpy as np

from spectral_pod.data.pipeline import Batch, Source
from spectral_pod.errors import DataError

_ENDLESS = 1 << 40  # rows


class Mixture:
    """Endless batches from endless sources, all with the same batch size and length."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        """Mixes `sources` by `weights`, which need not sum to 1.

        Raises:
          DataError: a weight is not positive.
        """
        if not all(weight > 0 for weight in weights):
            raise DataError(f"the weights of a mixture are {tuple(weights)}; all must be positive")
        self._sources = list(sources)
        self.batch_size, self.seq_len = sources[0].batch_size, sources[0].seq_len
        rows = [
            grain.MapDataset.range(_ENDLESS).map(lambda row, i=i: (i, row))
            for i in range(len(sources))
        ]
        self._assigned = grain.MapDataset.mix(rows, weights=list(weights))

    @property
    def num_records(self) -> int:
        """The number of records of all sources."""
        return sum(source.num_records for source in self._sources)

    @property
    def steps_per_epoch(self) -> int:
        """Batches with as many rows as all sources have records, whatever the weights."""
        return -(-self.num_records // self.batch_size)

    def rows(self, step: int, rows: np.ndarray) -> Batch:
        """The given rows of a step's batch, as numpy arrays: see `pipeline.Source`."""
        assigned = np.asarray([self._assigned[step * self.batch_size + int(row)] for row in rows])
        source_index, own_row = assigned[:, 0], assigned[:, 1]
        own_step, own_row = np.divmod(own_row, self.batch_size)
        batch: Batch = {}
        # A batch takes consecutive rows of each source, from at most two steps of that source.
        for i, source_step in sorted(set(zip(source_index.tolist(), own_step.tolist()))):
            selected = (source_index == i) & (own_step == source_step)
            for name, values in self._sources[i].rows(source_step, own_row[selected]).items():
                if name not in batch:
                    batch[name] = np.zeros((len(rows), *values.shape[1:]), values.dtype)
                batch[name][selected] = values
        return batch
