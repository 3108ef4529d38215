"""The input pipeline: batches from a byte store, against records that are in memory anyway.

The store is written to a temporary folder ($TMPDIR decides where): records of 500 to 2,000 digits,
as compressible as text is. Group: pipeline.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np

from spectral_pod.data import byte_store, pipeline
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.parallel.mesh import make_mesh
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.shapes import PAD
from tools.bench.settings import Settings
from tools.bench.timing import Case, Comparison, Group, Seconds, timed, times_faster

SEQ_LEN = 2048


def groups(settings: Settings) -> list[Group]:
    records, batch = (64, 8) if settings.quick else (16_384, 32)
    return [Group("pipeline", 1, functools.partial(_pipeline, settings, records, batch))]


def _pipeline(settings: Settings, num_records: int, batch: int) -> Comparison:
    folder = settings.stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-data-"))
    rng = np.random.default_rng(0)
    lengths = rng.integers(500, 2000, num_records)
    records = [rng.integers(48, 58, n).astype(np.uint8) for n in lengths]
    path = f"{folder}/store"
    byte_store.write(
        path,
        {"train": (Record(data.tobytes(), 0) for data in records)},
        classes=["digits"],
        provenance={},
    )
    store = ByteStore(path)
    steps = num_records // batch
    mesh = make_mesh({"data": jax.device_count(), "fsdp": 1, "sequence": 1, "tensor": 1})
    sharding = batch_sharding(mesh)

    def batches(store: ByteStore) -> pipeline.Batches:
        split = store.split("train")
        return pipeline.Batches(split, batch_size=batch, seq_len=SEQ_LEN, shuffle_seed=0)

    warm = batches(store)

    def load(batches: pipeline.Batches) -> Iterator[pipeline.Batch]:
        return pipeline.load(batches, sharding, 0, steps, threads=2, prefetch=8)

    def from_warm() -> None:
        for arrays in load(warm):
            jax.block_until_ready(arrays)

    def from_cold() -> None:  # a store opened anew has no chunk in memory
        for arrays in load(batches(ByteStore(path))):
            jax.block_until_ready(arrays)

    def from_memory() -> None:
        for step in range(steps):
            tokens = np.full((batch, SEQ_LEN), PAD, np.int32)
            for row, i in enumerate(warm.records(step)):
                tokens[row, : lengths[i]] = records[i]
            jax.block_until_ready(jax.device_put(tokens, sharding))

    work = {"records": steps * batch, "bytes": float(lengths.sum())}

    def case(name: str, what: str, run: Callable[[], None]) -> Case:
        repetition: Callable[[], Seconds] = functools.partial(timed, run)
        baseline = "" if name == "memory" else "memory"
        shape = f"{steps} batches [{batch}, {SEQ_LEN}]"
        return Case(name, what, shape, repetition, baseline, work=work)

    cases = [
        case("warm", "pipeline.load, chunks in the store's cache", from_warm),
        case("cold", "pipeline.load from a store just opened", from_cold),
        case("memory", "the same batches filled from records in memory, one thread", from_memory),
    ]
    ratios = [
        times_faster("pipeline_warm_vs_memory", "warm", "memory"),
        times_faster("pipeline_cold_vs_memory", "cold", "memory"),
    ]
    return Comparison(cases, ratios)
