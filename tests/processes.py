"""Python processes for tests, forked from a server that has imported JAX and the trainer.

Importing takes 1.5 s of a core, and a test session starts a few hundred processes. The server has
started no JAX backend and no thread of Python's, and each process is forked from it with its own
arguments, environment, folder and standard streams; it then runs its command as the interpreter
does. It is a child of the process that asked for it, so its pid, exit code and signals are those of
a process started by exec.
"""

import ctypes
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
# Read when Python starts or JAX is imported: a process forked later cannot have other values.
_AT_IMPORT = re.compile("JAX_|PYTHON|LD_")


class Popen(subprocess.Popen):
    """`subprocess.Popen` of `[sys.executable, ...]`, or of that behind `env NAME=VALUE`.

    Takes `env`, `cwd`, `stdin`, `stdout`, `stderr` and what decodes them, and `start_new_session`.
    Variables that are read at import must have the values that `environment()` gives them.
    """

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
        creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
        restore_signals, gid, gids, uid, umask, start_new_session, process_group,
    ):  # fmt: skip
        command, env = _without_env(list(map(str, args)), dict(os.environ if env is None else env))
        python, *arguments = command
        assert python == sys.executable, f"no Python process: {command}"
        server = _server()
        for name in set(env) | set(server.env):
            if _AT_IMPORT.match(name) and env.get(name) != server.env.get(name):
                raise ValueError(f"{name}={env.get(name)} is read at import; start a real process")
        streams = [
            own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))
        ]
        request = {
            "arguments": arguments, "env": env, "cwd": str(cwd or os.getcwd()),
            "session": start_new_session,
        }  # fmt: skip
        self.pid = server.fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(command, *, timeout, capture_output=False, **options):
    """`subprocess.run` of such a process."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def xla_flags(num_devices=1):
    """XLA's flags in tests, which compile much and run little.

    Compiling takes a third of the time with less optimization and the code of a program in one
    piece. It changes only machine code, not how programs are split over devices.
    """
    emitters = " --xla_cpu_use_fusion_emitters=false"  # JAX 0.11 has no other, and no such flag
    return (
        "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
        f" --xla_force_host_platform_device_count={num_devices}"
        + (emitters if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
    )


def environment():
    """The environment of a test's processes; `tensorflow` is a module that cannot be imported."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    path = os.pathsep.join([str(ROOT / "tests/without_tensorflow"), str(ROOT)])
    return inherited | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def _without_env(command, env):
    """Takes `env -u NAME ... NAME=VALUE ...` from a command into the environment."""
    if command[0] == "env":
        command = command[1:]
        while command[0] == "-u":
            env.pop(command[1], None)
            command = command[2:]
        while match := _ASSIGNMENT.fullmatch(command[0]):
            env[match[1]] = match[2]
            command = command[1:]
    return command, env


class _Server:
    """The server's process and the socket on which it is asked."""

    def __init__(self):
        self.env = environment()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = f"from tests import processes; processes._serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], env=self.env, cwd=ROOT, pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def fork(self, request, streams):
        """The pid of a new child of this process that carries the request out."""
        # Its parent, which the server forks in between, has then ended: the kernel makes this
        # process its parent, and only now, so that no other orphan of a test comes here.
        libc = ctypes.CDLL(None)
        libc.prctl(_SUBREAPER, 1)
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], streams)
            answer = self._socket.recv(64)
            assert answer, "the server of processes has ended"
            pid = int(answer)
            deadline = time.monotonic() + 30
            while _parent_of(pid) != os.getpid():
                assert time.monotonic() < deadline, f"process {pid} is no child of this one"
                time.sleep(0.001)
        finally:
            libc.prctl(_SUBREAPER, 0)
        return pid


@functools.cache
def _server():
    """This process's server, which ends with it."""
    return _Server()


def _parent_of(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def _serve(fileno):
    """Forks a process per request until the client has ended; never returns in the server.

    In a forked process the command runs from here, so that what it raises ends the interpreter as
    it would by itself.
    """
    given = dict(os.environ)
    _import()
    defaults = {name: value for name, value in os.environ.items() if name not in given}
    gc.collect()
    gc.freeze()
    listening = socket.socket(fileno=fileno)
    while True:
        message, streams, _, _ = socket.recv_fds(listening, 1 << 20, 3)
        if not message:
            os._exit(0)
        if between := os.fork():
            for stream in streams:
                os.close(stream)
            os.waitpid(between, 0)
            continue
        between = os.getpid()
        if pid := os.fork():
            listening.send(str(pid).encode())
            os._exit(0)
        while os.getppid() == between:  # until the kernel has made this a child of the tests
            time.sleep(0.001)
        break
    listening.close()
    request = json.loads(message)
    for own, stream in enumerate(streams):
        os.dup2(stream, own)
        os.close(stream)
    if request["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(defaults | request["env"])
    os.chdir(request["cwd"])
    _run(request["arguments"])


def _import():
    """What the trainer imports before it parses its flags, and what most tools and tests do."""
    import pytest  # noqa: F401

    import spectral_pod.api
    import spectral_pod.command_line
    import spectral_pod.train.loop  # noqa: F401


def _run(arguments):
    """What `python ARGUMENTS` does after its start."""
    kind, *rest = arguments
    main = sys.modules["__main__"]
    if kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy._run_module_as_main(rest[0])
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0], sys.argv = os.path.dirname(kind), arguments
        main.__file__ = kind
        exec(compile(pathlib.Path(kind).read_text(), kind, "exec"), main.__dict__)
