"""Export of a byte store as a TensorFlow Datasets (TFDS) dataset, for any task with a store.

    python -m tools.records tfds STORE --name=NAME --data_dir=DIR
    tfds.load("NAME", split="train", data_dir="DIR")

An example has the features `document` (or `document_0`, `document_1`) and `label`. ListOps also has
a builder of its own, which needs no store (`tasks/listops_tfds.py`). Only these two modules and
`tfds_source` import TensorFlow.
"""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from spectral_pod.data.byte_store import ByteStore, Split

_BATCH = 256  # records read at once


def write(store: ByteStore, *, name: str, data_dir: str, version: str = "1.0.0") -> str:
    """Writes all splits of a store, in order, as array_record files; returns their folder.

    `data_dir` is a local folder: array_record does not write to gs://.
    """
    k = store.manifest["documents"]
    names = [f"document_{j}" for j in range(k)] if k > 1 else ["document"]
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        features=tfds.features.FeaturesDict(
            {document: tfds.features.Text() for document in names}
            | {"label": tfds.features.ClassLabel(names=store.classes)}
        ),
        split_datasets={
            split: _examples(store.split(split), names) for split in store.manifest["splits"]
        },
        data_dir=data_dir,
        description=f"Byte store, sha256 of its contents {store.digest}.",
        file_format="array_record",
        disable_shuffling=True,
    )
    return str(builder.data_dir)


def _examples(split: Split, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbers of records, by which TFDS orders them, and their features."""
    k = split.documents
    for start in range(0, len(split), _BATCH):
        stop = min(start + _BATCH, len(split))
        documents = [data.tobytes() for data in split.read(range(start * k, stop * k))]
        for i in range(stop - start):
            contents = documents[i * k : (i + 1) * k]
            example = dict(zip(names, contents, strict=True))
            yield start + i, example | {"label": int(split.labels[start + i])}
    split.wait_verified()
