"""launch/tpu_pod.sh from end to end, against gcloud.py beside this and folders for workers."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch import gcloud

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
RUN_GCLOUD = (
    f"import sys; sys.path.append('{HERE}'); import gcloud; sys.exit(gcloud.main(sys.argv[1:]))"
)
WHERE = ["--name=tpu", "--zone=us-central2-b"]
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
    "trainer": """
        printf '%s\\0' "$@" >$BUCKET/argv.$HOST
        echo >>$BUCKET/starts.$HOST
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
        for name in ("worker_bin", "bucket", "hosts", "bin"):
            (self.root / name).mkdir(parents=True)
        for name, text in WORKER_BIN.items():
            executable(self.root / "worker_bin" / name, text)
        executable(self.root / "bin" / "gcloud", f'exec {sys.executable} -ISc "{RUN_GCLOUD}" "$@"')
        self.plan("0")
        shutil.copytree(LAUNCH, self.checkout / "launch")
        (self.checkout / "requirements.txt").write_text("jax==0.10.2\n")
        (self.checkout / ".gitignore").write_text(".venv\n")
        (self.checkout / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(
            self.checkout / "requirements.txt", self.checkout / ".venv/requirements.installed"
        )
        self.preflight(0)
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=self.checkout, check=True)

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

    def start(self, *arguments):
        environment = os.environ | {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "GCLOUD_STANDIN": str(self.root),
            "TPU_POD_POLL_SECONDS": "0.1",
            "TMPDIR": str(self.root),
        }
        command = [self.checkout / "launch" / "tpu_pod.sh", *arguments]
        with open(self.root / f"output.{time.monotonic_ns()}", "w") as output:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.checkout,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        process.output = pathlib.Path(output.name)
        return process

    def train(self, *options, trainer=()):
        return self.start(*WHERE, "--type=v4-16", *options, "--", *TRAINER, *trainer)

    def run(self, *arguments, code=0):
        return finish(self.start(*arguments), code)

    def calls(self, action=None):
        """What gcloud was asked, or that of it which creates, describes ..."""
        file = self.root / "calls"
        calls = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        return [call for call in calls if action in (None, call[3])]

    def exists(self):
        with self.cloud.changing() as (resources, _):
            return bool(resources)

    def host(self, name):
        return self.root / "hosts" / name

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
    planned = [command[1:] for command in planned if command[0] == "gcloud"]
    assert all(command in pod.calls() for command in planned)
    assert {(*command[2:4],) for command in planned} == {(*call[2:4],) for call in pod.calls()}
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
    (create,) = pod.calls("create")
    assert {"--spot", "--accelerator-type=v4-16", "--node-id=tpu", "--network=a"} < set(create)
    assert all("--project=project-1" in call for call in pod.calls())
    assert not list(pod.root.glob("*.tar.gz"))


def test_what_is_installed(pod):
    pod.plan("run")
    (pod.checkout / "changed").write_text("not committed")
    process = pod.train()
    output = read_until(process, "^step 2")
    assert "without the 1 uncommitted changes here" in output
    for host in ("tpu-w-0", "tpu-w-1"):
        home = pod.host(host)
        assert (home / "spectral_pod/code/requirements.txt").exists()
        assert not (home / "spectral_pod/code/changed").exists()
        assert (home / "pip").read_text() == "-m pip install --quiet --user uv==0.13.9\n"
        venv, install = (home / "uv_calls").read_text().splitlines()
        assert re.search(r"--python 3\.11 .*/spectral_pod/venv$", venv)
        assert install.endswith("-r " + str(home / "spectral_pod/code/requirements.txt"))
        assert "transparent_hugepage" in (home / "sudo").read_text()
    process.send_signal(signal.SIGHUP)  # a closed terminal ends no run
    assert "goes on" in finish(process, 129)
    assert pod.exists()


def test_the_trainers_code_and_keep(pod):
    pod.plan("3")
    output = finish(pod.train("--keep"), 3)
    assert "the trainer ended with 3 (the numbers went bad)" in output
    assert "tpu-w-1: step 1 loss 0.5" in output  # the end of each log
    assert "AND IS BILLING" in output
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
    (create,) = pod.calls("create")
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
    assert "creating it again (1 of at most 100)" in output
    steps = [int(step) for step in re.findall(r"^step (\d+)", output, re.M)]
    assert steps == sorted(set(steps))  # it went on, and each line was shown once
    assert (len(pod.calls("create")), pod.starts()) == (2, 4)
    assert not pod.exists()


def test_preempted_too_often(pod):
    pod.plan("run")
    process = pod.train("--max_recreations=0")
    read_until(process, "^step")
    pod.cloud.lose("tpu")
    output = finish(process, 1)
    assert re.search("tpu is (SUSPENDED|MISSING)", output)
    assert "more often than --max_recreations=0" in output
    assert not pod.exists()


def test_preemption_while_installing(pod):
    pod.scenario(lose_at_install=1)
    output = finish(pod.train())
    assert "creating it again (1 of at most 100)" in output
    assert "of 3 to install" not in output
    assert (len(pod.calls("create")), pod.starts()) == (2, 1)


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
    assert not pod.calls("ssh")


def test_what_somebody_deletes_stays_deleted(pod):
    pod.plan("run")
    process = pod.train()
    read_until(process, "^step")
    gcloud.queued_resources_delete(pod.cloud, "tpu", force="")
    assert "somebody deleted tpu" in finish(process, 1)
    assert len(pod.calls("create")) == 1


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_fails(pod, state):
    pod.scenario(states=["WAITING_FOR_RESOURCES", "PROVISIONING", state])
    output = finish(pod.train(), 1)
    assert "tpu is PROVISIONING, 0 min" in output
    assert f"tpu is {state}: " + ("no capacity" if state == "FAILED" else "") in output
    assert not pod.exists()


def test_no_tpu_in_time(pod):
    pod.scenario(states=["WAITING_FOR_RESOURCES"])
    assert "no TPU within --wait_minutes=0" in finish(pod.train("--wait_minutes=0"), 1)
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


@pytest.mark.parametrize(("failures", "code"), [(1, 0), (9, 1)])
def test_an_installation_that_fails(pod, failures, code):
    pod.scenario(fail_install={"tpu-w-1": failures})
    output = finish(pod.train(), code)
    assert "no network on tpu-w-1" in output
    assert output.count("of 3 to install and start failed") == min(failures, 3)
    assert len(pod.calls("scp")) == min(failures + 1, 3)
    assert not pod.exists()


@pytest.mark.parametrize(("code", "message"), [(1, "doesn't fit v4-16"), (3, "cannot run")])
def test_preflight_refuses(pod, code, message):
    pod.preflight(code)
    assert message in finish(pod.train(), 2)
    assert not pod.calls()


@pytest.mark.parametrize(("code", "options"), [(1, ["--force"]), (2, [])])
def test_preflight_warns(pod, code, options):
    pod.preflight(code)
    pod.scenario(refuse="enough for this test")
    finish(pod.train(*options), 1)
    assert pod.calls("create")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name=My_TPU"], "--name=My_TPU: must be lower-case"),
        (["--name=a b"], "--name=a b"),
        (["--zone=$(id)"], "--zone="),
        (["--type=v3-8"], "--type=v3-8: must be v4-N"),
        (["--type=cpu-8"], "--type=cpu-8"),
        (["--num_slices=0"], "--num_slices=0"),
        (["--project=P"], "--project=P"),
        (["--spto"], "unknown argument --spto"),
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
    assert "tpu goes on AND IS BILLING: launch/tpu_pod.sh {status,stop,delete} --name=tpu" in output

    other = finish(pod.train(trainer=["--config.seed=2"]), 2)
    assert "runs another command; stop it first: --config=configs/a.py" in other
    (pod.checkout / "file").write_text("new")
    pod.commit()
    assert "a trainer of another revision runs here" in finish(pod.train(), 2)
    assert "tpu is a v4-16, not a v4-32" in finish(pod.train("--type=v4-32"), 2)

    pod.git("reset", "--quiet", "--hard", "HEAD~1")
    again = pod.train()
    output = read_until(again, "^step")
    assert "tpu is there: READY" in output
    assert "tpu-w-1: runs already" in output
    assert (len(pod.calls("create")), pod.starts(), pod.starts("tpu-w-1")) == (1, 1, 1)
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
    assert "there is no tpu in us-central2-b" in pod.run("status", *WHERE, code=1)
    pod.run("delete", *WHERE)


# ---------------------------------------------------------------------------------- --dry_run


@pytest.mark.parametrize("action", ["status", "logs", "stop", "delete"])
def test_dry_run_of_actions(pod, action):
    planned = dry_run(pod.start(action, *WHERE, "--dry_run"))
    assert planned
    assert all(command[:3] == ["gcloud", "compute", "tpus"] for command in planned)
    assert not pod.calls()


# --------------------------------------------------------------------- the stand-in is honest


@pytest.mark.parametrize("command", gcloud.COMMANDS)
def test_stand_in_accepts_what_gcloud_does(command):
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed here: the stand-in's flags are not checked")
    text = subprocess.run(
        ["gcloud", *command.split(), "--help"], capture_output=True, text=True
    ).stdout
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    synopsis = re.search(r"SYNOPSIS\n(.*?)\n\S", text, re.S)[1]
    wide = re.search(r"GCLOUD WIDE FLAGS\n(.*?)\n\S", text, re.S)[1]
    _, own, required = gcloud.COMMANDS[command]
    for flag, takes_value in own.items():
        assert re.search(rf"{flag}{'=' if takes_value else '(?![=-])'}", synopsis), flag
    for flag in gcloud.WIDE:
        assert flag in wide
    optional = re.findall(r"\[(--[\w-]+)", synopsis)
    assert {"--node-id", *required} - {"--format", "--quiet", "--zone", "--command"} <= {
        *re.findall(r"--[\w-]+", synopsis),
        "--node-id",
    }
    assert not required & set(optional) - {"--zone", "--command"}
