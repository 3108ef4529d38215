"""Processes that join: errors name those that are missing or differ, and values are shared."""

import subprocess
import sys

import pytest

from tests import processes, trainer
from tests.multiprocess.cluster import free_port

PROGRAM = """
import json, sys, time
from spectral_pod.errors import UserError
from spectral_pod.parallel import runtime

index, address, task = int(sys.argv[1]), sys.argv[2], sys.argv[3]
runtime.initialize(address, 3, index)
try:
    runtime.barrier("all are here", 30)
    if task == "missing" and index == 1:
        time.sleep(4)
    elif task == "missing":
        runtime.barrier("lunch", 1)
    elif task == "differ":
        runtime.compare("names", {"seed": "0", "code": "b" if index == 1 else "a"}, 30)
    else:
        runtime.compare("names", {"seed": "0"}, 30)
        runtime.share("speed", f"{index}0")
        runtime.barrier("shared", 30)
        print(json.dumps(runtime.shared("speed")))
        sys.exit()
except UserError as error:
    runtime.end(error.exit_code, f"{type(error).__name__}: {error}")
time.sleep(20)
"""


@pytest.fixture
def ended():
    """The exit code, stdout and stderr of three processes that do a task."""

    def run(task):
        address = f"127.0.0.1:{free_port()}"
        started = [
            processes.Popen(
                [sys.executable, "-c", PROGRAM, str(i), address, task],
                cwd=trainer.ROOT, env=trainer.environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for i in range(3)
        ]  # fmt: skip
        try:
            outputs = [process.communicate(timeout=60) for process in started]
        finally:
            for process in started:
                process.kill()
        return [(p.returncode, *texts) for p, texts in zip(started, outputs)]

    return run


def test_who_does_not_come_is_named(ended):
    codes, _, errors = zip(*ended("missing"))
    for i in (0, 2):
        assert codes[i] == 76
        assert "process 1 (host " in errors[i]
        assert "did not arrive at 'lunch' within 1 s" in errors[i]


def test_who_differs_is_named_to_all(ended):
    codes, _, errors = zip(*ended("differ"))
    assert codes == (2, 2, 2)
    for error in errors:
        assert "process 1 (host " in error
        assert "code is b, not a" in error
        assert "seed" not in error


def test_what_is_shared_is_there_and_they_part_in_peace(ended):
    codes, printed, errors = zip(*ended("share"))
    assert codes == (0, 0, 0), errors
    assert set(printed) == {'{"0": "00", "1": "10", "2": "20"}\n'}
