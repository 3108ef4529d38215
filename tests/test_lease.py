"""The lease: one holder at a time, taken over from the dead, on disk and in storage."""

import json
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest

from spectral_pod import lease as lease_lib
from spectral_pod import storage
from spectral_pod.errors import StorageError, TakenOverError
from spectral_pod.lease import InUseError, Lease
from tests import trainer
from tests.storage.conftest import bucket, proxy, server  # noqa: F401

HOLD = """
import sys, time
from spectral_pod.lease import Lease
with Lease(sys.argv[1], "it"):
    print("held", flush=True)
    time.sleep(60)
"""
# Twenty processes' worth of threads ask at once, as if each were on a machine of its own.
RACE = """
import sys, threading
from spectral_pod import lease
from spectral_pod.lease import InUseError, Lease
results, all_there = [], threading.Barrier(20)
def ask(i):
    lease._machine = lambda: ""
    mine = Lease(sys.argv[1], "it")
    all_there.wait()
    try:
        mine.__enter__()
        results.append(mine)
    except InUseError as error:
        results.append(None)
lease._RENEW_SECONDS = 0.3
threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
[t.start() for t in threads]; [t.join() for t in threads]
winners = [r for r in results if r]
assert len(results) == 20 and len(winners) == 1, results
winners[0].check()
winners[0].__exit__()
with Lease(sys.argv[1], "it") as again:
    again.check()
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(lease_lib, "_RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease_lib, "EXPIRY_SECONDS", 1.5)
    monkeypatch.setattr(lease_lib, "_POLL_SECONDS", 0.02)


@pytest.fixture
def path(tmp_path):
    return f"{tmp_path}/place/lease.json"


def of_another_machine(monkeypatch, path, **options):
    """A lease whose holder cannot be looked up here."""
    with monkeypatch.context() as patch:
        patch.setattr(lease_lib, "_machine", lambda: "another")
        return Lease(path, "the place", **options)


def test_a_second_process_is_refused_and_told_by_whom(path):
    with Lease(path, "the place"):
        again = subprocess.run(
            [sys.executable, "-c", HOLD, path],
            capture_output=True,
            text=True,
            env=trainer.environment(),
        )
    assert again.returncode == 1
    assert "it is in use by process" in again.stderr
    with Lease(path, "the place"):  # it is free once the first has ended
        pass


def test_a_killed_holder_is_replaced_at_once(path, monkeypatch):
    monkeypatch.setattr(lease_lib, "EXPIRY_SECONDS", 1e6)
    command = [sys.executable, "-c", HOLD, path]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=trainer.environment())
    assert child.stdout.readline() == b"held\n"
    child.kill()  # and not waited for: it stays in the table of processes
    while child.poll() is None and not _is_zombie(child.pid):
        time.sleep(0.01)
    with Lease(path, "the place"):
        pass
    child.communicate()


def _is_zombie(pid):
    import psutil

    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_holder_on_another_machine_is_known_by_its_renewals(path, monkeypatch):
    with of_another_machine(monkeypatch, path) as first:
        with pytest.raises(InUseError, match=r"the place is in use by process \d+ on host"):
            Lease(path, "the place").__enter__()
        first.check()


def test_a_silent_holder_is_replaced_and_ends(path, monkeypatch):
    first = of_another_machine(monkeypatch, path).__enter__()
    with monkeypatch.context() as suspended:
        suspended.setattr(first, "_renew_once", lambda: None)
        second = Lease(path, "the place").__enter__()
        time.sleep(1.6)
    for check in (first.check, first.claim.check, pickle.loads(pickle.dumps(first.claim)).check):
        with pytest.raises(TakenOverError, match="the place was taken over by process"):
            check()
    second.claim.check()
    first.__exit__()
    second.check()  # the first has not released what is no longer its own
    assert json.loads(storage.kvstore(path.rpartition("/")[0])["lease.json"])
    second.__exit__()


def test_a_holder_ends_also_if_the_one_that_replaced_it_has_ended(path, monkeypatch):
    with of_another_machine(monkeypatch, path) as first:
        with monkeypatch.context() as suspended:
            suspended.setattr(first, "_renew_once", lambda: None)
            with Lease(path, "the place"):
                pass
        with pytest.raises(TakenOverError, match="taken over by another process, which has ended"):
            first.check()
    assert storage.kvstore(path.rpartition("/")[0]).list().result() == []


def test_a_holder_that_was_suspended_keeps_what_nobody_wanted(path, monkeypatch):
    with Lease(path, "the place") as lease:
        with monkeypatch.context() as suspended:
            suspended.setattr(lease, "_renew_once", lambda: None)
            time.sleep(1.7)
        for _ in range(50):
            lease.check()
            time.sleep(0.01)
        assert time.monotonic() - lease._renewed < 1.5


def test_storage_that_is_out_ends_nothing(path, monkeypatch):
    """Neither does an error that nobody has foreseen, and renewals go on after it."""
    with Lease(path, "the place") as lease:
        with monkeypatch.context() as out:
            out.setattr(lease, "_write", lambda _: 1 / 0)
            time.sleep(1.7)
            waits = []
            out.setattr(lease._attempted, "wait", waits.append)
            for _ in range(3):
                lease.check()
            assert len(waits) == 1  # not at every step
        time.sleep(0.5)
        assert time.monotonic() - lease._renewed < 1.5


def test_a_deleted_lease_is_written_again(path, tmp_path):
    with Lease(path, "the place") as lease:
        shutil.rmtree(tmp_path / "place")
        time.sleep(0.5)
        lease.check()
        with pytest.raises(InUseError):
            Lease(path, "the place").__enter__()


def test_a_copied_lease_is_of_another_place(path, tmp_path):
    with Lease(path, "the place"):
        shutil.copytree(tmp_path / "place", tmp_path / "copy")
        with Lease(f"{tmp_path}/copy/lease.json", "the copy") as copy:
            copy.check()


def test_waiting_for_the_end_of_another(path, monkeypatch):
    order, said = [], []
    first = of_another_machine(monkeypatch, path).__enter__()

    def wait():
        with Lease(path, "the place", wait=True, say=said.append):
            order.append("second")

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(2.0)  # longer than the expiry, as the first is alive
    order.append("first")
    first.__exit__()
    waiting.join()
    assert order == ["first", "second"]
    assert len(said) == 1


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_lease_expires(path, tmp_path, seed):
    rng = random.Random(seed)
    (tmp_path / "place").mkdir()
    values = [b"", rng.randbytes(99), b"[]", b"null", b'{"pid": "x", "machine": 3}', b"{" * 9999]
    values += [
        json.dumps({"machine": lease_lib._machine(), "pid": pid}).encode() for pid in (-1, 1 << 70)
    ]
    (tmp_path / "place/lease.json").write_bytes(values[seed])
    with Lease(path, "the place") as lease:
        lease.check()


def test_of_many_that_ask_at_once_one_gets_it(path):
    done = subprocess.run(
        [sys.executable, "-c", RACE, path],
        env=trainer.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_also_in_storage(proxy, bucket):  # noqa: F811
    proxy.set(preconditions=True, unavailable=0.1)
    command = [sys.executable, "-c", RACE, f"{bucket.url}/run/lease.json"]
    trainer.run(proxy.used_by(command), forked=False)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write the place: .*file.*; choose another pl"):
        Lease(f"{tmp_path}/file/lease.json", "the place").__enter__()
