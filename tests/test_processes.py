"""A forked process behaves like a started one, to its parent and to itself."""

import os
import signal
import subprocess
import sys

import pytest

from tests import processes

PROGRAMS = {
    "its surroundings": "import os, sys; print(sys.argv, sys.path, os.getcwd(), os.environ['A']);"
    " print(__name__, os.getppid(), os.getpgid(0), sys.stdout.line_buffering, __spec__)",
    "an exit code": "import sys; print('out'); sys.exit(76)",
    "a last word": "import sys; sys.exit('Error: no')",
    "a bug": "raise ValueError('no')",
    "an interruption": "raise KeyboardInterrupt",
    "an abort": "import os; os.abort()",
    "what is left to do at the end": "import atexit; atexit.register(print, 'bye')",
    "threads": "import threading; threading.Timer(0.1, print, ['later']).start()",
}


def ended(run, command):
    """Runs a program; returns its exit code, its output and the last line on stderr."""
    done = run(
        ["env", "A=1=2", *command], env=processes.environment(), cwd="/", capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_ends_as_a_started_one(program):
    command = [sys.executable, "-c", program, "argument"]
    assert ended(processes.run, command) == ended(subprocess.run, command)


@pytest.mark.parametrize("name", ["module", "file"])
def test_modules_and_files(tmp_path, name):
    file = tmp_path / "program.py"
    file.write_text("import sys; print(__name__, __file__, sys.argv, sys.path[0]); sys.exit(3)")
    what = ["-m", "tests.multiprocess.batches"] if name == "module" else [str(file)]
    command = [sys.executable, *what, "--option"]
    assert ended(processes.run, command) == ended(subprocess.run, command)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_reach_it(number):
    command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    with processes.Popen(
        command, env=processes.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"up\n"
        os.kill(process.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        os.kill(process.pid, signal.SIGCONT)
        assert process.poll() is None
        os.kill(process.pid, number)
        assert process.wait(10) == -number


def test_what_importing_has_read_cannot_be_changed():
    with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
        processes.Popen([sys.executable], env=processes.environment() | {"JAX_ENABLE_X64": "1"})
