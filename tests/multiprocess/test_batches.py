"""The data do not depend on the number of processes, even if it changes during a run."""

import socket
import subprocess
import sys

import numpy as np
import pytest

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import Record
from tests import processes
from tests.multiprocess.batches import BATCH, SEQ_LEN, batches

RECORDS = 50  # no multiple of a batch: epochs end within one


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path, rng = str(tmp_path_factory.mktemp("store")), np.random.default_rng(0)
    records = [Record(rng.bytes(int(rng.integers(SEQ_LEN + 1))), i % 3) for i in range(RECORDS)]
    byte_store.write(path, {"train": records}, classes=["a", "b", "c"], provenance={})
    return path


def start(store, folder, num_processes, first, stop):
    """Starts the processes; returns what waits for them and gives the global batches by step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = processes.environment() | {"XLA_FLAGS": processes.xla_flags()}
    outputs = [folder / f"{first}-{i}.npz" for i in range(num_processes)]
    children = [
        processes.Popen(
            [sys.executable, "-m", "tests.multiprocess.batches", store, address,
             *map(str, (num_processes, i, first, stop, output))],
            cwd=processes.ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for i, output in enumerate(outputs)
    ]  # fmt: skip

    def wait():
        errors = [child.communicate(timeout=240)[1] for child in children]
        assert [child.returncode for child in children] == [0] * num_processes, errors
        held = [dict(np.load(output)) for output in outputs]
        assert sum(len(rows) for rows in held) == num_processes * 3 * (stop - first)
        merged = {name: rows for process in held for name, rows in process.items()}
        found = {}
        for step in range(first, stop):
            found[step] = {}
            for name in ("tokens", "labels", "valid"):
                parts = {int(k.split("/")[2]): v for k, v in merged.items()
                         if k.startswith(f"{step}/{name}/")}  # fmt: skip
                found[step][name] = np.concatenate([parts[row] for row in sorted(parts)])
        return found

    return wait


def check(found, store):
    source = batches(store)
    for step, batch in found.items():
        for name, values in source.rows(step, np.arange(BATCH)).items():
            np.testing.assert_array_equal(batch[name], values)


@pytest.mark.parametrize(("before", "after"), [(3, 2), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_any_number_of_processes_loads_and_continues_the_same(store, tmp_path, before, after):
    first = start(store, tmp_path, before, 0, 5)
    then = start(store, tmp_path, after, 5, 9)
    check(first() | then(), store)
