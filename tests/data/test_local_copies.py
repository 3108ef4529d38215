"""Copies have the content of the store, never exceed their disk limit, and never end a run.

The stores here are local folders, which would be read directly; `copied` has them copied.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorstore as ts

from spectral_pod.data import byte_store, zarr_arrays
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.data.local_copies import LocalCopies, Part
from tests import processes, trainer

PARTS = 5
PART_BYTES = 1 << 17


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(zarr_arrays, "PART_BYTES", PART_BYTES)


def make_store(path, seed=0):
    rng = np.random.default_rng(seed)
    records = [Record(rng.bytes(PART_BYTES // 10 + 1), 0) for _ in range(10 * PARTS)]
    byte_store.write(str(path), {"train": records}, classes=["a"], provenance={"seed": seed})
    return str(path)


def copied(path, copies):
    """The training split of a store, whose parts are copied as if it were remote."""
    store = ByteStore(path, cache_bytes=0)
    store.copies = copies
    return store.split("train")


def parts_in(folder):
    return sorted(zarr.parent for zarr in folder.glob("stores/*/*/*/zarr.json"))


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def wait_for_copies(split):
    """Returns when all parts are copied, or copying has stopped."""
    stopped = split._store.copies._stopped
    wait_until(lambda: stopped.is_set() or len(split._copied) == PARTS)


def digest(split):
    sha = hashlib.sha256()
    for document in split.read(range(len(split))):
        sha.update(document)
    return sha.hexdigest()


@pytest.fixture
def open_copies(tmp_path):
    """Makes `LocalCopies` with a given limit in a shared folder; closes them at the end."""
    opened = []

    def open_copies(limit=10**9):
        opened.append(LocalCopies(str(tmp_path / "copies"), limit))
        return opened[-1]

    yield open_copies
    for copies in opened:
        copies.close()


def test_reads_go_to_the_copies(tmp_path, open_copies):
    path = make_store(tmp_path / "store")
    expected = digest(ByteStore(path).split("train"))
    split = copied(path, open_copies())
    assert digest(split) == expected  # however many parts are copied by now
    wait_for_copies(split)
    for shard in (tmp_path / "store").glob("train/*/bytes/c/*"):
        shard.unlink()
    assert digest(split) == expected
    assert digest(copied(path, open_copies())) == expected  # as in a later process


def damage_byte(part):
    raw = bytearray((part / "c/0").read_bytes())
    raw[len(raw) // 2] ^= 1
    (part / "c/0").write_bytes(raw)


DAMAGES = {
    "byte": damage_byte,
    "cut": lambda part: os.truncate(part / "c/0", 1000),
    "empty": lambda part: os.truncate(part / "c/0", 0),
    "metadata": lambda part: (part / "zarr.json").write_text("{"),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("opened", ["before", "after"])
def test_a_damaged_copy_is_dropped(tmp_path, open_copies, caplog, damage, opened):
    path = make_store(tmp_path / "store")
    expected = digest(ByteStore(path).split("train"))
    split = copied(path, open_copies())
    wait_for_copies(split)
    sound = parts_in(tmp_path / "copies")
    damaged = sound.pop(2)
    DAMAGES[damage](damaged)
    if opened == "after":
        split = copied(path, open_copies(limit=1))  # too small to copy it again
    assert digest(split) == expected
    split._store.verification.wait()
    assert digest(split) == expected
    assert parts_in(tmp_path / "copies") == sound
    said = [r.message for r in caplog.records if "is damaged and dropped" in r.message]
    there = opened == "before" or damage != "gone"
    assert len(said) == there
    assert all(str(damaged) in line for line in said)


def test_a_damaged_copy_is_dropped_by_a_read_during_its_verification(
    tmp_path, open_copies, monkeypatch
):
    path = make_store(tmp_path / "store")
    expected = digest(ByteStore(path).split("train"))
    wait_for_copies(copied(path, open_copies()))
    damage_byte(parts_in(tmp_path / "copies")[2])
    split = copied(path, open_copies(limit=1))
    verify = zarr_arrays.verify

    def verify_slowly(url, *args):
        try:
            verify(url, *args)
        except ValueError:
            assert digest(split) == expected  # drops the copy
            raise

    monkeypatch.setattr(zarr_arrays, "verify", verify_slowly)
    split._verify_content(2)
    split.wait_verified()
    assert len(parts_in(tmp_path / "copies")) == len(split._names) - 1


class Objects:
    """A key-value store with any names, as object storage allows."""

    def __init__(self, *names):
        self._names = names

    def list(self):
        return _done([name.encode() for name in self._names])

    def read(self, name):
        return _done(ts.KvStore.ReadResult(state="value", value=b"x"))


def _done(value):
    promise, future = ts.Promise.new()
    promise.set_result(value)
    return future


@pytest.mark.parametrize("name", ["../../../../victim", "c/../../victim", "/victim", "..", "c//0"])
def test_an_object_stays_in_its_folder(tmp_path, open_copies, caplog, name):
    (tmp_path / "victim").write_text("precious")
    copies, ready = open_copies(), []
    copies.request(Part("0" * 64, "train/00000", Objects("zarr.json", name)), ready.append)
    wait_until(lambda: "would be written outside of its folder" in caplog.text)
    assert not ready
    assert (tmp_path / "victim").read_text() == "precious"
    assert parts_in(tmp_path / "copies") == []


def test_a_store_larger_than_the_limit_keeps_what_fits(tmp_path, open_copies, caplog):
    caplog.set_level("INFO")
    path = make_store(tmp_path / "store")
    expected = digest(ByteStore(path).split("train"))
    limit = int(2.5 * PART_BYTES)
    copies = open_copies(limit)
    split = copied(path, copies)
    wait_until(copies._stopped.is_set)
    kept = parts_in(tmp_path / "copies")
    assert [part.name for part in kept] == ["00000", "00001"]
    assert digest(split) == expected
    assert len([r for r in caplog.records if "No more local copies" in r.message]) == 1
    assert digest(copied(path, open_copies(limit))) == expected
    assert parts_in(tmp_path / "copies") == kept


@pytest.mark.parametrize("seed", range(8))
def test_never_above_the_limit(tmp_path, open_copies, seed):
    """Stores in use stay complete; others are evicted, least recently used first."""
    rng = random.Random(seed)
    limit = rng.randint(PART_BYTES, 12 * PART_BYTES)
    folder = tmp_path / "copies"
    for i in range(4):
        path = make_store(tmp_path / f"store-{i}", seed=10 * seed + i)
        copies = open_copies(limit)
        before = parts_in(folder)
        split = copied(path, copies)
        wait_for_copies(split)
        assert size_of(folder) <= limit
        evicted = [i for i, part in enumerate(before) if not part.exists()]
        by_age = sorted(range(len(before)), key=lambda i: ages[before[i]]) if before else []
        assert sorted(by_age[: len(evicted)]) == evicted
        mine = len([part for part in parts_in(folder) if split._store.digest in part.parts])
        assert mine == min(PARTS, limit // size_of(tmp_path / f"store-{i}/train/00000/bytes"))
        ages = {}
        for part in parts_in(folder):  # distinct times of last use
            used = rng.randint(1, 10**6)
            os.utime(part, ns=(0, used * 10**9))
            ages[part] = used
        copies.close()
        for held in copies._in_use.values():
            held.close()  # as at the end of its process


def test_a_store_that_another_process_reads_is_not_evicted(tmp_path, open_copies):
    limit = int(PARTS * PART_BYTES * 1.2)
    split = copied(make_store(tmp_path / "a", 1), open_copies(limit))
    wait_for_copies(split)
    before = parts_in(tmp_path / "copies")
    copies = open_copies(limit)
    other = copied(make_store(tmp_path / "b", 2), copies)
    wait_until(copies._stopped.is_set)
    assert parts_in(tmp_path / "copies") == before
    assert digest(other) == digest(ByteStore(str(tmp_path / "b")).split("train"))


def test_a_store_written_anew_meets_no_old_copies(tmp_path, open_copies):
    path = make_store(tmp_path / "store", seed=1)
    split = copied(path, open_copies())
    wait_for_copies(split)
    make_store(tmp_path / "store", seed=2)
    expected = digest(ByteStore(path).split("train"))
    split = copied(path, open_copies())
    assert digest(split) == expected
    wait_for_copies(split)
    assert digest(split) == expected


@pytest.mark.parametrize("full", ["disk", "folder"])
def test_a_full_disk_or_a_folder_that_cannot_be_written_ends_no_run(
    tmp_path, open_copies, caplog, monkeypatch, full
):
    path = make_store(tmp_path / "store")
    expected = digest(ByteStore(path).split("train"))
    if full == "disk":

        def write_bytes(file, value):
            with open(file, "wb") as half:
                half.write(value[: len(value) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_bytes", write_bytes)
    else:
        (tmp_path / "copies").write_text("a file")
    copies = open_copies()
    split = copied(path, copies)
    wait_until(copies._stopped.is_set)
    assert digest(split) == expected
    assert digest(copied(path, copies)) == expected
    assert len([r for r in caplog.records if "No more local copies" in r.message]) == 1
    if full == "disk":
        assert parts_in(tmp_path / "copies") == []
        assert size_of(tmp_path / "copies") == 0


# Reads a store with copies to its end: python -c CHILD STORE COPIES KILLED_AT
CHILD = """
import os, pathlib, signal, sys, time
from spectral_pod.data.local_copies import LocalCopies
from tests.data import test_local_copies as tests

write_bytes, killed_at = pathlib.Path.write_bytes, int(sys.argv[3])

def write_half(file, value):
    global killed_at
    killed_at -= 1
    if killed_at == 0:
        with open(file, "wb") as half:
            half.write(value[: len(value) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_bytes(file, value)

pathlib.Path.write_bytes = write_half
split = tests.copied(sys.argv[1], LocalCopies(sys.argv[2], 10**9))
tests.wait_for_copies(split)
print(tests.digest(split))
"""


def start_child(store, copies, killed_at):
    command = [sys.executable, "-c", CHILD, store, str(copies), str(killed_at)]
    return processes.Popen(
        command, cwd=trainer.ROOT, env=trainer.environment(), stdout=subprocess.PIPE, text=True
    )


def test_a_killed_copy_is_not_used(tmp_path, open_copies):
    path, folder = make_store(tmp_path / "store"), tmp_path / "copies"
    expected = digest(ByteStore(path).split("train"))
    child = start_child(path, folder, killed_at=8)  # in the second file of three, of part 2
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert [part.name for part in parts_in(folder)] == ["00000", "00001"]
    assert list((folder / "unfinished").iterdir())
    split = copied(path, open_copies())
    assert digest(split) == expected
    wait_for_copies(split)
    assert digest(split) == expected
    assert list((folder / "unfinished").iterdir()) == []


def test_processes_share_a_folder(tmp_path):
    path, folder = make_store(tmp_path / "store"), tmp_path / "copies"
    children = [start_child(path, folder, killed_at=0) for _ in range(2)]
    digests = {child.communicate(timeout=60)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert digests == {digest(ByteStore(path).split("train"))}
    assert len(parts_in(folder)) == PARTS
