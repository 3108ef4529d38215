"""Files of users, of every format and compression, and what reads them."""

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import zstandard

from spectral_pod.data import formats
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.formats import Fault, Row
from spectral_pod.data.tasks.lm import LanguageModelling

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": functools.partial(lzma.compress, preset=0),
    ".zst": zstandard.ZstdCompressor().compress,
}


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def random_files(names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.bytes(8 + i % 50) for i, name in enumerate(names)}


def as_jsonl(texts):
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def as_csv(texts):
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([("id", "text"), *enumerate(texts)])
    return stream.getvalue().encode()


def as_parquet(texts):
    stream = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": texts, "id": range(len(texts))}), stream)
    return stream.getvalue()


def reader(folder):
    """A function that writes a file and reads it: [(place in the folder, fields or reason)]."""

    def read(name, content, **options):
        path = folder / name
        path.write_bytes(content)
        found = list(formats.rows(str(path), **options))
        assert all(
            isinstance(row, Row | Fault) and row.place.startswith(f"{path}") for row in found
        )
        return [(row.place.removeprefix(f"{folder}/"), row[1]) for row in found]

    return read


def builder_of_lm(folder):
    """A function that builds a store of a language model, returned with {split: [documents]}."""
    count = iter(range(99))

    def build(source="", **options):
        path = str(folder / f"store_{next(count)}")
        options = {k: str(x) if isinstance(x, pathlib.Path) else x for k, x in options.items()}
        LanguageModelling(source=str(source), **options).build(path)
        store = ByteStore(path)
        splits = {name: store.split(name) for name in store.manifest["splits"]}
        return store, {
            name: [data.tobytes() for data in split.read(range(len(split)))]
            for name, split in splits.items()
        }

    return build
