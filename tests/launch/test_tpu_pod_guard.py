"""launch/tpu_pod.sh: states of the API, credentials that expire, and slices that end themselves."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

from launch.tpu_pod import states
from launch.tpu_pod.states import Then
from tests.launch import gcloud
from tests.launch.pod import CREATE_BY_HAND, WHERE, finish, read_until

# ------------------------------------------------------------- states, credentials, the guard


@pytest.mark.parametrize("name", states.NODES)
def test_states_of_nodes(name):
    row = states.node(name)
    assert row.then in (Then.WAIT, Then.USE, Then.REPLACE)
    if row.then is Then.WAIT:  # it is billed, and so never waits for ever
        assert row.after(row.patience - 0.1) is Then.WAIT
        assert row.after(row.patience) is Then.REPLACE
        assert row.patience <= 60
    assert (row.then is Then.USE) == (name == "READY")


EXPECTED = {
    "ACTIVE": Then.USE, "FAILED": Then.ASK_AGAIN, "SUSPENDING": Then.REPLACE,
    "SUSPENDED": Then.REPLACE, "DELETING": Then.GONE,
}  # fmt: skip


@pytest.mark.parametrize("name", states.REQUESTS)
def test_states_of_requests(name):
    assert states.request(name).then is EXPECTED.get(name, Then.WAIT)


def test_states_that_nobody_knows_yet():
    assert states.node("SOMETHING_NEW").after(29) is Then.WAIT
    assert states.node("SOMETHING_NEW").after(31) is Then.REPLACE


def test_the_tables_have_all_states_of_the_api():
    """As gcloud's own client has them."""
    found = sorted(
        pathlib.Path("/").glob("usr/*/google-cloud-sdk/lib/**/apis/tpu/v2/tpu_v2_messages.py")
    )
    if not found:
        pytest.skip("gcloud's client of the TPU API is not installed here")
    text = found[0].read_text()
    names = {}
    for part in ("Node", "QueuedResourceState"):
        body = re.search(rf"^class {part}\(.*?(?=^class )", text, re.M | re.S)[0]
        values = re.search(r"class StateValueValuesEnum.*?\n    \"\"\"\n(.*?)\n\n", body, re.S)[1]
        names[part] = set(re.findall(r"(\w+) = \d+", values))
    assert names["Node"] == set(states.NODES) - {states.ABSENT}
    assert names["QueuedResourceState"] == set(states.REQUESTS)


def test_credentials_that_expire(pod):
    pod.plan("run")
    process = pod.train()
    read_until(process, "^step 2")
    pod.scenario(answer={"*": ["There was a problem refreshing your current auth tokens", 5]})
    read_until(process, "your credentials have expired: `gcloud auth login`")
    pod.plan("0")
    for host in pod.cloud.hosts("tpu"):
        pod.cloud.switch_off(host)
    assert "the trainer ended with 0" in finish(process)
    assert not pod.exists()


def test_a_shutdown_notice_does_not_end_the_run(pod):
    """The platform's SIGTERM arrives before the node is said to be preempted."""
    pod.plan("run 0")
    process = pod.train()
    read_until(process, "^step 2")
    for name in ("tpu-w-0", "tpu-w-1"):
        pid = int((pod.host(name) / "spectral_pod/run/pid").read_text())
        os.kill(pid, signal.SIGTERM)
    output = finish(process)
    assert "has lost its trainer" in output
    assert "the trainer ended with 0" in output


def guarded(pod, **metadata):
    """A run whose guard acts within a second, and not only after minutes."""
    pod.scenario(metadata={f"spectral-pod-{key}": str(value) for key, value in metadata.items()})


def until_gone(pod):
    for _ in range(1500):
        if not pod.exists():
            return
        time.sleep(0.02)
    raise AssertionError((pod.root / "hosts" / "tpu-w-0" / "guard" / "log").read_text())


def test_a_launcher_that_is_killed_while_installing_leaves_nothing(pod):
    pod.scenario(fail_install={"tpu-w-1": 10**6}, metadata={"spectral-pod-keep-seconds": "2"})
    process = pod.train()
    read_until(process, "no network on tpu-w-1")
    process.kill()
    until_gone(pod)


def test_a_run_that_ends_without_its_launcher_leaves_nothing(pod):
    guarded(pod, **{"keep-seconds": 2})
    pod.plan("run")
    process = pod.train()
    read_until(process, "^step 2")
    process.kill()
    time.sleep(4)
    assert pod.exists()  # while it trains
    for name in ("tpu-w-0", "tpu-w-1"):
        os.kill(int((pod.host(name) / "spectral_pod/run/pid").read_text()), signal.SIGTERM)
    until_gone(pod)


def test_a_guard_that_starts_before_the_network(pod):
    """And whose starter is gone: what it says must not end it."""
    guarded(pod, **{"keep-seconds": 2})
    subprocess.run([pod.root / "bin/gcloud", *CREATE_BY_HAND], check=True, env=pod.environment())
    host = pod.root / "hosts" / "tpu-w-0"
    name = host / "metadata" / "spectral-pod-name"
    (host / "metadata" / "agent-worker-number").write_text("0")
    (host / "metadata" / "spectral-pod-max-run-seconds").write_text("0")
    process = subprocess.Popen(
        ["bash", host / "startup"], env=pod.cloud.environment(host), stdout=subprocess.PIPE,
        cwd=host, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.read() == b""  # at once: the boot goes on
    process.wait()
    time.sleep(1)
    assert pod.exists()
    name.write_text("tpu")
    until_gone(pod)


def test_a_slice_that_has_lived_long_enough(pod):
    guarded(pod, **{"max-run-seconds": 6, "keep-seconds": 60})
    pod.plan("run")
    output = finish(pod.train("--max_run_hours=1", "--keep"), 75)
    assert "saved" in output
    assert "at most 1 hours on one slice, $25.76" in output
    until_gone(pod)


def test_a_slice_that_may_not_delete_itself(pod):
    (pod.root / "denied").touch()
    output = finish(pod.train())
    assert "the slice may delete itself: no: the service account needs roles/tpu.admin" in output
    assert "the slice cannot delete itself (above)" in output


def test_keeping_a_slice_holds_for_its_guard(pod):
    finish(pod.train("--keep"))
    assert (pod.root / "hosts/tpu-w-0/metadata/spectral-pod-keep-seconds").read_text() == "0"
    pod.run("delete", *WHERE)


def test_a_slice_that_deleted_itself_after_the_end(pod):
    pod.plan("run")
    process = pod.train()
    read_until(process, "^step 2")
    (pod.root / "bucket/objects/bucket_run_result.json").touch()
    gcloud.queued_resources_delete(pod.cloud, "tpu", force="")
    assert "tpu was deleted, after the run had ended" in finish(process)
