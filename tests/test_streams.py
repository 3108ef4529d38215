"""A run outlasts the readers of its stdout and stderr."""

import os
import subprocess
import sys

import pytest

from tests import processes

# Prints more than a pipe holds on both streams, as a run does, and leaves a result.
PROGRAM = """
import contextlib, logging, os, sys
from absl import logging as absl_logging
logging.warning("adds a handler of the root logger, as libraries do")
from spectral_pod import streams
streams.outlast_readers()
absl_logging.use_absl_handler()
first = open(sys.argv[1], "w")
for i in range(3000):
    print(f"line {i}: \\u00e9", flush=True)
    if i % 100 == 0:
        absl_logging.warning("warning %d", i)
        logging.getLogger("library").warning("of a library %d", i)
print("the end", file=sys.stderr)
with contextlib.suppress(OSError):
    os.write(1, b"as C does, without a Python object")
first.write("result")
"""


def run(tmp_path, redirection, encoding="utf-8"):
    """Runs the program in a shell; its stderr is `err`."""
    file = tmp_path / "result"
    env = processes.environment() | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable,
         "-c", PROGRAM, file],
        env=env, cwd=tmp_path, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert file.read_text() == "result"  # and nothing that was printed
    return done


@pytest.mark.parametrize(
    ("redirection", "why"),
    [
        ("| head -1", "Broken pipe"),
        (">/dev/full", "No space left on device"),
        (">/dev/full 2>&1", None),
        ("2>&1 | head -1", None),
        ("2>/dev/full", None),
        (">&-", None),
        (">&- 2>&- <&-", None),
    ],
)
def test_a_program_outlasts_its_readers(tmp_path, redirection, why):
    done = run(tmp_path, redirection)
    errors = done.stderr.decode()
    assert "Traceback" not in errors
    assert "Logging error" not in errors
    if redirection.startswith("2>/dev/full"):
        told = "stderr cannot be written (No space left on device): its lines are dropped"
        assert done.stdout.decode().count(told) == 1
        assert done.stdout.decode().count("line ") == 3000
    elif "2>" not in redirection:
        told = f"stdout cannot be written ({why}): its lines are dropped, and the run goes on"
        assert errors.count(told) == (why is not None)
        assert errors.count("of a library ") == 30
        assert errors.endswith("the end\n")


def test_characters_that_an_encoding_lacks_are_escaped(tmp_path):
    assert b"line 2999: \\xe9" in run(tmp_path, "", encoding="ascii").stdout


def test_a_full_pipe_that_does_not_block_is_waited_for(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path / "result"], env=processes.environment(),
        stdout=writer, stderr=subprocess.DEVNULL,
    ) as child:  # fmt: skip
        os.close(writer)
        with open(reader) as file:
            lines = file.read().splitlines()
    assert child.returncode == 0
    assert len([line for line in lines if line.startswith("line ")]) == 3000
