"""A store that is converted to TFDS and back has the same records."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from spectral_pod.data import byte_store, tfds_builder
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.data.tasks.records import Records


@pytest.mark.parametrize("documents", [1, 2])
def test_round_trip(tmp_path, documents, monkeypatch):
    rng = np.random.default_rng(0)
    held = [rng.bytes(int(n)) for n in rng.integers(0, 200, 40)] + [b"\x00\xff\n", b""]
    pairs = [data if documents == 1 else (data, data[::-1]) for data in held]
    rows = [Record(pair, i % 2) for i, pair in enumerate(pairs)]
    path = str(tmp_path / "store")
    splits = {"train": rows, "validation": rows[:4], "test": rows[5:9]}
    byte_store.write(path, splits, classes=["no", "yes"], provenance={}, documents=documents)
    folder = tfds_builder.write(ByteStore(path), name="mine", data_dir=str(tmp_path / "tfds"))
    assert folder.endswith("mine/1.0.0")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    fields = "document" if documents == 1 else ("document_0", "document_1")
    sources = {split: f"tfds:mine/{split}" for split in splits}
    Records(**sources, data=fields).build(str(tmp_path / "again"))
    again = ByteStore(str(tmp_path / "again"))
    assert again.classes == ["no", "yes"]
    for split in splits:
        one, other = ByteStore(path).split(split), again.split(split)
        np.testing.assert_array_equal(one.labels, other.labels)
        n = range(len(one) * documents)
        assert [a.tobytes() for a in one.read(n)] == [b.tobytes() for b in other.read(n)]
