"""launch/supervise.sh: which exit codes restart, after what delays, and the effect of signals."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.multiprocess.cluster import seconds_until_gone

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*/*.sh")])


@pytest.fixture
def bin_folder(tmp_path):
    """A PATH whose `sleep` only notes its argument."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sleep").write_text(f"#!/bin/bash\necho $1 >>{tmp_path}/sleeps\n")
    (folder / "sleep").chmod(0o755)
    return folder


def supervise(*arguments, **options):
    command = [LAUNCH / "supervise.sh", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def ending_with(tmp_path, *codes):
    """A command that ends with these codes, one a start."""
    script = tmp_path / "command.sh"
    script.write_text(
        f"echo start >>{tmp_path}/starts\ncodes=({' '.join(map(str, codes))})\n"
        f"code=${{codes[$(wc -l <{tmp_path}/starts) - 1]}}\n"
        "if [ $code -gt 128 ] && [ $code -ne 130 ] && [ $code -lt 193 ]; then\n"
        "    kill -$((code - 128)) $$\nfi\nexit $code\n"
    )
    return "bash", script


def starts(tmp_path):
    return len((tmp_path / "starts").read_text().splitlines())


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 78, 126, 127, 130, 193, 255])
def test_codes_that_end_it(tmp_path, code):
    process = supervise(*ending_with(tmp_path, code, 0))
    assert process.communicate() == (None, "")
    assert (process.returncode, starts(tmp_path)) == (code, 1)


def test_codes_that_restart_with_growing_pauses(tmp_path, bin_folder):
    codes = [75, 76, 77, 134, 137, 139, 143, 129]
    process = supervise(
        "--", *ending_with(tmp_path, *codes, 3), env={"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    )
    lines = process.communicate()[1].splitlines()
    assert (process.returncode, starts(tmp_path)) == (3, len(codes) + 1)
    restarts = [
        re.fullmatch(r"supervise: (\S+) exit code (\d+) \((.*)\); starting again in (\d+) s", line)
        for line in lines
    ]
    assert [int(t[2]) for t in restarts] == codes
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", t[1]) for t in restarts)
    assert [t[3] for t in restarts[:4]] == [
        "preempted, state saved",
        "lost a peer",
        "stalled",
        "killed by signal 6",
    ]
    delays = [1, 2, 4, 8, 16, 32, 60, 60]
    assert [int(t[4]) for t in restarts] == delays
    assert [int(line) for line in (tmp_path / "sleeps").read_text().splitlines()] == delays


@pytest.mark.parametrize("limit", [0, 2])
def test_gives_up(tmp_path, bin_folder, limit):
    process = supervise(
        f"--max_quick_restarts={limit}",
        "--",
        *ending_with(tmp_path, *[76] * 9),
        env={"PATH": f"{bin_folder}:{os.environ['PATH']}"},
    )
    last_line = process.communicate()[1].splitlines()[-1]
    assert (process.returncode, starts(tmp_path)) == (76, limit + 1)
    assert last_line.endswith(f"giving up: it ended within a minute {limit + 1} times in a row")


def test_gives_up_when_longer_runs_keep_failing(tmp_path, bin_folder):
    process = supervise(
        "--max_restarts_per_hour=3",
        *ending_with(tmp_path, *[76] * 9),
        env={"PATH": f"{bin_folder}:{os.environ['PATH']}", "SUPERVISE_QUICK_SECONDS": "0"},
    )
    last_line = process.communicate()[1].splitlines()[-1]
    assert (process.returncode, starts(tmp_path)) == (76, 4)
    assert last_line.endswith("giving up: it ended 4 times within an hour")


def test_long_runs_restart_at_once_and_for_ever(tmp_path, bin_folder):
    process = supervise(
        "--max_quick_restarts=0",
        "--",
        *ending_with(tmp_path, *[75] * 15, 0),
        env={"PATH": f"{bin_folder}:{os.environ['PATH']}", "SUPERVISE_QUICK_SECONDS": "0"},
    )
    process.communicate()
    assert (process.returncode, starts(tmp_path)) == (0, 16)
    assert set((tmp_path / "sleeps").read_text().split()) == {"0"}


CHILD = """
import os, signal, sys, time
count = 0
def handle(number, frame):
    global count
    count += 1
    # `print` is not reentrant, and the signal may come before the one below has returned.
    os.write(1, f"{signal.Signals(number).name}\\n".encode())
    time.sleep(0.2)
    sys.exit(70 + count)
signal.signal(signal.SIGTERM, handle)
signal.signal(signal.SIGINT, handle)
print(os.getpid(), flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_passes_a_signal_once_and_waits(sent):
    process = supervise(sys.executable, "-c", CHILD, stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    process.send_signal(sent)
    out, err = process.communicate()
    assert out.split() == ["SIGINT" if sent == signal.SIGINT else "SIGTERM"]
    assert (process.returncode, err) == (71, "")
    assert not pathlib.Path(f"/proc/{child}").exists()


def test_stopped_children_are_waited_for():
    process = supervise(sys.executable, "-c", CHILD, stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    os.kill(child, signal.SIGSTOP)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert process.poll() is None
    os.kill(child, signal.SIGCONT)
    assert process.communicate()[0].split() == ["SIGTERM"]
    assert process.returncode == 71


def test_a_signal_ends_the_pause(bin_folder):
    (bin_folder / "sleep").write_text("#!/bin/bash\nexec /bin/sleep 60\n")
    process = supervise(
        *("bash", "-c", "echo started; kill -9 $$"),
        env={"PATH": f"{bin_folder}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
    )
    assert "137 (killed by signal 9); starting again in 1 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=2) == 137
    assert process.stdout.read() == "started\n"


def test_what_a_killed_command_left_is_ended(tmp_path):
    leave = "sleep 30 >/dev/null 2>&1 & echo $!; kill -9 $$"
    process = supervise("--max_quick_restarts=0", "--", "bash", "-c", leave, stdout=subprocess.PIPE)
    grandchild = int(process.communicate()[0])
    assert process.returncode == 137
    assert seconds_until_gone([grandchild], 5)[0] < 5  # a signal takes a moment to arrive


def test_no_moment_loses_a_signal():
    """Whenever TERM comes, the supervisor ends soon and leaves no child."""
    random.seed(0)
    for _ in range(40):
        process = supervise("--", "bash", "-c", "echo $$; exit 75", stdout=subprocess.PIPE)
        time.sleep(random.uniform(0.005, 0.03))
        process.send_signal(signal.SIGTERM)
        started, said = process.communicate(timeout=20)
        assert process.returncode in (75, 143, -15), said
        assert not any(pathlib.Path("/proc", pid).exists() for pid in started.split())


@pytest.mark.parametrize("arguments", [[], ["--max_quick_restarts=x", "true"], ["--unknown"]])
def test_usage(arguments):
    process = supervise(*arguments)
    assert process.communicate()[1].startswith("usage: launch/supervise.sh")
    assert process.returncode == 2


@pytest.mark.parametrize("script", SHELL, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_shellcheck(script):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    command = [shellcheck, "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
