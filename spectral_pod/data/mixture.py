"""Batches whose rows come from several sources, in proportion to their weights.

The rows of all batches, one after the other, are dealt to the sources as evenly as their weights
allow; each source hands out its own rows in its own order. So a mixed batch is a pure function of
its number too, and among the first n rows each source has its share of n to within a few rows.
"""

from collections.abc import Sequence

import grain
import numpy as np

from spectral_pod.data.pipeline import Batch, Source
from spectral_pod.errors import DataError

_ENDLESS = 1 << 40  # rows


class Mixture:
    """Batches without end of sources without end, of equal batch size and length."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        """Weights need not add up to 1.

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
        self._dealt = grain.MapDataset.mix(rows, weights=list(weights))

    @property
    def num_records(self) -> int:
        """Of all sources."""
        return sum(source.num_records for source in self._sources)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold as many rows, whatever the weights."""
        return -(-self.num_records // self.batch_size)

    def rows(self, step: int, rows: np.ndarray) -> Batch:
        """Those rows of a step's batch, as numpy arrays: see `pipeline.Source`."""
        dealt = np.asarray([self._dealt[step * self.batch_size + int(row)] for row in rows])
        which, own_row = dealt[:, 0], dealt[:, 1]
        own_step, own_row = np.divmod(own_row, self.batch_size)
        batch: Batch = {}
        # A batch has consecutive rows of a source, of two of its steps at the most.
        for i, source_step in sorted(set(zip(which.tolist(), own_step.tolist()))):
            here = (which == i) & (own_step == source_step)
            for name, values in self._sources[i].rows(source_step, own_row[here]).items():
                if name not in batch:
                    batch[name] = np.zeros((len(rows), *values.shape[1:]), values.dtype)
                batch[name][here] = values
        return batch
