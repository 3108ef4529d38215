"""Runs Python code that a model has written, in a process of its own that is confined.

The process starts with an empty environment, in an empty folder that is deleted afterwards, and
gives up its rights before the code runs (`confined.py`): its memory, time, output and files are
limited, and the kernel refuses it other processes, programs, sockets and signals. The modes differ
in what else it sees:

- "bubblewrap": nothing. It has namespaces of its own, in which there is no network, no other
  process, no /proc, and of files only the system's libraries and Python, which cannot be written,
  and its folder, in memory. The program bubblewrap (`bwrap`) must be installed.
- "rlimits": whatever your account may read or write. `UNPROTECTED` says what that means.

What neither protects from is a fault of the kernel; docs/agents.md has the whole list.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Literal, NamedTuple

from spectral_pod import fields
from spectral_pod.agent import confined
from spectral_pod.errors import UserError
from spectral_pod.fields import Positive, PositiveTime

MODES = ("bubblewrap", "rlimits")
UNPROTECTED = (
    "not protected in the sandbox 'rlimits': every file that your account may read or write, your "
    "other processes' environment and memory in /proc, the number of files written below /tmp and "
    "elsewhere. Use it only for code that you would run yourself; 'bubblewrap' hides all of these"
)
_PROGRAM = pathlib.Path(confined.__file__)
_LIBRARIES = ("/usr", "/lib", "/lib64")
_FILES = ("/etc/ld.so.cache",)  # where libraries are
_DEVICES = ("/dev/null", "/dev/urandom")


class SandboxError(UserError):
    """Code cannot be confined on this machine as it was asked for."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on a run of code.

    Attributes:
      seconds: of the clock, and of CPU time, rounded up.
      memory_mb: of addresses, MiB.
      output_bytes: of stdout and stderr together.
      file_mb: the size of a file, MiB; with bubblewrap that of all files together.

    Raises:
      ConfigError: a value is out of its range.
    """

    seconds: PositiveTime = 5.0
    memory_mb: Positive = 512
    output_bytes: Positive = 100_000
    file_mb: Positive = 16

    def __post_init__(self) -> None:
        fields.check_all(self)


class Outcome(NamedTuple):
    """What a run of code gave.

    Attributes:
      output: what it printed, up to the limit. Where an exception ended it, the last line is that.
      error: why it was ended or how it died; "" where it ended by itself.
    """

    output: bytes
    error: str


class Sandbox:
    """Runs code in one of the modes; each run is a new process that knows nothing of the others."""

    def __init__(
        self, mode: Literal["bubblewrap", "rlimits"] = "bubblewrap", limits: Limits | None = None
    ):
        """Tries that code is confined.

        Raises:
          SandboxError: it is not; says why and what to do.
          ConfigError: there is no such mode.
        """
        fields.one_of("sandbox", mode, MODES)
        self.mode, self.limits = mode, limits or Limits()
        self._bwrap = _bubblewrap() if mode == "bubblewrap" else ""
        status, output, stopped = self._run(b"print('ready')")
        if stopped:
            raise SandboxError(
                f"the sandbox {mode!r} has no time to start: {stopped}; give it more"
            )
        if status != 0 or output != b"ready\n":
            advice = "" if mode == "rlimits" else f"; {_INSTEAD}"
            said = " ".join(output.decode(errors="replace").split()) or f"exit code {status}"
            raise SandboxError(f"the sandbox {mode!r} does not work here: {said}{advice}")

    def python(self, code: str) -> bytes:
        """Runs Python code; the result is what it prints."""
        output, error = self.run(code.encode(errors="replace"))
        if not error:
            return output
        line_break = b"\n" if output and not output.endswith(b"\n") else b""
        return output + line_break + f"error: {error}".encode()

    def run(self, code: bytes) -> Outcome:
        """Runs code; its process has ended, or is killed, when this returns."""
        status, output, stopped = self._run(code)
        if not stopped and status == confined.NOT_CONFINED:
            stopped = "the sandbox did not start"
        if not stopped and (number := _signal(status)):
            stopped = self._death(number)
        if not stopped and status not in (0, 1):  # 1 is an exception, which is in the output
            stopped = f"exit code {status}"
        return Outcome(output[: self.limits.output_bytes], stopped)

    def _death(self, number: int) -> str:
        """What a signal that ended a process means."""
        if number == signal.SIGXCPU:
            return f"it took more than {math.ceil(self.limits.seconds)} s of CPU time"
        if number == signal.SIGKILL:
            return "it was killed: too much CPU time, or memory of the machine"
        return f"it crashed: {_name(number)}"

    def _run(self, code: bytes) -> tuple[int, bytes, str]:
        """(exit code, output, why it was stopped or "")."""
        with self._folder() as folder, tempfile.TemporaryFile() as given:
            given.write(code)
            given.seek(0)
            process = subprocess.Popen(
                self._command(),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={},
                close_fds=True,
                start_new_session=True,
            )
            assert process.stdout is not None
            output = bytearray()
            try:
                stopped = self._collect(process, process.stdout, output)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdout.close()
        return process.returncode, bytes(output), stopped

    def _collect(
        self, process: subprocess.Popen[bytes], stdout: IO[bytes], output: bytearray
    ) -> str:
        """Adds what a process prints to `output` until it ends or must; returns why it must."""
        limits = self.limits
        deadline = time.monotonic() + limits.seconds
        late = f"it was stopped after {limits.seconds:g} s"
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return late
                piece = os.read(stdout.fileno(), 1 << 16)
                if not piece:  # it has ended, or closed its output
                    break
                output += piece
                if len(output) > limits.output_bytes:
                    return f"it was stopped after {limits.output_bytes} bytes of output"
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return late
        return ""

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """The folder that a run starts in; bubblewrap replaces it by one in memory."""
        if self._bwrap:
            yield "/"
            return
        with tempfile.TemporaryDirectory(prefix="agent-", ignore_cleanup_errors=True) as folder:
            yield folder

    def _command(self) -> list[str]:
        mega, seconds = 1 << 20, math.ceil(self.limits.seconds)
        limits = {
            "AS": self.limits.memory_mb * mega,
            "CPU": seconds,
            "FSIZE": self.limits.file_mb * mega,
            "NOFILE": 64,
            "CORE": 0,
        }
        flags = ["-I", "-S", "-B", "-u", "-X", "utf8"]
        source = _PROGRAM.read_text(encoding="utf-8")
        python = [_interpreter(), *flags, "-c", source, json.dumps(limits)]
        if not self._bwrap:
            return python
        return [self._bwrap, *_namespaces(self.limits.file_mb * mega), "--", *python]


_INSTEAD = (
    "install bubblewrap 0.8 or newer (`apt install bubblewrap`) and allow user namespaces, or "
    "choose the sandbox 'rlimits', which does not hide your files"
)


def _bubblewrap() -> str:
    path = shutil.which("bwrap")
    if path is None:
        raise SandboxError(f"bubblewrap, which confines code, is not installed; {_INSTEAD}")
    return path


def _interpreter() -> str:
    """The Python of this environment without what is installed in it: a virtual one is a link."""
    return os.path.realpath(sys.executable)


def _namespaces(folder_bytes: int) -> list[str]:
    """Flags of bubblewrap: what the process sees, which is nothing else."""
    flags = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    flags += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    flags += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--clearenv"]
    for path in _LIBRARIES:
        if os.path.islink(path):
            flags += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            flags += ["--ro-bind", path, path]
    prefix = os.path.realpath(sys.base_prefix)
    if not prefix.startswith(_LIBRARIES):
        flags += ["--ro-bind", prefix, prefix]
    for path in _FILES:
        flags += ["--ro-bind-try", path, path]
    for path in _DEVICES:
        flags += ["--dev-bind", path, path]
    flags += ["--size", str(folder_bytes), "--tmpfs", "/tmp", "--remount-ro", "/"]
    return [*flags, "--chdir", "/tmp"]


def _signal(status: int) -> int:
    """The signal that a process died of, by its exit code or by what bubblewrap makes of it."""
    return -status if status < 0 else status - 128 if 128 < status < 192 else 0


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
