"""A checkout, the stand-in for Google's cloud beside this, and the launcher between them."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

from tests.launch import gcloud

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
# What the launcher uses beside its own folders: nothing that would have to be installed.
CODE = (
    "configs/quickstart.py", "tools/__init__.py", "tools/exit_codes.py", "spectral_pod/__init__.py",
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
TRAINER = ["--config=configs/quickstart.py", "--workdir=gs://bucket/run"]

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
        # Not without the lock: a command that is running would write back the scenario it has read.
        with self.cloud.changing() as (_, scenario):
            scenario.clear()
            scenario.update(what)

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
