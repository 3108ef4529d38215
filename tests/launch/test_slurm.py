"""launch/slurm.sh with stand-ins for srun, scontrol and the trainer; SLURM itself where it runs."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.trainer import ROOT

TASKS = 2
# As the real one: options, then a command that each task runs in a process group of its own; the
# highest of their codes.
SRUN = f"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> srun_options; shift; done
set -m
for ((i = 0; i < {TASKS}; i++)); do SLURM_PROCID=$i "$@" & tasks+=($!); done
highest=0
for task in "${{tasks[@]}}"; do
    code=0; wait "$task" || code=$?
    if ((code > highest)); then highest=$code; fi
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> scontrol_calls
"""
# Its first argument is what each task ends with: an exit code, or a signal that arrives.
TRAINER = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.1), sys.exit(75)))
task = int(os.environ["SLURM_PROCID"])
pathlib.Path(f"task{task}").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
end = sys.argv[1].removeprefix("--ends=").split(",")[task]
if end == "TERM":
    os.killpg(0, signal.SIGTERM)
elif end == "KILL":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(end))
"""


@pytest.fixture
def repository(tmp_path):
    """A repository with the real launcher, and the rest of SLURM and the trainer as above."""
    root = tmp_path / "the root"
    for folder in ("launch", "spectral_pod", "bin"):
        (root / folder).mkdir(parents=True)
    for name in ("slurm.sh", "exit_codes.sh", "usage.sh"):
        shutil.copy(ROOT / "launch" / name, root / "launch")
    (root / "launch/setup.sh").write_text(f"python={sys.executable}\n")
    (root / "spectral_pod/main.py").write_text(TRAINER)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
    return root


def submit(root, *arguments, **environment):
    """Runs the script as slurmd does; (its exit code, what it said, the calls of scontrol)."""
    copy = root.parent / "slurm_script"
    shutil.copy(root / "launch/slurm.sh", copy)
    inherited = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "PYTHONPATH")}
    slurm = {
        "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "17",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", copy, *arguments],
        env=inherited | slurm | environment, cwd=root.parent, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    calls = root / "scontrol_calls"
    return done.returncode, done.stderr, calls.read_text() if calls.exists() else ""


ENDS = [
    ("0,0", 0),
    ("2,2", 2),
    ("76,1", 1),      # one failed, its peer lost it
    ("3,76", 3),
    ("KILL,1", 1),
    ("130,130", 130),
    ("78,78", 78),
    ("127,127", 127),
]  # fmt: skip


@pytest.mark.parametrize(("ends", "code"), ENDS)
def test_it_ends_with_the_code_that_counts(repository, ends, code):
    assert submit(repository, f"--ends={ends}")[::2] == (code, "")


QUEUED = [
    ("75,75", "preempted"),
    ("76,0", "lost a peer"),
    ("77,77", "stalled"),
    ("KILL,76", "killed by signal 9"),
    ("134,76", "killed by signal 6"),
    ("TERM,TERM", "preempted"),  # the task's shell waits for the trainer to save
]


@pytest.mark.parametrize(("ends", "why"), QUEUED)
def test_it_goes_back_into_the_queue(repository, ends, why):
    code, said, calls = submit(repository, f"--ends={ends}")
    assert (code, calls) == (0, "requeue 17\n"), said
    assert re.search(rf"{why}.*; back into the queue", said)


def test_requeues_have_a_limit(repository):
    assert submit(repository, "--ends=76,76", SLURM_RESTART_COUNT="49")[2] == "requeue 17\n"
    (repository / "scontrol_calls").unlink()
    code, said, calls = submit(repository, "--ends=76,76", SLURM_RESTART_COUNT="50")
    assert (code, calls) == (76, "")
    assert "lost a peer; 50 restarts are enough" in said
    assert submit(repository, "--ends=77,77", SLURM_RESTART_COUNT="2", MAX_REQUEUES="2")[0] == 77


def test_arguments_and_environment_reach_every_task(repository):
    arguments = ["--ends=0,0", "--workdir=a b", "--config.x={'y': \"$HOME\"}", "*"]
    assert submit(repository, *arguments, SLURM_CPUS_PER_TASK="6")[0] == 0
    for task in range(TASKS):
        arrived, environment = json.loads((repository / f"task{task}").read_text())
        assert arrived == arguments
        assert environment["JAX_PLATFORMS"] == "cuda,cpu"
        assert environment["SRUN_CPUS_PER_TASK"] == "6"
    options = (repository / "srun_options").read_text().split()
    assert "--kill-on-bad-exit=0" in options  # peers that still save are not killed


def test_it_says_where_to_submit_from(repository):
    elsewhere = repository.parent
    code, said, _ = submit(repository, "--ends=0,0", SLURM_SUBMIT_DIR=str(elsewhere))
    assert (code, f"{elsewhere} is not the root" in said) == (2, True)


def test_outside_of_a_job_it_says_how_to_submit(repository):
    code, said, _ = submit(repository, "--ends=0,0", SLURM_JOB_ID="")
    assert (code, "sbatch launch/slurm.sh" in said) == (2, True)
    assert not (repository / "task0").exists()


def test_what_it_asks_of_slurm():
    script = (ROOT / "launch/slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script, re.MULTILINE))
    assert options["gpus-per-node"] == options["ntasks-per-node"]  # JAX: one process a GPU
    signal, seconds = options["signal"].split("@")
    assert signal == "TERM"  # to the tasks; B:TERM would be to the batch script alone
    assert int(seconds) >= 60
    assert options["open-mode"] == "append"
    assert "requeue" in options


def _controller():
    ping = ["scontrol", "ping"]
    return shutil.which("sbatch") and subprocess.run(ping, capture_output=True).returncode == 0


@pytest.mark.skipif(not _controller(), reason="no SLURM controller answers here")
def test_slurm_accepts_it():
    size = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"]
    command = ["sbatch", "--test-only", *size, "launch/slurm.sh", "--config=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr
