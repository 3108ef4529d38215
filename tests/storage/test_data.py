"""Runs that read data from gs://, with or without local copies, end like runs that read from disk.

Run as a script, this file is a process that copies a store: test_data.py STORE COPIES.
"""

import functools
import pathlib
import re
import sys
import time

import pytest

from spectral_pod.data import tasks
from tests import trainer

OPTIONS = (
    "train.total_steps=8",
    "train.eval_every_steps=4",
    "checkpoint.every_steps=8",
    "model.num_layers=1",
)
FAULTS = {"unavailable": 0.04, "throttle": 0.02, "reset": 0.02, "truncate": 0.02}
SPLITS = ("test", "train", "validation")


def copy_all(path, directory):
    """Waits until every part is copied, then reads all records."""
    from spectral_pod.data.byte_store import ByteStore
    from spectral_pod.data.local_copies import LocalCopies

    store = ByteStore(path, copies=LocalCopies(directory, 10**9))
    splits = [store.split(name) for name in SPLITS]
    while sum(len(split._copied) for split in splits) < len(splits):
        time.sleep(0.01)
    for split in splits:
        split.read(range(len(split)))


@functools.cache
def reference():
    return trainer.uninterrupted(*OPTIONS)


def assert_same_run(workdir):
    """Equal to the run on disk, except for the paths in its configuration."""
    for key in ("params_digest", "eval"):
        assert trainer.result(workdir)[key] == trainer.result(reference())[key]
    assert trainer.curves(workdir) == trainer.curves(reference())


@pytest.fixture
def store(bucket):
    """The URL of a copy of the store that the run on disk wrote and read."""
    reference()
    data = trainer.get_config().data
    folder = trainer.home() / "data"
    path = pathlib.Path(tasks.make(data.task, data.options).store_path(str(folder)))
    for file in path.rglob("*"):
        if file.is_file():
            bucket.write(f"data/{file.relative_to(folder)}", file.read_bytes())
    return f"{bucket.url}/data/{path.name}"


@pytest.fixture
def run(tmp_path, bucket, store):
    """Trains from the bucket; returns the workdir, or the last line of output if the run fails."""

    def run(storage, copies, code=0):
        workdir = tmp_path / "run"
        options = [f"data.dir={bucket.url}/data", f"data.copies_gb={int(copies)}"]
        options += [f"data.copies_dir={tmp_path}/copies"]
        command = trainer.command(workdir, *OPTIONS, *options)
        done = trainer.run(storage.used_by(command), code)
        return done.stderr.strip().splitlines()[-1] if code else workdir

    return run


def copier(store, tmp_path):
    return [sys.executable, __file__, store, str(tmp_path / "copies")]


def delete_bytes(bucket, part="*"):
    """Deletes the shards of the `bytes` arrays of a part, SPLIT/PART, or of all parts."""
    names = [name for name in bucket.names("data/") if "/bytes/c/" in name]
    for name in names:
        if pathlib.PurePath(name).match(f"{part}/bytes/c/*"):
            quoted = name.replace("/", "%2F")
            bucket.storage.call(f"/storage/v1/b/{bucket.name}/o/{quoted}", method="DELETE")


def copies_in(tmp_path):
    found = (tmp_path / "copies").glob("stores/*/*/*/zarr.json")
    return sorted(zarr.parent.parent.name for zarr in found)


def test_data_in_storage(server, run, tmp_path):
    assert_same_run(run(server, copies=False))
    assert not (tmp_path / "copies").exists()


def test_data_in_local_copies(server, bucket, store, run, tmp_path):
    """Storage keeps only what a run reads at its start."""
    trainer.run(server.used_by(copier(store, tmp_path)))
    assert copies_in(tmp_path) == sorted(SPLITS)
    delete_bytes(bucket)
    assert_same_run(run(server, copies=True))


@pytest.mark.slow
@pytest.mark.parametrize("copies", [False, True])
def test_a_tenth_of_all_requests_fails(proxy, run, copies):
    proxy.set(seed=7, **FAULTS)
    assert_same_run(run(proxy, copies))
    assert sum(proxy.counts().get(name, 0) for name in FAULTS) >= 3


@pytest.mark.parametrize("copies", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_part_that_was_deleted_is_named(server, bucket, store, run, copies):
    delete_bytes(bucket, "train/00000")
    said = run(server, copies, code=2)
    assert re.match(rf"DataError: {store}/train/00000(, bytes \d+ to \d+,)? is damaged", said)


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_a_copy_under_way_is_abandoned(proxy, bucket, store, tmp_path, ends):
    """Storage becomes silent in the middle of the second part."""
    proxy.set(silence_s=60, only=r"^GET .*validation(/|%2F)00000(/|%2F)bytes(/|%2F)c")
    log = tmp_path / "log"
    script = copier(store, tmp_path)
    if ends == "by itself":
        script = [sys.executable, "-c", ENDS, *script[2:]]
    child = trainer.start(proxy.used_by(script), log)
    try:
        while not proxy.counts().get("silence"):
            assert child.poll() is None, log.read_text()
            time.sleep(0.01)
        if ends == "killed":
            child.kill()
        assert child.wait(timeout=30) == (-9 if ends == "killed" else 0), log.read_text()
    finally:
        child.kill()
    assert copies_in(tmp_path) == ["test", "train"]
    proxy.set()
    trainer.run(proxy.used_by(copier(store, tmp_path)))
    assert copies_in(tmp_path) == sorted(SPLITS)


# Exits two seconds after it has started to copy.
ENDS = """
import sys, time
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.local_copies import LocalCopies
store = ByteStore(sys.argv[1], copies=LocalCopies(sys.argv[2], 10**9))
splits = [store.split(name) for name in ("test", "train", "validation")]
time.sleep(2)
"""


if __name__ == "__main__":
    copy_all(*sys.argv[1:])
