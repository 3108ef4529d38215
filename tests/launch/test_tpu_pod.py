"""launch/tpu_pod.sh from end to end, against gcloud.py beside this and folders for workers."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from types import SimpleNamespace

import pytest

from launch.tpu_pod import checks, states
from launch.tpu_pod import code as code_module
from launch.tpu_pod.cloud import Node, Worker
from launch.tpu_pod.code import Code
from launch.tpu_pod.states import Then
from launch.tpu_pod.workers import Workers
from spectral_pod.errors import ConfigError
from tests.launch import gcloud
from tools import exit_codes

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
# What the launcher uses beside its own folders: nothing that would have to be installed.
CODE = (
    "tools/__init__.py", "tools/exit_codes.py", "spectral_pod/__init__.py",
    "spectral_pod/errors.py", "spectral_pod/analysis/__init__.py",
    "spectral_pod/analysis/hardware.py",
)  # fmt: skip
RUN_GCLOUD = (
    f"import sys; sys.path.append('{HERE}'); import gcloud; sys.exit(gcloud.main(sys.argv[1:]))"
)
WHERE = ["--name=tpu", "--zone=us-central2-b"]
CREATE_BY_HAND = [
    "compute", "tpus", "queued-resources", "create", "tpu", "--node-id=tpu", "--zone=us-central2-b",
    "--accelerator-type=v4-16", "--runtime-version=a", "--valid-until-duration=9s",
    "--metadata=a=b", f"--metadata-from-file=startup-script={ROOT / 'launch/pod/guard.sh'}",
]  # fmt: skip
TRAINER = ["--config=configs/a.py", "--workdir=gs://bucket/run"]

# On workers. The trainer ends its n-th start as the n-th word of the plan says: with that code, or,
# for `run`, with 75 at SIGTERM. $BUCKET stands for what outlives a slice.
WORKER_BIN = {
    "hostname": "echo $HOST",
    "sudo": "echo $* >>$HOME/sudo",
    "sleep": "exec /bin/sleep 0.03",
    "python3": """
        left=$(cat $HOME/failures)
        echo $((left - 1)) >$HOME/failures
        if [ $left -gt 0 ]; then echo "no network on $HOST" >&2; exit 1; fi
        echo "$*" >>$HOME/pip
        mkdir -p $HOME/.local/bin
        cp $(dirname $0)/uv $HOME/.local/bin/uv""",
    "uv": """
        echo "$*" >>$HOME/uv_calls
        if [ $1 = venv ]; then
            venv=${*: -1}
            mkdir -p $venv/bin
            cp $(dirname $(command -v sudo))/trainer $venv/bin/python
        fi""",
    # Google's metadata server, and the APIs that the guard calls.
    "curl": f"""
        url=${{*: -1}}
        case $url in
        */project/project-id) echo project-1 ;;
        */instance/zone) echo projects/1/zones/us-central2-b ;;
        */token) echo '{{"access_token":"secret-token","expires_in":3599}}' ;;
        */instance/attributes/*) cat $GUARD_STATE/../metadata/${{url##*/}} ;;
        *:testIamPermissions) [ -e $CLOUD/denied ] || echo '["tpu.nodes.delete"]' ;;
        https://tpu.googleapis.com/v2/projects/project-1/locations/us-central2-b/queuedResources/*)
            [[ $(cat) = "Authorization: Bearer secret-token" ]] || exit 22
            [[ "$*" = *"--request DELETE"*force=true && "$*" != *secret* ]] || exit 22
            [ ! -e $CLOUD/denied ] || exit 22
            name=${{url##*/}}
            cd / && GCLOUD_STANDIN=$CLOUD setsid {sys.executable} -ISc "{RUN_GCLOUD}" \\
                compute tpus queued-resources delete ${{name%%\\?*}} --zone=us-central2-b \\
                --force --quiet ;;
        *) exit 22 ;;
        esac""",
    "trainer": """
        printf '%s\\0' "$@" >$BUCKET/argv.$HOST
        echo >>$BUCKET/starts.$HOST
        env >$BUCKET/env.$HOST
        plan=($(cat $BUCKET/plan.$HOST 2>/dev/null || cat $BUCKET/plan))
        start=$(($(wc -l <$BUCKET/starts.$HOST) - 1))
        what=${plan[start < ${#plan[@]} ? start : ${#plan[@]} - 1]}
        trap 'echo saved; exit 75' TERM
        while true; do
            echo >>$BUCKET/steps.$HOST
            echo "step $(wc -l <$BUCKET/steps.$HOST) loss 0.5"
            if [ $what != run ]; then exit $what; fi
            /bin/sleep 0.05
        done""",
}


class Pod:
    """A checkout, the stand-in for Google's cloud, and the launcher between them."""

    def __init__(self, folder):
        self.checkout, self.root = folder / "checkout", folder / "cloud"
        self.cloud = gcloud.Cloud(self.root)
        for name in ("worker_bin", "bucket/objects", "hosts", "bin", "home"):
            (self.root / name).mkdir(parents=True)
        for name, text in WORKER_BIN.items():
            executable(self.root / "worker_bin" / name, text)
        executable(self.root / "bin" / "gcloud", f'exec {sys.executable} -ISc "{RUN_GCLOUD}" "$@"')
        self.plan("0")
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        for file in CODE:
            (self.checkout / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, self.checkout / file)
        (self.checkout / "requirements.txt").write_text("jax==0.10.2\n")
        (self.checkout / ".gitignore").write_text(".venv\n__pycache__\n")
        (self.checkout / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(
            self.checkout / "requirements.txt", self.checkout / ".venv/requirements.installed"
        )
        self.preflight(0)
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        done = subprocess.run(command, cwd=self.checkout, check=True, stdout=subprocess.PIPE)
        return done.stdout.decode()

    def commit(self):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=state")

    def preflight(self, code):
        text = f'printf "%s\\n" "$@" >{self.root}/preflight; exit {code}'
        executable(self.checkout / ".venv/bin/python", text)

    def plan(self, text, host=None):
        name = f"plan.{host}" if host else "plan"
        (self.root / "bucket" / name).write_text(text)

    def scenario(self, **what):
        (self.root / "scenario").write_text(json.dumps(what))

    def environment(self, poll="0.1"):
        return os.environ | {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "GCLOUD_STANDIN": str(self.root),
            "TPU_POD_POLL_SECONDS": poll,
            "TMPDIR": str(self.root),
            "HOME": str(self.root / "home"),
        }

    def start(self, *arguments, poll="0.1"):
        command = [self.checkout / "launch" / "tpu_pod.sh", *arguments]
        with open(self.root / f"output.{time.monotonic_ns()}", "w") as output:
            process = subprocess.Popen(
                command,
                env=self.environment(poll),
                cwd=self.checkout,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        process.output = pathlib.Path(output.name)
        return process

    def train(self, *options, trainer=(), poll="0.1"):
        command = [*WHERE, "--type=v4-16", *options, "--", *TRAINER, *trainer]
        return self.start(*command, poll=poll)

    def run(self, *arguments, code=0):
        return finish(self.start(*arguments), code)

    def calls(self, action=None):
        """What gcloud was asked, or that of it which creates, describes ..."""
        file = self.root / "calls"
        calls = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        return [call for call in calls if action is None or gcloud.parse(call)[0].endswith(action)]

    def exists(self):
        with self.cloud.changing() as (resources, _):
            return bool(resources)

    def host(self, name):
        return self.cloud.home(self.root / "hosts" / name)

    def starts(self, host="tpu-w-0"):
        file = self.root / "bucket" / f"starts.{host}"
        return len(file.read_text()) if file.exists() else 0

    def argv(self, host):
        return (self.root / "bucket" / f"argv.{host}").read_text().split("\0")[:-1]


def executable(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def finish(process, code=0):
    """All that it said."""
    process.wait(timeout=60)
    output = process.output.read_text()
    assert process.returncode == code, output
    assert "COULD NOT DELETE" not in output
    return output


def dry_run(process):
    """The commands that it printed, as a shell reads them."""
    text = finish(process)
    commands = [line for line in text.splitlines() if not line.startswith("tpu_pod: ")]
    script = 'p() { printf "%s\\0" "$@" && echo; }\n' + "\n".join(f"p {line}" for line in commands)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return [command.split("\0") for command in done.stdout.split("\0\n")[:-1]]


def read_until(process, pattern):
    """What it had said when a line began to match."""
    for _ in range(3000):
        output = process.output.read_text()
        if re.search(pattern, output, re.M):
            return output
        assert process.poll() is None, output
        time.sleep(0.02)
    raise AssertionError(f"never said {pattern!r}: {output}")


@pytest.fixture
def pod(tmp_path):
    pod = Pod(tmp_path)
    yield pod
    pod.cloud.switch_off(tmp_path)  # what a failed test left, too


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
        (["--type=v4-100"], "Google Cloud has no slice of 100"),
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
    assert "runs another command; stop it first: --config=configs/a.py" in other
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


def test_what_may_not_be_looked_at_is_only_reported(pod):
    pod.scenario(answer={"storage buckets describe": "HTTPError 403: me does not have access"})
    assert "--workdir=gs://bucket/run: not checked, as you may not" in finish(pod.train())


def test_a_run_that_has_ended_is_not_paid_for_again(pod):
    (pod.root / "bucket/objects/bucket_run_result.json").touch()
    assert "gs://bucket/run/result.json is there: this run has ended" in finish(pod.train(), 2)
    assert not pod.calls("queued-resources create")
    finish(pod.train("--again"))
    assert pod.starts() == 1


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


# --------------------------------------------------------------------- the stand-in is honest


@pytest.mark.parametrize("command", gcloud.COMMANDS)
def test_stand_in_accepts_what_gcloud_does(command):
    """Its flags are the real ones. The real program's own answer is that nobody is logged in."""
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed here: the stand-in's flags are not checked")
    with tempfile.TemporaryDirectory() as config:
        environment = os.environ | {"CLOUDSDK_CONFIG": config, "CLOUDSDK_CORE_PROJECT": "project-1"}
        count, own, _ = gcloud.COMMANDS[command]
        for flags in choices(own):
            argv = ["gcloud", *command.split(), *[POSITIONAL.get(command, "tpu")] * count]
            argv += [f"{flag}={VALUES.get(flag, 'a')}" if own[flag] else flag for flag in flags]
            if "scp" in command:
                argv[-len(flags) - 2 : -len(flags)] = ["file", "tpu:file"]
            done = subprocess.run(
                [*argv, "--quiet"], capture_output=True, text=True, env=environment
            )
            assert done.returncode != 2, done.stderr
            assert not re.search("unrecognized|Invalid|must be|Must be", done.stderr), done.stderr


POSITIONAL = {
    "storage ls": "gs://a/b", "storage buckets describe": "gs://a",
    "iam service-accounts describe": "a@b.iam.gserviceaccount.com", "config get-value": "project",
}  # fmt: skip
VALUES = {
    "--zone": "us-central2-b", "--node-count": "2", "--valid-until-duration": "86400s",
    "--ssh-flag": "-oConnectTimeout=20", "--scp-flag": "-oConnectTimeout=20",
    "--labels": "a=b,c=d", "--metadata": "a=b,c=d", "--data-disk": "source=a,mode=read-only",
    "--metadata-from-file": f"startup-script={ROOT / 'launch/pod/guard.sh'}",
    "--scopes": "https://www.googleapis.com/auth/cloud-platform", "--worker": "0,1",
    "--filter": "status:ACTIVE", "--command": "a b; c",
}  # fmt: skip


def choices(flags):
    """The flags, without those that exclude others: one choice for each of these."""
    alternatives = [{"--node-id"}, {"--node-count", "--node-prefix"}]
    if "--node-id" not in flags:
        return [
            [
                flag
                for flag in flags
                if flag != "--internal-ip" or "--tunnel-through-iap" not in flags
            ]
        ]
    return [[flag for flag in flags if flag not in other] for other in alternatives]
