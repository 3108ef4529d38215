"""Parallel writes equal serial ones, with any number of workers and of kills."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from spectral_pod.data import byte_store, parallel_write, store_lease
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.errors import DataError, TakenOverError

NUM_ITEMS = 7


def convert(item, log="", broken=-1, takes_over=""):
    if takes_over:
        other = {"id": "other", "pid": 7, "host": "x"}
        new = pathlib.Path(f"{takes_over}.{os.getpid()}")
        new.write_text(json.dumps(other))
        new.replace(takes_over)  # as a whole, as real writers do
    if item == broken:
        raise DataError(f"item {item} is broken")
    if log:
        pathlib.Path(log, f"{item}-{os.getpid()}-{time.time_ns()}").touch()
        time.sleep(0.2)
    rng = np.random.default_rng(item)
    records = [Record(rng.bytes(int(n)), int(n) % 3) for n in rng.integers(0, 9000, 20)]
    held_out = [] if item == 3 else records[:2]  # a part that is left out
    return {"train": records[2:], "test": held_out}, {"item": item}


def write(path, num_workers=2, items=NUM_ITEMS, **options):
    parallel_write.write(
        str(path),
        range(items),
        functools.partial(convert, **options),
        plan={"items": items},
        splits=("train", "test"),
        classes=("a", "b", "c"),
        documents=1,
        provenance=lambda facts: {"items": [fact["item"] for fact in facts]},
        num_workers=num_workers,
    )


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("serial"))
    converted = [convert(item)[0] for item in range(NUM_ITEMS)]
    splits = {name: [r for c in converted for r in c[name]] for name in ("train", "test")}
    byte_store.write(path, splits, classes=["a", "b", "c"], provenance={})
    return contents(path)


def contents(path):
    store = ByteStore(str(path))
    splits = {name: store.split(name) for name in ("train", "test")}
    return {
        name: (
            [data.tobytes() for data in split.read(range(len(split)))],
            split.labels.tolist(),
        )
        for name, split in splits.items()
    }


def test_any_number_of_workers_writes_the_same(tmp_path, serial):
    for num_workers in (1, 3):
        write(tmp_path / str(num_workers), num_workers)
        assert contents(tmp_path / str(num_workers)) == serial
        byte_store.verify(str(tmp_path / str(num_workers)))
    one, three = ((tmp_path / n / "manifest.json").read_text() for n in ("1", "3"))
    assert one == three
    assert json.loads(one)["provenance"] == {"items": list(range(NUM_ITEMS))}
    assert not (tmp_path / "1" / "unfinished" / "plan.json").exists()


def test_a_killed_write_is_no_store_and_goes_on(tmp_path, serial):
    log, path = tmp_path / "log", tmp_path / "store"
    log.mkdir()
    call = f"from test_parallel_write import write; write({str(path)!r}, log={str(log)!r})"
    script = f"if __name__ == '__main__':\n    {call}\n"
    (tmp_path / "main.py").write_text(script)
    here = pathlib.Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}"}
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")], env=environment, start_new_session=True
    )
    notes = path / "unfinished"
    deadline = time.time() + 120
    while len(list(notes.glob("0*.json"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not byte_store.exists(str(path))
    done = {int(note.stem) for note in notes.glob("0*.json")}
    assert 2 <= len(done) < NUM_ITEMS
    before = {file.name for file in log.iterdir()}
    write(path, log=str(log))
    again = {int(file.name.split("-")[0]) for file in log.iterdir() if file.name not in before}
    assert again == set(range(NUM_ITEMS)) - done
    assert contents(path) == serial


@pytest.mark.parametrize("num_items", [1, NUM_ITEMS])  # by this process, and by workers
def test_a_writer_that_was_taken_over_stops(tmp_path, num_items):
    lease = tmp_path / "lease.json"
    ended = pytest.raises(TakenOverError, match="was taken over by process 7 on host x")
    with ended, store_lease.hold(str(tmp_path)):
        write(tmp_path, items=num_items, takes_over=str(lease))
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"plan.json", "lease.json"}
    lease.unlink()  # the other has ended
    with store_lease.hold(str(tmp_path)):
        write(tmp_path, items=num_items)
    byte_store.verify(str(tmp_path))
    assert not lease.exists()


def test_another_plan_starts_anew(tmp_path):
    with pytest.raises(DataError, match="item 4 is broken"):
        write(tmp_path, broken=4)
    assert not byte_store.exists(str(tmp_path))
    assert list((tmp_path / "unfinished").glob("0*.json"))
    write(tmp_path, items=2)
    assert len(ByteStore(str(tmp_path)).split("train")) == 36
    assert {p.name for p in (tmp_path / "train").iterdir()} == {"00000", "00001"}
