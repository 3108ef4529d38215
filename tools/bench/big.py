"""Writes a large store part by part, or reads it once in random order.

    python -m tools.bench.big write|read STORE GIGABYTES

`python -m tools.bench data --big=10` runs each in a process of its own, whose peak resident memory
is what the operating system counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np

from spectral_pod import storage
from spectral_pod.data import byte_store, pipeline
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.fields import PositiveFloat

from .. import shell

_RECORD_BYTES = 12_288
_BATCH = 128


def measure(gigabytes: float) -> None:
    """Writes and reads so many GB in a temporary folder, and prints a line for each."""
    with tempfile.TemporaryDirectory(prefix="bench-big-") as folder:
        for action in ("write", "read"):
            print(_run(action, f"{folder}/store", gigabytes))


def _run(action: str, path: str, gigabytes: float) -> str:
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.big", action, path, str(gigabytes)]
    )
    _, status, usage = os.wait4(child.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)
    seconds, peak = time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9
    return (
        f"{action:5} {gigabytes:g} GB in {seconds:.0f} s: {1e3 * gigabytes / seconds:.0f} MB/s, "
        f"peak resident memory {peak:.2f} GB ({'met' if peak < 1.5 else 'MISSED'}: < 1.5)"
    )


def _write(path: str, num_records: int) -> None:
    byte_store.write(path, {"train": _records(num_records)}, classes=["digits"], provenance={})


def _records(num_records: int) -> Iterator[Record]:
    # Random numbers cost more than writing: records are windows of one long draw.
    digits = np.random.default_rng(0).integers(48, 58, 1 << 24).astype(np.uint8).tobytes()
    for i in range(num_records):
        start = i * 7919 % (len(digits) - _RECORD_BYTES)
        yield Record(digits[start : start + _RECORD_BYTES], 0)


def _read(path: str, num_records: int) -> None:
    split = ByteStore(path).split("train")
    source = pipeline.Batches(split, batch_size=_BATCH, seq_len=_RECORD_BYTES, shuffle_seed=0)
    for step in range(num_records // _BATCH):
        source.rows(step, np.arange(_BATCH))


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("bench.big", __doc__)
    parser.add_argument("action", choices=("write", "read"))
    parser.add_place("store", local=True, help="a folder")
    parser.add_value("gigabytes", PositiveFloat)
    return shell.run(parser, act, argv)


def act(arguments: argparse.Namespace) -> None:
    storage.check_access(arguments.store, write=arguments.action == "write")
    action = {"write": _write, "read": _read}[arguments.action]
    action(arguments.store, int(arguments.gigabytes * 1e9) // _RECORD_BYTES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
