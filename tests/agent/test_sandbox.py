"""Attacks on the sandbox, each in both modes: what is stopped, and what "rlimits" does not stop.

The tests of "bubblewrap" need the program `bwrap`.
"""

import os
import pathlib
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from spectral_pod.agent import confined, sandbox
from spectral_pod.agent.sandbox import Limits, Sandbox
from tests import trainer

NEEDS_BUBBLEWRAP = pytest.mark.skipif(
    shutil.which("bwrap") is None,
    reason="bubblewrap is not installed; its isolation is not tested without it",
)
MODES = ["rlimits", pytest.param("bubblewrap", marks=NEEDS_BUBBLEWRAP)]
LIMITS = Limits(seconds=1.5, memory_mb=128, output_bytes=2000, file_mb=4)
REFUSED = "Operation not permitted"
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86-64")


@pytest.fixture(scope="module", params=MODES)
def box(request):
    return Sandbox(request.param, LIMITS)


def result(box, code):
    text = box.python(textwrap.dedent(code)).decode()
    assert box.python("print('still here')") == b"still here\n"
    return text


def test_what_code_prints(box):
    assert result(box, "print('é', 1 + 1)\nimport sys; print(3, file=sys.stderr)") == "é 2\n3\n"
    assert result(box, "x = 1") == ""
    assert result(box, "import math, json, re, datetime, decimal, random, asyncio") == ""
    assert result(box, "print(input())").startswith("error: line 1: EOFError")
    assert result(box, "import sys; sys.exit()") == ""
    assert result(box, "import sys; sys.exit('tired')") == "error: exit code tired\n"
    assert result(box, "if __name__ == '__main__': print(__name__)") == "__main__\n"
    threads = (
        "from threading import Thread\nt = Thread(target=print, args=[7])\nt.start(); t.join()"
    )
    assert result(box, threads) == "7\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print(1)\n\n1 / 0", "1\nerror: line 3: ZeroDivisionError: division by zero\n"),
        ("def f():\n  g()\nf()", "error: line 2: NameError: name 'g' is not defined\n"),
        ("x = (", "error: line 1: SyntaxError: '(' was never closed\n"),
        ("import json\njson.loads('x')", "error: line 2: json.decoder.JSONDecodeError: Expecting"),
        ("f = lambda: f()\nf()", "error: line 1: RecursionError"),
        ("\0", "error: "),
        ("import os; os.abort()", "error: it crashed: SIGABRT"),
        ("import os; os.kill(os.getpid(), 11)", "error: it crashed: SIGSEGV"),
        ("print(1, end=''); import ctypes; ctypes.string_at(0)", "1\nerror: it crashed: SIGSEGV"),
        ("import os; os._exit(3)", "error: exit code 3"),
        ("import os; os._exit(125)", "error: the sandbox did not start"),
        ("import sys; sys.stdout = None; 1 / 0", ""),
    ],
)
def test_what_ends_code_is_said(box, code, error):
    assert result(box, code).startswith(error)


# ---- the network


@pytest.fixture
def server():
    """The port of a server that accepts connections; at the end there must have been none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_network(box, server):
    connect = f"import socket; socket.create_connection(('127.0.0.1', {server}))"
    assert REFUSED in result(box, connect)
    for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET"):
        code = f"import socket; socket.socket(socket.{family}, socket.SOCK_RAW)"
        assert REFUSED in result(box, code), family
    fetch = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{server}')"
    assert REFUSED in result(box, fetch)
    raw = "import ctypes, errno; c = ctypes.CDLL(None, use_errno=True); c.syscall({}, 2, 1, 0)\n"
    raw += "print(errno.errorcode[ctypes.get_errno()])"
    for call in ("socket", "io_uring_setup"):
        number = confined._DENIED[call][platform.machine() == "aarch64"]
        assert result(box, raw.format(number)) == "EPERM\n"


@pytest.mark.parametrize(
    ("call", "argument"), [("clone3", 0), ("clone", 0), ("clone", 0x10000000), ("prctl", 1)]
)
def test_calls_of_the_kernel_itself(box, call, argument):
    """Without Python and the C library in between."""
    number = confined._CHECKED[call][platform.machine() == "aarch64"]
    code = f"""
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.syscall({number}, {argument}, 0, 0, 0, 0), errno.errorcode[ctypes.get_errno()])
    """
    assert result(box, code) == ("-1 ENOSYS\n" if call == "clone3" else "-1 EPERM\n")


@X86
@pytest.mark.parametrize(
    ("machine_code", "end"),
    [
        ("b814000000cd80c3", "error: it crashed: SIGSYS"),  # getpid of 32 bits, by int 0x80
        ("b827000040" + "0f05c3", "-38\n"),  # getpid of x32: ENOSYS
        ("b827000000" + "0f05c3", "PID\n"),  # getpid as it should be
    ],
)
def test_calls_of_another_architecture(box, machine_code, end):
    code = f"""
        import ctypes, mmap, os
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(bytes.fromhex("{machine_code}"))
        f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
        print(str(f()).replace(str(os.getpid()), "PID"))
    """
    assert result(box, code) == end


# ---- files


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret"
    file.write_text("a secret")
    return file


def test_files_outside(box, secret):
    """Hidden by bubblewrap. Not by "rlimits", which says so."""
    read, write = f"print(open({str(secret)!r}).read())", f"open({str(secret)!r}, 'w').write('x')"
    link = f"import os; os.symlink({str(secret)!r}, 'link'); print(open('link').read())"
    if box.mode == "rlimits":
        assert result(box, read) == result(box, link) == "a secret\n"
        assert "every file that your account may read or write" in sandbox.UNPROTECTED
        return
    for code in (read, write, link, f"import os; os.listdir({str(secret.parent)!r})"):
        assert "No such file" in result(box, code)
    assert secret.read_text() == "a secret"
    for place in ("/etc/passwd", "/proc/self/environ", "/sys", "/dev/shm"):
        assert "No such file" in result(box, f"import os; print(os.stat({place!r}))")
    python = pathlib.Path(sys.base_prefix)
    for home in ("/home", os.path.expanduser("~")):
        seen = result(box, f"import os; print(*os.listdir({home!r}))")
        if python.is_relative_to(home):  # of it, the way to Python is all that is seen
            assert seen.split() == [python.relative_to(home).parts[0]]
        else:
            assert "No such file" in seen
    for place in ("/x", "/usr/x", "/usr/lib/x", "/dev/x", "/etc/x", sys.base_prefix + "/x"):
        assert "Read-only file system" in result(box, f"open({place!r}, 'w')")
    assert "error" in result(box, "import os; os.chdir('..'); os.mkdir('x')")


def test_a_folder_of_its_own_that_is_gone_afterwards(box, tmp_path):
    names = "import os, tempfile; print(os.listdir(), tempfile.gettempdir() == os.getcwd())\n"
    leave = names + "open('kept', 'w').write('x'); os.mkdir('d'); os.chmod('d', 0)"
    assert result(box, leave) == result(box, names) == "[] True\n"
    folder = result(box, "import os; print(os.getcwd())").strip()
    assert box.mode == "bubblewrap" or not os.path.exists(folder)
    # What a link in it points to stays.
    (tmp_path / "kept").write_text("x")
    result(box, f"import os; os.symlink({str(tmp_path)!r}, 'out')")
    assert (tmp_path / "kept").exists()


def test_files_are_limited(box):
    assert "File too large" in result(box, "open('f', 'wb').write(bytes(5 << 20))")
    many = "for i in range(9):\n  open(str(i), 'wb').write(bytes(1 << 20))"
    if box.mode == "rlimits":  # a limit on each file only
        assert result(box, many) == ""
        assert "the number of files" in sandbox.UNPROTECTED
    else:
        assert "No space left" in result(box, many)
    opened = "fs = [open('f', 'w') for i in range(100)]"
    assert "Too many open files" in result(box, opened)


def test_the_environment_and_open_files_are_not_inherited(box, secret, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "a secret")
    assert result(box, "import os; print(list(os.environ))") == "['TMPDIR']\n"
    with open(secret) as file:
        os.set_inheritable(file.fileno(), True)
        code = """
            import os
            def is_open(n):
                try: return bool(os.fstat(n))
                except OSError: return False
            print([n for n in range(64) if is_open(n)])
            print(os.read(0, 9))
        """
        assert result(box, code) == "[0, 1, 2]\nb''\n"


def test_proc(box):
    """Absent in bubblewrap. "rlimits" shows the account's processes, and says so."""
    code = f"print(len(open('/proc/{os.getpid()}/cmdline', 'rb').read()) > 0)"
    if box.mode == "bubblewrap":
        assert "No such file" in result(box, code)
        assert "No such file" in result(box, "open('/proc/self/mem')")
        assert result(box, "import os; print(os.getppid() < 3, os.getpid() < 9)") == "True True\n"
    else:
        assert result(box, code) == "True\n"
        assert result(box, "print(open('/proc/self/environ', 'rb').read())") == "b''\n"
        assert "environment and memory in /proc" in sandbox.UNPROTECTED


# ---- processes and signals


@pytest.mark.parametrize(
    "code",
    [
        "import os\nfor i in range(6): os.fork()",  # bounded, should it not be stopped
        "import os\nif os.fork() == 0:\n  os.setsid()\n  import time; time.sleep(60)",
        "import os; os.forkpty()",
        "import subprocess; subprocess.run(['/bin/sh', '-c', 'sleep 60 &'])",
        "import subprocess; subprocess.run(['/usr/bin/true'], close_fds=False)",
        "import os; os.posix_spawn('/usr/bin/env', ['env'], {})",
        "import os; os.execv('/usr/bin/env', ['env'])",
        "import os; assert os.system('true') == 0, os.strerror(1)",
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
        "import multiprocessing as m; m.get_context('spawn').Process(target=print).start()",
        "import pty; pty.spawn('/bin/sh')",
        "import ctypes, os; n = ctypes.CDLL(None).fork(); assert n != -1, os.strerror(1)",
        "import ctypes, os; n = ctypes.CDLL(None).vfork(); assert n != -1, os.strerror(1)",
        "import ctypes, os; n = ctypes.CDLL(None).unshare(1 << 28); assert n == 0, os.strerror(1)",
    ],
)
def test_no_other_process(box, code):
    # In bubblewrap there are no terminals, which some ask for first.
    assert re.search(f"{REFUSED}|out of pty devices|No such file", result(box, code))


def test_reaching_programs_through_subclasses(box):
    """There is no Python in which `os` is forbidden, and so nothing to break out of."""
    code = """
        classes = ().__class__.__base__.__subclasses__()
        wrap = next(c for c in classes if c.__name__ == "_wrap_close")
        wrap.__init__.__globals__["posix_spawn"]("/usr/bin/env", ["env"], {})
    """
    assert REFUSED in result(box, code)


# Signal 0 would reach a process without harm, should it not be stopped.
@pytest.mark.parametrize(
    "code",
    [
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.kill(-1, 0)",
        "import os; os.kill(0, 0)",
        "import os; os.killpg(os.getpgrp(), 0)",
        "import os; os.pidfd_open(os.getppid())",
        "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
        "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import os; os.sched_setaffinity(os.getppid(), [0])",
    ],
)
def test_no_signal_to_others(box, code):
    parent = psutil.Process()
    before = parent.nice(), parent.cpu_affinity(), parent.rlimit(psutil.RLIMIT_CORE)
    assert REFUSED in result(box, code)
    assert before == (parent.nice(), parent.cpu_affinity(), parent.rlimit(psutil.RLIMIT_CORE))


def test_signals_by_the_c_library(box):
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        code = f"""
            import ctypes, os
            libc = ctypes.CDLL(None)
            print(libc.kill({os.getpid()}, 10), libc.kill(os.getppid(), 10))
            for call in {confined._CHECKED["tgkill"]}, {confined._DENIED["tkill"]}:
                number = call[os.uname().machine == "aarch64"]
                print(libc.syscall(number, {os.getpid()}, {os.getpid()}, 10))
        """
        assert result(box, code) == "-1 -1\n-1\n-1\n"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == []


def test_rights_are_given_up_for_good(box):
    code = """
        import ctypes, os, resource
        for name in "AS", "CPU", "NOFILE", "FSIZE":
            kind = getattr(resource, f"RLIMIT_{name}")
            for limits in [(-1, -1), (1 << 50, 1 << 50), resource.getrlimit(kind)]:
                try: print(resource.setrlimit(kind, limits))
                except (ValueError, PermissionError): pass
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, 0), libc.chroot(b"/"))
        print(libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0))  # no_new_privs, seccomp
        held = (ctypes.c_uint32 * 6)()
        libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), held)
        print(sum(held))
    """
    assert result(box, code) == "-1 -1\n1 2\n0\n"


# ---- memory, time and output


@pytest.mark.parametrize(
    "code",
    [
        "x = bytes(1 << 30)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "x = 'a' * 10**12",
        "import mmap; m = mmap.mmap(-1, 1 << 30)",
        "import ctypes; x = ctypes.create_string_buffer(1 << 30)",
        "import threading as t, time\nwhile True: t.Thread(target=time.sleep, args=[60]).start()",
    ],
)
def test_memory_is_limited(box, code):
    before = psutil.Process().memory_info().rss
    text = result(box, code)
    assert any(
        word in text for word in ("MemoryError", "Cannot allocate memory", "start new thread")
    )
    assert psutil.Process().memory_info().rss < before + (64 << 20)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\nwhile True: time.sleep(1)",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\n"
        "while True: pass",
        "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
        "9 ** 9 ** 9",
        "import os; os.close(1); os.close(2)\nwhile True: pass",
        "import threading, time; threading.Thread(target=time.sleep, args=[60]).run()",
        "import os; os.kill(os.getpid(), 19)\nwhile True: pass",  # SIGSTOP
    ],
)
def test_time_is_limited(box, code):
    assert result(box, code) == "error: it was stopped after 1.5 s"


def test_cpu_time_is_limited():
    """Also that of several threads, which in Python need a function in C."""
    box = Sandbox("rlimits", Limits(seconds=1))
    limits = box._command()[-1]
    assert '"CPU": 1' in limits
    process = subprocess.run(
        [*box._command()], input=b"while True: pass", capture_output=True, env={}, timeout=60
    )
    assert process.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_a_thread_that_is_left_behind_ends_with_the_code(box):
    code = (
        "import threading, time; threading.Thread(target=time.sleep, args=[60]).start(); print(1)"
    )
    assert result(box, code) == "1\n"


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 1000)",
        "import os\nwhile True: os.write(2, bytes(1 << 16))",
        "print('x' * 10**7)",
    ],
)
def test_output_is_limited(box, code):
    text = result(box, code)
    assert text.endswith("\nerror: it was stopped after 2000 bytes of output")
    assert len(text) < 2060


def test_nothing_outlives_the_agent(box):
    """The agent is killed while code sleeps: the code's process dies as well."""
    program = f"""
        from spectral_pod.agent.sandbox import Limits, Sandbox
        box = Sandbox({box.mode!r}, Limits(seconds=100))
        print("ready", flush=True)
        box.run(b"import time; time.sleep(100)")
    """
    agent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        cwd=trainer.ROOT,
    )
    assert agent.stdout.readline() == b"ready\n"
    children = []
    while not any("time.sleep" not in c.name() and c.status() == "sleeping" for c in children):
        time.sleep(0.1)
        children = psutil.Process(agent.pid).children(recursive=True)
    agent.kill()
    agent.wait()
    agent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_no_process_is_left(box):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    for code in ("while True: pass", "import os; os.fork()", "while True: print('x' * 1000)"):
        box.run(code.encode())
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


# ---- each layer by itself


@NEEDS_BUBBLEWRAP
def test_bubblewrap_without_the_filter_of_system_calls(server, secret):
    """The namespaces alone: no network, no files, no other processes, and all die together."""
    box = Sandbox("bubblewrap", LIMITS)
    start = box._command()
    command = [*start[: start.index("--") + 1], sandbox._interpreter(), "-I", "-S", "-c"]
    code = f"""
        import os, socket
        for test in (
            lambda: socket.create_connection(("127.0.0.1", {server}), timeout=5),
            lambda: open({str(secret)!r}),
            lambda: os.kill({os.getpid()}, 0),
            lambda: os.setuid(0),
            lambda: os.stat("/proc"),
        ):
            try: print("reached", test())
            except OSError as error: print(type(error).__name__)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                import time; time.sleep(300)
            os._exit(0)
    """
    done = subprocess.run(
        [*command, textwrap.dedent(code)], capture_output=True, text=True, env={}, timeout=60
    )  # which waits for the end of all that holds its output
    assert done.stdout.splitlines() == [
        "ConnectionRefusedError", "FileNotFoundError", "ProcessLookupError", "OSError",
        "FileNotFoundError",
    ], done.stderr  # fmt: skip
