"""launch/tpu_pod.sh from end to end, against gcloud.py beside this and folders for workers."""

import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tarfile

import pytest

from launch.tpu_pod import code as code_module
from launch.tpu_pod.cloud import Node, Worker
from launch.tpu_pod.code import Code
from launch.tpu_pod.workers import Workers
from tests.launch import gcloud
from tests.launch.pod import (
    CREATE_BY_HAND,
    TRAINER,
    WHERE,
    dry_run,
    finish,
    read_until,
)

# ------------------------------------------------------------------------------- one whole run


def test_create_train_delete(pod):
    weird = [
        "--config.model.pattern=('hyena','hyena+delta')",
        '--config.note=it\'s "$HOME" *.py `id` \\ {} [a-z]  two\tspaces; ü\nnewline',
        "",
    ]
    options = ("--spot", "--project=project-1", "--network=a", "--service_account=b@c")
    planned = dry_run(pod.train(*options, "--dry_run", trainer=weird))
    assert not pod.calls()
    assert not (pod.root / "preflight").exists()

    output = finish(pod.train(*options, trainer=weird))
    planned = [without_files(command[1:]) for command in planned if command[0] == "gcloud"]
    called = [without_files(call) for call in pod.calls()]
    assert [command for command in planned if command not in called] == []
    kinds = [{gcloud.parse(call)[0] for call in calls} for calls in (planned, called)]
    assert kinds[1] - kinds[0] <= {"storage ls"}  # whether the run has ended before
    for host in ("tpu-w-0", "tpu-w-1"):
        assert pod.argv(host) == ["-m", "spectral_pod.main", *TRAINER, *weird]
    assert "step 1 loss 0.5" in output
    assert "the trainer ended with 0 (done)" in output
    assert not pod.exists()
    assert (pod.root / "preflight").read_text().split("\n")[:3] == [
        "-m",
        "tools.preflight",
        TRAINER[0],
    ]
    assert "--topology=v4-16\n--num_slices=1\n" in (pod.root / "preflight").read_text()
    (create,) = pod.calls("queued-resources create")
    assert {"--spot", "--accelerator-type=v4-16", "--node-id=tpu", "--network=a"} < set(create)
    assert all("--project=project-1" in call for call in pod.calls() if "compute" in call)
    assert {"--metadata-from-file", "--valid-until-duration"} <= {
        flag.partition("=")[0] for flag in create
    }
    assert not list(pod.root.glob("*.tar.gz"))


def without_files(command):
    """A command without the names of temporary files in it."""
    return [re.sub(r"^/\S*/spectral_pod-\S+$", "ARCHIVE", word) for word in command]


def test_secrets_stay_where_they_belong(pod, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret 'key'")
    pod.plan("run 0")
    options = ("--env=WANDB_API_KEY", "--env=LIBTPU_INIT_ARGS=--a=1 --b")
    planned = dry_run(pod.train(*options, "--dry_run"))
    process = pod.train(*options)
    read_until(process, "^step 2")
    environment = (pod.root / "bucket" / "env.tpu-w-1").read_text()
    assert "WANDB_API_KEY=s3cret 'key'\n" in environment
    assert "LIBTPU_INIT_ARGS=--a=1 --b\n" in environment
    (file,) = (pod.host("tpu-w-1") / "spectral_pod").glob("environment")
    assert file.stat().st_mode & 0o77 == 0
    holders = subprocess.run(
        ["grep", "-rl", "s3cret", pod.root / "hosts"], capture_output=True, text=True
    ).stdout.split()
    assert {pathlib.Path(name).name for name in holders} == {"environment"}
    process.send_signal(signal.SIGINT)
    assert "s3cret" not in finish(process, 130) + json.dumps([planned, pod.calls()])
    pod.run("delete", *WHERE)


def test_what_a_variable_without_a_value_means(pod):
    output = finish(pod.train("--env=NOT_SET_HERE"), 2)
    assert "--env=NOT_SET_HERE: there is no variable NOT_SET_HERE here" in output


def test_what_is_installed(pod):
    pod.plan("run")
    (pod.checkout / "changed").write_text("not committed")
    process = pod.train()
    output = read_until(process, "^step 2")
    assert "installed as it is, with what is not committed: changed" in output
    (pod.checkout / "later").write_text("not in the archive")
    for host in ("tpu-w-0", "tpu-w-1"):
        home = pod.host(host)
        assert (home / "spectral_pod/code/requirements.txt").exists()
        assert (home / "spectral_pod/code/changed").exists()
        assert not (home / "spectral_pod/code/.venv").exists()  # which git ignores
        assert not list(home.glob("*.tar.gz"))
        assert (home / "pip").read_text() == "-m pip install --quiet --user uv==0.13.9\n"
        venv, install = (home / "uv_calls").read_text().splitlines()
        assert re.search(r"--python 3\.11 .*/spectral_pod/venv$", venv)
        assert install.endswith("-r " + str(home / "spectral_pod/code/requirements.txt"))
        assert "transparent_hugepage" in (home / "sudo").read_text()
    process.send_signal(signal.SIGHUP)  # a closed terminal ends no run
    assert "goes on" in finish(process, 129)
    assert pod.exists()
    assert "?? changed" in pod.git("status", "--porcelain")  # yours is as it was


def test_the_trainers_code_and_keep(pod):
    pod.plan("3")
    output = finish(pod.train("--keep"), 3)
    assert "the trainer ended with 3 (the numbers went bad)" in output
    assert "tpu-w-1: step 1 loss 0.5" in output  # the end of each log
    assert "AND IS BILLED" in output
    assert pod.exists()


def test_one_worker_fails_alone(pod):
    pod.plan("run")
    pod.plan("2", host="tpu-w-1")
    output = finish(pod.train(), 2)
    assert "tpu-w-1 ended with 2 (a mistake in the command or configuration); stopping" in output
    assert "saved" in output
    assert not pod.exists()


def test_several_slices(pod):
    finish(pod.train("--num_slices=2", "--type=v5e-8", "--keep"))
    (create,) = pod.calls("queued-resources create")
    assert {"--node-count=2", "--node-prefix=tpu", "--accelerator-type=v5litepod-8"} < set(create)
    hosts = [f"tpu-{node}-w-{worker}" for node in range(2) for worker in range(2)]
    assert all(pod.argv(host)[2:] == TRAINER for host in hosts)
    assert pod.run("delete", *WHERE).count("ended 0") == 4
    assert not pod.exists()


# -------------------------------------------------------------------------------- preemption


def test_preemption(pod):
    pod.plan("run")
    process = pod.train("--spot")
    read_until(process, "^step 3")
    pod.plan("run 75 137 0")  # the codes in between restart it where it is
    pod.cloud.lose("tpu", "PREEMPTED")
    output = finish(process)
    assert "tpu is PREEMPTED" in output
    assert "asking for others (1)" in output
    steps = [int(step) for step in re.findall(r"^step (\d+)", output, re.M)]
    assert steps == sorted(set(steps))  # it went on, and each line was shown once
    assert (len(pod.calls("queued-resources create")), pod.starts()) == (2, 4)
    assert not pod.exists()


def test_preempted_too_often(pod):
    pod.plan("run")
    process = pod.train("--max_recreations=0")
    read_until(process, "^step")
    pod.cloud.lose("tpu")
    output = finish(process, 1)
    assert "tpu is SUSPENDED" in output
    assert "more often than --max_recreations=0" in output
    assert not pod.exists()


def test_preemption_while_installing(pod):
    pod.scenario(lose_at_install=1)
    output = finish(pod.train())
    assert "asking for others (1)" in output
    assert (len(pod.calls("queued-resources create")), pod.starts()) == (2, 1)


@pytest.mark.parametrize("wiped", [False, True])
def test_a_lost_trainer_is_started_again(pod, wiped):
    pod.plan("run 0")
    process = pod.train()
    read_until(process, "^step")
    for host in pod.cloud.hosts("tpu"):
        pod.cloud.switch_off(host)  # a reboot
    if wiped:
        shutil.rmtree(pod.host("tpu-w-1") / "spectral_pod")  # a repair
    assert "has lost its trainer" in finish(process)
    assert (pod.starts(), pod.starts("tpu-w-1")) == (2, 2)


# ---------------------------------------------------------------------- again, and interrupted


def test_ctrl_c_while_waiting_withdraws_the_request(pod):
    pod.scenario(states=["WAITING_FOR_RESOURCES"])
    process = pod.train()
    read_until(process, "WAITING_FOR_RESOURCES, 0 min")
    process.send_signal(signal.SIGINT)
    assert "deleted tpu" in finish(process, 130)
    assert not pod.exists()


def test_ctrl_c_leaves_the_request_of_another_call(pod):
    pod.scenario(states=["WAITING_FOR_RESOURCES"])
    first = pod.train()
    read_until(first, "WAITING_FOR_RESOURCES, 0 min")
    second = pod.train()
    read_until(second, "WAITING_FOR_RESOURCES, 0 min")
    second.send_signal(signal.SIGINT)
    assert "launch/tpu_pod.sh delete --name=tpu" in finish(second, 130)
    assert pod.exists()
    first.send_signal(signal.SIGINT)
    finish(first, 130)


def test_ctrl_c_detaches_and_the_same_command_attaches(pod):
    pod.plan("run")
    process = pod.train()
    read_until(process, "^step 2")
    process.send_signal(signal.SIGINT)
    output = finish(process, 130)
    assert (
        "tpu goes on AND IS BILLED: launch/tpu_pod.sh {status,logs,stop,delete} --name=tpu"
        in output
    )

    other = finish(pod.train(trainer=["--config.seed=2"]), 2)
    assert "runs another command; stop it first: --config=configs/quickstart.py" in other
    (pod.checkout / "file").write_text("new")
    pod.commit()
    assert "a trainer of another revision runs here" in finish(pod.train(), 2)
    assert "tpu is a v4-16, not a v4-32" in finish(pod.train("--type=v4-32"), 2)

    pod.git("reset", "--quiet", "--hard", "HEAD~1")
    again = pod.train()
    output = read_until(again, "^step")
    assert "tpu is there: ACTIVE" in output
    assert "tpu-w-1: runs already" in output
    assert (len(pod.calls("queued-resources create")), pod.starts(), pod.starts("tpu-w-1")) == (
        1,
        1,
        1,
    )
    assert len((pod.host("tpu-w-0") / "pip").read_text().splitlines()) == 1

    stopped = pod.run("stop", *WHERE)
    assert stopped.count("ended 75") == 2
    assert "the trainer ended with 75 (preempted, state saved)" in finish(again, 75)
    assert not pod.exists()


def test_status_logs_delete(pod):
    pod.plan("run")
    process = pod.train()
    read_until(process, "^step 2")
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    status = pod.run("status", *WHERE)
    assert "tpu is ACTIVE" in status
    assert "tpu READY" in status
    assert re.search(r"^tpu-w-1 running \d+ step \d+ loss 0.5$", status, re.M)
    logs = pod.start("logs", *WHERE, "--worker=1")
    read_until(logs, "^step")
    deleted = pod.run("delete", *WHERE)
    assert deleted.count("ended 75") == 2
    assert "deleted tpu" in deleted
    read_until(logs, "lost|saved")
    logs.kill()
    assert not pod.exists()
    for action in ("status", "delete"):
        said = pod.run(action, *WHERE, code=1)
        assert "there is no tpu in us-central2-b, project project-1" in said


def test_a_run_of_an_earlier_call_is_not_given_up_as_nobody_answers(pod):
    """The same command from a place that ssh does not get through from."""
    pod.plan("run")
    first = pod.train()
    read_until(first, "^step 2")
    first.kill()
    pod.scenario(unreachable={"tpu-w-0": 10**6, "tpu-w-1": 10**6})
    again = pod.train()
    read_until(again, "some worker does not answer, and may train")
    again.send_signal(signal.SIGINT)
    assert "the request for tpu stays" in finish(again, 130)
    pod.scenario()
    assert pod.run("delete", *WHERE).count("ended 75") == 2


def test_a_slice_on_which_another_launcher_installs_is_left_to_it(pod):
    finish(pod.train("--keep"))
    with open(pod.host("tpu-w-1") / "spectral_pod/install.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as install.sh does
        process = pod.train()
        read_until(process, "tpu: another launcher installs on it; trying again")
        process.send_signal(signal.SIGINT)
        assert "the request for tpu stays" in finish(process, 130)
    assert pod.exists()


def test_another_launchers_request_is_not_deleted(pod):
    """It asks for the same name between our look and our request."""
    subprocess.run([pod.root / "bin/gcloud", *CREATE_BY_HAND], check=True, env=pod.environment())
    pod.scenario(answer={"queued-resources describe": ["NOT_FOUND: tpu", 1]})
    assert "tpu is a v4-16, not a v4-32" in finish(pod.train("--type=v4-32"), 2)
    assert pod.exists()


def test_a_request_that_somebody_withdraws_is_not_made_again(pod):
    pod.scenario(states=["WAITING_FOR_RESOURCES"])
    process = pod.train()
    read_until(process, "WAITING_FOR_RESOURCES, 0 min")
    gcloud.queued_resources_delete(pod.cloud, "tpu", force="")
    assert "somebody deleted tpu" in finish(process, 1)
    assert len(pod.calls("queued-resources create")) == 1


def test_several_signals_at_once(pod):
    pod.scenario(states=["WAITING_FOR_RESOURCES"])
    process = pod.train()
    read_until(process, "WAITING_FOR_RESOURCES, 0 min")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode in (129, 130, 143)
    assert not pod.exists()


def test_an_archive_that_did_not_arrive_is_not_replaced_by_an_older_one(pod):
    pod.plan("run 0")
    first = pod.train()
    read_until(first, "^step 2")
    first.kill()
    (pod.checkout / "file").write_text("new")
    assert "a trainer of another revision runs here" in finish(pod.train(), 2)
    assert not list(pod.host("tpu-w-0").glob("*.tar.gz"))
    pod.run("stop", *WHERE)
    pod.scenario(answer={"tpu-vm scp": ["Connection timed out", 1]})
    output = finish(pod.train())
    assert "not installed or started" in output
    assert "the trainer ended with 0" in output


def test_the_code_of_a_run_outlasts_git(tmp_path):
    """Its tree is in no commit, and git drops such after two weeks."""
    for argv in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=a"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *argv], cwd=tmp_path, check=True)
    (tmp_path / "file").write_text("not committed")
    code = Code([("KEY", "it's")], tmp_path)
    assert code.revision != Code([], tmp_path).revision
    subprocess.run(["git", "gc", "--quiet", "--prune=now"], cwd=tmp_path, check=True)
    with code.archive() as name, tarfile.open(name) as archive:
        assert os.stat(name).st_mode & 0o77 == 0
        assert archive.extractfile("file").read() == b"not committed"
        assert archive.getmember(code_module.ENVIRONMENT).mode == 0o600
    assert not os.path.exists(name)


@pytest.mark.parametrize(
    ("host", "index"),
    [("t1v-n-1a-w-3", 3), ("t1v-n-1a-w-3.us-central2-b.c.p.internal", 3), ("other", None)],
)
def test_names_of_hosts(host, index):
    workers = Workers(None, None)
    workers.belong_to([Node("a", "READY", 4), Node("b", "READY", 1)])
    found = workers._worker(host, "a", "all")
    assert (found and found.index) == index
    assert workers._worker("anything", "b", "all") == Worker("b", 0)


# ---------------------------------------------------------------------------------- --dry_run


@pytest.mark.parametrize("action", ["status", "logs", "stop", "delete"])
def test_dry_run_of_actions(pod, action):
    planned = dry_run(pod.start(action, *WHERE, "--dry_run"))
    assert planned
    assert all(command[:3] == ["gcloud", "compute", "tpus"] for command in planned)
    assert not pod.calls()
