"""A process of several that load batches: saves the rows that its devices were given.

Arguments: store, coordinator, number of processes, own number, first step, stop, output (npz).
"""

import sys

import jax
import numpy as np

from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.pipeline import Batches, load
from spectral_pod.parallel import runtime
from spectral_pod.parallel.mesh import make_mesh
from spectral_pod.parallel.sharding import batch_sharding

BATCH, SEQ_LEN, SEED = 12, 16, 5


def batches(path):
    split = ByteStore(path).split("train")
    return Batches(split, batch_size=BATCH, seq_len=SEQ_LEN, shuffle_seed=SEED)


def main(path, coordinator, num_processes, process, start, stop, output):
    runtime.initialize(coordinator, int(num_processes), int(process))
    mesh = make_mesh({"data": jax.device_count(), "fsdp": 1, "sequence": 1, "tensor": 1})
    steps = load(batches(path), batch_sharding(mesh), int(start), int(stop), threads=2, prefetch=2)
    rows = {}
    for step, batch in zip(range(int(start), int(stop)), steps, strict=True):
        for name, array in batch.items():
            for shard in array.addressable_shards:
                first = shard.index[0].indices(BATCH)[0]
                rows[f"{step}/{name}/{first}"] = np.asarray(shard.data)
    np.savez(output, **rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
