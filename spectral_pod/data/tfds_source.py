"""Reader of examples from TensorFlow Datasets (TFDS): `tfds:NAME[/CONFIG][:VERSION]/SPLIT`.

    for row in tfds_source.rows("tfds:cifar10/train[:90%]"):
        ...  # Row('tfds:cifar10/train[:90%][0]', {'id': b'...', 'image': array, 'label': b'cat'})

The split is in TFDS's own notation. Datasets are in TFDS's folder (TFDS_DATA_DIR, by default
~/tensorflow_datasets) and are downloaded if missing. TensorFlow itself is imported only to prepare
a dataset, and to read one that is not stored as array_record.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from spectral_pod.data.formats import Row
from spectral_pod.data.text import encode
from spectral_pod.errors import DataError

PREFIX = "tfds:"


def rows(source: str) -> Iterator[Row]:
    """The examples of a split in order, with features as fields.

    A Text is bytes, a ClassLabel the name of the class or None, an Image uint8 [height, width,
    channels].

    Raises:
      DataError: there is no such split, or no such dataset and it cannot be downloaded.
    """
    builder, split = _open(source)
    classes = {name: _class_names(feature) for name, feature in builder.info.features.items()}
    for i, example in enumerate(_examples(builder, split)):
        yield Row(f"{source}[{i}]", {k: _value(x, classes[k]) for k, x in example.items()})


def class_names(source: str, feature: str) -> tuple[str, ...]:
    """The class names of a feature in order; () if the feature is not a ClassLabel.

    Raises:
      DataError: as in `rows`.
    """
    features = _open(source)[0].info.features
    return _class_names(features[feature]) if feature in features else ()


def _class_names(feature: Any) -> tuple[str, ...]:
    return tuple(getattr(feature, "names", None) or ())


def describe(source: str) -> dict[str, Any]:
    """The identity of the examples: the dataset's full name with its version, and their number.

    Raises:
      DataError: as in `rows`.
    """
    builder, split = _open(source)
    count = builder.info.splits[split].num_examples
    return {"source": source, "tfds": builder.info.full_name, "examples": count}


def _open(source: str) -> tuple[Any, str]:
    """The builder of a prepared dataset, and the name of the split."""
    import tensorflow_datasets as tfds  # slow to import, and most sources do not need it

    name, _, split = source.removeprefix(PREFIX).rpartition("/")
    if not name or not split:
        raise DataError(f"{source} names no split; write tfds:NAME/SPLIT, as in tfds:cifar10/train")
    try:
        builder = tfds.builder(name)
        if not builder.is_prepared():
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # of any type: TFDS runs the dataset's own code
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{source} is not prepared below {tfds.core.constants.DATA_DIR}, and preparing it "
            f"fails ({reason}). Check the name; or set TFDS_DATA_DIR to where the set is; or run "
            f"`tfds build {name}` where there is internet, and copy what it writes"
        ) from error
    try:
        _ = builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{source}: {builder.info.full_name} has no split {split!r}; "
            f"there are {', '.join(builder.info.splits)}, and slices of them, as in 'train[:90%]'"
        ) from error
    return builder, split


def _examples(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    import tensorflow_datasets as tfds

    if builder.info.file_format == tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
        examples = builder.as_data_source(split)
        return (examples[i] for i in range(len(examples)))
    return iter(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))


def _value(value: Any, classes: tuple[str, ...]) -> Any:
    """A feature's value, converted as `Row` describes, or the name of its class."""
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if classes and isinstance(value, int):
        value = classes[value] if value >= 0 else None  # -1: there is no label
    return encode(value) if isinstance(value, str) else value
