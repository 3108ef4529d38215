"""launch/tpu_pod.sh: what goes wrong, and what is known before anything is rented."""

import os
import re
import signal
import subprocess
from types import SimpleNamespace

import pytest

from launch.tpu_pod import checks
from launch.tpu_pod.cloud import Node
from launch.tpu_pod.workers import Workers
from spectral_pod.errors import ConfigError
from tests.launch import gcloud
from tests.launch.pod import CREATE_BY_HAND, ROOT, WHERE, executable, finish, read_until
from tools import exit_codes

# ------------------------------------------------------------------------------ what goes wrong


def test_quota(pod):
    pod.scenario(refuse="RESOURCE_EXHAUSTED: Quota limit TPUV4s has been exceeded. Limit: 0")
    assert "Quota limit TPUV4s" in finish(pod.train(), 1)
    assert not pod.calls("tpu-vm ssh")


def test_what_somebody_deletes_stays_deleted(pod):
    pod.plan("run")
    process = pod.train()
    read_until(process, "^step")
    gcloud.queued_resources_delete(pod.cloud, "tpu", force="")
    assert "somebody deleted tpu" in finish(process, 1)
    assert len(pod.calls("queued-resources create")) == 1


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_for_which_there_is_no_capacity_is_made_again(pod, state):
    pod.scenario(states=[["WAITING_FOR_RESOURCES", "PROVISIONING", state], ["ACTIVE"]])
    output = finish(pod.train())
    assert "tpu is PROVISIONING, 0 min" in output
    assert f"tpu is {state}" + (": no capacity" if state == "FAILED" else "") in output
    assert len(pod.calls("queued-resources create")) == 2
    assert not pod.exists()


@pytest.mark.parametrize("failure", [(3, "no such network"), (8, "Quota 'TPUS' exceeded")])
def test_a_request_that_can_never_be_met_ends(pod, failure):
    pod.scenario(states=["WAITING_FOR_RESOURCES", "FAILED"], failure=failure)
    assert f"tpu is FAILED: {failure[1]}" in finish(pod.train(), 1)
    assert not pod.exists()


def test_no_capacity_after_a_preemption_is_waited_out(pod):
    """It is not a preemption: many more refusals than --max_recreations do not end the run."""
    pod.plan("run 0")
    pod.scenario(refuse_later=4)
    process = pod.train("--max_recreations=1")
    read_until(process, "^step")
    pod.cloud.lose("tpu")
    assert "no more capacity" in finish(process)
    assert len(pod.calls("queued-resources create")) == 6


def test_a_request_that_is_being_deleted_is_waited_for(pod):
    pod.scenario(states=["DELETING"])
    subprocess.run([pod.root / "bin/gcloud", *CREATE_BY_HAND], check=True, env=pod.environment())
    pod.scenario()
    process = pod.train()
    read_until(process, "tpu is DELETING, 0 min")
    gcloud.queued_resources_delete(pod.cloud, "tpu", force="")
    assert "the trainer ended with 0" in finish(process)


def test_no_tpu_in_time(pod):
    pod.scenario(states=["WAITING_FOR_RESOURCES"])
    assert "no TPUs within --wait_minutes=0" in finish(pod.train("--wait_minutes=0"), 1)
    assert not pod.exists()


def test_lost_connections_repeat_no_line(pod):
    pod.plan("run")
    pod.scenario(drop=3)  # gcloud tries again by itself, with the same command
    process = pod.train()
    read_until(process, "^step 20")
    process.send_signal(signal.SIGINT)
    output = finish(process, 130)
    assert output.count("the connection to worker 0 of tpu was lost; trying again") == 1
    steps = [int(step) for step in re.findall(r"^step (\d+)", output, re.M)]
    assert steps == list(range(1, len(steps) + 1))


def test_an_index_that_is_out_for_a_while(pod):
    """The worker itself tries again, for minutes."""
    pod.scenario(fail_install={"tpu-w-1": 3})
    output = finish(pod.train())
    assert output.count("no network on tpu-w-1") == 3
    assert output.count("trying again in") == 3
    assert len(pod.calls("scp")) == 1


def test_a_worker_that_cannot_be_reached_is_tried_alone(pod):
    pod.scenario(unreachable={"tpu-w-1": 2}, fail_install={})
    output = finish(pod.train())
    assert "worker 1 of tpu: not installed or started; trying again" in output
    assert "until 30 min have passed (which cost $12.88)" in output
    alone = [call for call in pod.calls("ssh") if "--worker=1" in call and "install" in str(call)]
    assert len(alone) == 2
    assert not pod.exists()


def test_ctrl_c_while_installing_leaves_nothing(pod):
    pod.scenario(fail_install={"tpu-w-1": 10**6})
    process = pod.train()
    read_until(process, "not installed or started")
    process.send_signal(signal.SIGINT)
    assert "deleted tpu" in finish(process, 130)
    assert not pod.exists()


@pytest.mark.parametrize(("code", "message"), [(1, "doesn't fit v4-16"), (3, "cannot run")])
def test_preflight_refuses(pod, code, message):
    pod.preflight(code)
    assert message in finish(pod.train(), 2)
    assert not pod.calls("queued-resources create")


def test_without_preflight(pod):
    pod.preflight(3)  # as where there is no libtpu
    finish(pod.train("--no_preflight"))
    assert not (pod.root / "preflight").exists()


@pytest.mark.parametrize(("code", "options"), [(1, ["--force"]), (2, [])])
def test_preflight_warns(pod, code, options):
    pod.preflight(code)
    pod.scenario(refuse="PERMISSION_DENIED: enough for this test")
    finish(pod.train(*options), 1)
    assert pod.calls("queued-resources create")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name=My_TPU"], "--name=My_TPU: must be up to 60"),
        (["--name=a b"], "--name=a b"),
        (["--zone=$(id)"], "--zone="),
        (["--type=v3-8"], "--type=v3-8: must be v4-N"),
        (["--type=cpu-8"], "--type=cpu-8"),
        (["--num_slices=0"], "--num_slices=0: must be a number, at least 1"),
        (["--project=P"], "--project=P"),
        (["--spto"], "unknown argument --spto"),
        (["--spot", "--reserved"], "--spot excludes --reserved and --reservation"),
        (["--name", "a"], "--name=VALUE: the value must be up to 60"),
        (["--keep_minutes=3"], "--keep_minutes=3: must be a number, at least 15"),
        (["--spot=yes"], "--spot takes no value"),
        (["--type=v4-100"], "--type=v4-100: v4-N counts TensorCores, 2 a chip"),
        (["--metadata=startup-script=x"], "this key is the launcher's own"),
        (["--env=1A=b"], "--env: must be NAME=VALUE"),
        (["--", "--workdir=gs://b/r"], "no --config=FILE"),
        (["--", "--config=a.py", "--workdir=/tmp/run"], "no --workdir=gs://"),
    ],
)
def test_mistakes(pod, arguments, message):
    process = pod.start(*WHERE, "--type=v4-16", *arguments)
    assert message in finish(process, 2)
    assert not pod.calls()


def test_help(pod):
    output = pod.run("--help")
    assert output.startswith("Trains on a Cloud TPU slice")
    assert "roles/storage.objectUser" in output
    assert "set -euo" not in output


# ------------------------------------------------------------------------ before it is rented


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"auth list": "Your credentials: gcloud auth login"}, "gcloud auth login"),
        ({"queued-resources list": "PERMISSION_DENIED: API disabled"}, "the TPU API in project"),
        ({"tpu-vm accelerator-types describe": "NOT_FOUND: v4-16"}, "--type in us-central2-b"),
        ({"tpu-vm versions describe": "NOT_FOUND: a"}, "--runtime_version in us-central2-b"),
        ({"storage buckets describe": "gs://bucket not found: 404."}, "--workdir=gs://bucket/run"),
        ({"iam service-accounts describe": "NOT_FOUND: b@c"}, "--service_account"),
    ],
)
def test_what_is_missing_is_known_before(pod, answer, message):
    pod.scenario(answer=answer)
    assert message in finish(pod.train("--service_account=b@c"), 2)
    assert not pod.calls("queued-resources create")


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_the_config_is_a_file_of_the_working_tree(pod, flags):
    for name in ("configs/nothere.py:short", "../outside.py"):
        (pod.checkout.parent / "outside.py").touch()
        trainer = [f"--config={name}", "--workdir=gs://bucket/run"]
        said = finish(pod.train(*flags, trainer=trainer), 2)
        assert f"--config={name.partition(':')[0]}: the working tree, which" in said
    assert not pod.calls()


def test_a_dry_run_says_what_the_slice_costs(pod):
    process = pod.train("--dry_run", "--price_per_chip_hour=2")
    assert "v4:2x2x2, 8 chips, about $16.00 an hour" in finish(process)
    assert not pod.calls()


def test_status_without_an_account(pod):
    """gcloud itself would complain about the name of the request."""
    answer = {
        "auth list": "Your credentials: gcloud auth login",
        "queued-resources describe": "Error parsing [queued_resource].",
    }
    pod.scenario(answer=answer)
    assert "gcloud auth login" in finish(pod.start("status", *WHERE), 2)


def test_what_may_not_be_looked_at_is_only_reported(pod):
    pod.scenario(answer={"storage buckets describe": "HTTPError 403: me does not have access"})
    said = finish(pod.train())
    assert re.search("--workdir=gs://bucket/run: not checked: .*HTTPError 403", said)


def test_a_run_that_has_ended_is_not_paid_for_again(pod):
    (pod.root / "bucket/objects/bucket_run_result.json").touch()
    assert "gs://bucket/run/result.json is there: this run has ended" in finish(pod.train(), 2)
    assert not pod.calls("queued-resources create")


def test_options_that_pods_need(pod):
    options = (
        "--internal_ips", "--reserved", "--labels=team=a,run=b", "--metadata=x=y", "--tags=t",
        "--data_disk=source=projects/p/disk,mode=read-only", "--subnetwork=s", "--reservation=r",
        "--wait_minutes=7", "--max_run_hours=1.5", "--keep_minutes=15",
    )  # fmt: skip
    finish(pod.train(*options))
    (create,) = pod.calls("queued-resources create")
    assert create[0] == "alpha"
    assert {
        "--internal-ips", "--reserved", "--labels=team=a,run=b", "--tags=t", "--subnetwork=s",
        "--data-disk=source=projects/p/disk,mode=read-only", "--reservation=r",
        "--valid-until-duration=420s",
        "--metadata=spectral-pod-name=tpu,spectral-pod-keep-seconds=900,"
        "spectral-pod-max-run-seconds=5400,x=y",
    } < set(create)  # fmt: skip
    for call in pod.calls("tpu-vm ssh") + pod.calls("tpu-vm scp"):
        assert call[0] == "alpha"
        assert "--tunnel-through-iap" in call


def test_many_workers_are_reached_in_batches():
    """gcloud warns of more than 100 connections at once."""
    asked = []

    class Cloud:
        def reach(self, node, workers, command, limit):
            asked.append((node, workers))
            hosts = range(2) if workers == "all" else workers.split(",")
            return "".join(f"spectral_pod: {node}-w-{host} 0." for host in hosts)

    workers = Workers(Cloud(), SimpleNamespace(map=lambda f, items: list(map(f, items))))
    workers.belong_to([Node("a", "READY", 150), Node("b", "READY", 2)])
    assert set(workers.run("x", workers.all)) == set(workers.all)
    assert [(node, len(which.split(","))) for node, which in asked] == [
        ("a", 64), ("a", 64), ("a", 22), ("b", 1)
    ]  # fmt: skip
    assert asked[-1] == ("b", "all")


@pytest.mark.parametrize(
    ("listed", "passphrase", "socket"),
    [("ours", "", None), ("other", "", ""), ("other", "x", None)],
)
def test_ssh_keys(tmp_path, monkeypatch, listed, passphrase, socket):
    """gcloud refuses where an agent has other keys only; without a passphrase it needs no agent."""
    monkeypatch.setenv("HOME", str(tmp_path))
    key = tmp_path / ".ssh" / "google_compute_engine"
    assert checks.ssh_environment() == {"SSH_AUTH_SOCK": ""}  # gcloud will make one
    key.parent.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-N", passphrase, "-f", key], check=True)
    public = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True).stdout
    agent = tmp_path / "bin" / "ssh-add"
    agent.parent.mkdir()
    executable(agent, f"echo '{public.strip() if listed == 'ours' else '256 SHA256:abc me'}'")
    monkeypatch.setenv("PATH", f"{agent.parent}:{os.environ['PATH']}")
    if listed == "other" and passphrase:
        with pytest.raises(ConfigError, match=r"ssh-add ~/\.ssh/google_compute_engine"):
            checks.ssh_environment()
    else:
        assert checks.ssh_environment() == ({} if socket is None else {"SSH_AUTH_SOCK": socket})


def test_fixes_that_are_too_large_to_ship(pod):
    (pod.checkout / "weights.bin").write_bytes(bytes(110_000_000))
    assert "weights.bin alone 110 MB; what the run does not need" in finish(pod.train(), 2)


def test_exit_codes_mean_the_same_to_the_shell():
    """launch/exit_codes.sh is what the supervisor and the workers go by."""
    script = "source launch/exit_codes.sh; for ((c = 0; c < 256; c++)); do "
    script += 'exit_is_curable $c && echo -n "+ " || echo -n "- "; exit_meaning $c; done'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"{'+' if exit_codes.is_curable(code) else '-'} {exit_codes.meaning(code)}"
        for code in range(256)
    ]
