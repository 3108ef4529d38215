"""A mixture returns the rows of its sources, in their order and in the given proportions."""

import numpy as np
import pytest

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.data.mixture import Mixture
from spectral_pod.data.pipeline import Batches
from spectral_pod.data.windows import Windows
from spectral_pod.errors import DataError

SIZES = (50, 7, 30)
BATCH = 8


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Splits of several stores; a label is the number of its store, a byte that of its record."""
    made = []
    for i, size in enumerate(SIZES):
        path = str(tmp_path_factory.mktemp("store"))
        records = [Record(bytes([r] * 9), i) for r in range(size)]
        byte_store.write(path, {"train": records}, classes=["a", "b", "c"], provenance={})
        made.append(ByteStore(path).split("train"))
    return made


def batches(split, seed=3):
    return Batches(split, batch_size=BATCH, seq_len=12, shuffle_seed=seed)


def take(source, steps):
    parts = [source.rows(step, np.arange(BATCH)) for step in range(steps)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1, 1, 1), (8, 1, 0.01)])
def test_shares_and_orders(splits, weights):
    mixed = take(Mixture([batches(s) for s in splits], weights), 40)
    for i, split in enumerate(splits):
        mine = mixed["labels"] == i
        share = weights[i] / sum(weights)
        counts = np.cumsum(mine)
        assert np.abs(counts - share * np.arange(1, len(counts) + 1)).max() <= len(SIZES)
        alone = take(batches(split), 1 + counts[-1] // BATCH)["tokens"][: counts[-1]]
        np.testing.assert_array_equal(mixed["tokens"][mine], alone)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_processes_read_their_own_rows(splits, num_processes):
    mixture = Mixture([batches(s) for s in splits], (3, 2, 1))
    whole = take(mixture, 5)
    for step in range(5):
        for rows in np.array_split(np.arange(BATCH), num_processes):
            part = mixture.rows(step, rows)
            for name, values in part.items():
                np.testing.assert_array_equal(values, whole[name][step * BATCH + rows])


def test_windows_mix(splits):
    sources = [Windows(s, batch_size=BATCH, seq_len=16, shuffle_seed=1) for s in splits[:2]]
    mixed = take(Mixture(sources, (1, 1)), 2)
    assert mixed["labels"].shape == mixed["valid"].shape == (2 * BATCH, 16)
    np.testing.assert_array_equal(mixed["tokens"][0::2], take(sources[0], 1)["tokens"])
    np.testing.assert_array_equal(mixed["tokens"][1::2], take(sources[1], 1)["tokens"])


def test_weights_must_be_positive(splits):
    with pytest.raises(DataError, match=r"weights .* \(1, 0\)"):
        Mixture([batches(s) for s in splits[:2]], (1, 0))
