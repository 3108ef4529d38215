"""Runs with a gs:// workdir end like runs on disk, despite faults of storage."""

import functools
import re
import signal
import socket
import time

import pytest

from tests import trainer

# Three checkpoints and two validations of a model with a single layer.
OPTIONS = (
    "train.total_steps=12",
    "train.eval_every_steps=8",
    "checkpoint.every_steps=4",
    "train.compilation_cache=True",
)


def command(workdir):
    return trainer.command(workdir, *OPTIONS)


@functools.cache
def reference():
    """The workdir of the same run on disk."""
    workdir = trainer.home() / "on-disk"
    trainer.run(command(workdir))
    return workdir


def start(storage, bucket, log):
    return trainer.start(storage.used_by(command(f"{bucket.url}/run")), log)


def run(storage, bucket, *options):
    return trainer.run(storage.used_by([*command(f"{bucket.url}/run"), *options]))


def assert_same_run(bucket, folder):
    trainer.assert_same_run(bucket.download("run", folder), reference())


def wait_until(child, log, condition):
    while not condition():
        assert child.poll() is None, log.read_text()
        time.sleep(0.01)


# The requests of a save, in order: data, a metadata file, the file that commits the step, the seal.
# Storage becomes silent at one of them, so that the kill interrupts that request.
MOMENTS = {
    "data": "^POST .*checkpoints(/|%2F)8(/|%2F)default.*ocdbt",
    "metadata": "^POST .*checkpoints(/|%2F)8(/|%2F)_CHECKPOINT_METADATA",
    "commit": "^POST .*checkpoints(/|%2F)8(/|%2F)commit_success.txt",
    "seal": "^POST .*seals(/|%2F)8.json",
}


def assert_outlives_a_kill(proxy, bucket, folder, moment):
    """A run that is killed in the save of step 8 continues from step 4."""
    log = folder / "log"
    proxy.set(silence_s=60, only=MOMENTS[moment])
    child = start(proxy, bucket, log)
    try:
        wait_until(child, log, lambda: proxy.counts().get("silence"))
    finally:
        child.kill()
        child.wait()
    names = bucket.names("run/")
    assert "run/seals/4.json" in names
    assert "run/seals/8.json" not in names
    assert ("run/checkpoints/8/commit_success.txt" in names) == (moment == "seal")
    proxy.set(preconditions=True)
    assert "starting at step 4\n" in run(proxy, bucket).stdout
    assert_same_run(bucket, folder / "run")


def test_killed_in_a_save(proxy, bucket, tmp_path):
    assert_outlives_a_kill(proxy, bucket, tmp_path, "commit")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["data", "metadata", "seal"])
def test_killed_elsewhere_in_a_save(proxy, bucket, tmp_path, moment):
    assert_outlives_a_kill(proxy, bucket, tmp_path, moment)


@pytest.mark.slow
def test_a_run_is_alone_in_its_bucket(proxy, bucket, tmp_path):
    """A second trainer is refused, and the lease goes with the first."""
    log = tmp_path / "log"
    proxy.set(preconditions=True)
    child = start(proxy, bucket, log)
    try:
        wait_until(child, log, lambda: "run/seals/4.json" in bucket.names("run/seals/"))
        child.send_signal(signal.SIGSTOP)  # so that it outlives the other
        second = trainer.run(proxy.used_by(command(f"{bucket.url}/run")), code=2).stderr
        last = second.strip().splitlines()[-1]
        assert re.search(rf"{bucket.url}/run is in use by process {child.pid} on host", last), last
        child.send_signal(signal.SIGCONT)
        assert child.wait(timeout=240) == 0, log.read_text()
    finally:
        child.kill()
    assert "run/lease.json" not in bucket.names("run/")
    assert_same_run(bucket, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_share_a_bucket(proxy, bucket, tmp_path):
    """A workdir written by two processes is continued by one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    proxy.set(preconditions=True)
    both = [
        *trainer.command(f"{bucket.url}/run", *OPTIONS),
        f"--coordinator_address={address}",
        "--num_processes=2",
    ]
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    children = [
        trainer.start(proxy.used_by([*both, f"--process_id={i}"]), log)
        for i, log in enumerate(logs)
    ]
    try:
        for child, log in zip(children, logs):
            assert child.wait(timeout=240) == 0, log.read_text()
    finally:
        for child in children:
            child.kill()
    before = trainer.result(bucket.download("run", tmp_path / "before"))
    names = bucket.names("run/checkpoints/12/")
    assert any("ocdbt.process_1" in name for name in names)
    # Compiled without the flags, which takes longer than loading the initial cache.
    assert any("jit_train_step" in name for name in bucket.names("run/compilation_cache/"))
    assert "starting at step 12\n" in run(proxy, bucket).stdout
    after = trainer.result(bucket.download("run", tmp_path / "after"))
    assert after["params_digest"] == before["params_digest"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_tenth_of_all_requests_fails(proxy, bucket, tmp_path, seed):
    """The data are in storage, too, and are written there first."""
    parts = {"unavailable": 0.04, "throttle": 0.02, "reset": 0.02, "truncate": 0.02}
    proxy.set(seed=seed, preconditions=True, **parts)
    run(proxy, bucket, f"--config.data.dir={bucket.url}/data")
    assert all(proxy.counts()[name] for name in parts)
    assert any(name.endswith("manifest.json") for name in bucket.names("data/"))
    workdir = bucket.download("run", tmp_path / "run")
    assert trainer.result(workdir)["params_digest"] == trainer.result(reference())["params_digest"]
    assert trainer.curves(workdir) == trainer.curves(reference())


def ends_with(proxy, bucket, log, **faults):
    """The exit code of a run whose storage has these faults after the first save."""
    child = start(proxy, bucket, log)
    try:
        wait_until(child, log, lambda: "run/seals/4.json" in bucket.names("run/seals/"))
        proxy.set(**faults)
        return child.wait(timeout=400)
    finally:
        child.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["outage", "silence"])
def test_storage_is_gone_for_half_a_minute(proxy, bucket, tmp_path, kind):
    log = tmp_path / "log"
    code = ends_with(proxy, bucket, log, **{f"{kind}_s": 30})
    assert code == 0, log.read_text()
    assert proxy.counts()[kind] > 0
    assert_same_run(bucket, tmp_path / "run")


@pytest.mark.slow
def test_storage_is_gone_for_good(proxy, bucket, tmp_path):
    log = tmp_path / "log"
    code = ends_with(proxy, bucket, log, outage_s=1000)
    assert code == 2, log.read_text()
    last = log.read_text().strip().splitlines()[-1]
    assert re.match("(Checkpoint|Storage|User)Error: .*gs://", last), last
    assert "spectral_pod/main.py" not in log.read_text()  # no traceback of ours
    proxy.set()
    assert "starting at step" in run(proxy, bucket).stdout
    assert_same_run(bucket, tmp_path / "run")
