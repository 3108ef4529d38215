"""The program in which `sandbox.py` runs code that is not trusted: first it gives up its rights.

It runs by itself, with nothing but the standard library: `python -I -S -c SOURCE LIMITS`, with the
code on its standard input. Before the code runs, for good:

- limits on memory, CPU time, the size of a file, open files (`setrlimit`);
- no capabilities, also where it is root, and none to be gained (`no_new_privs`);
- it dies with the thread that started it (`PR_SET_PDEATHSIG`);
- system calls fail that make a process, run a program, open a socket, signal or look into another
  process, change limits, namespaces or mounts, or leave memory behind (seccomp). Threads work.

None of this is in Python's power to undo: it is the kernel that refuses.
"""

import contextlib
import ctypes
import errno
import io
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback

NOT_CONFINED = 125  # the exit code where the above is not to be had

# Numbers of system calls on x86-64 and on 64-bit ARM, from Linux's headers; None where there is no
# such call.
_DENIED = {
    # other processes, and programs
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "setrlimit": (160, 164),
    # the network; io_uring opens sockets and files without these calls
    "socket": (41, 198), "io_uring_setup": (425, 425),
    # memory that is not counted, or stays
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219),
    # namespaces, mounts, and what has had most of the kernel's faults
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "fsopen": (430, 430),
    "move_mount": (429, 429), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
_CHECKED = {
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131),
    "fcntl": (72, 25), "ioctl": (16, 29), "prctl": (157, 167), "prlimit64": (302, 261),
}  # fmt: skip
_FIRST_UNKNOWN = 449  # calls that are newer than these tables
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_CLONE_THREAD = 0x10000
_SET_OWNER = (8, 15)  # fcntl: the kernel then signals that process
_SET_OWNER_OR_TYPE = (0x8901, 0x8902, 0x5412, 0x541C)  # ioctl: the same, and input of terminals
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2

# Instructions of classic BPF (linux/bpf_common.h), and what a filter returns (linux/seccomp.h).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NOT_PERMITTED, _NO_SUCH_CALL = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def main() -> int:
    limits = json.loads(sys.argv[1])
    code = sys.stdin.buffer.read()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.clear()
    os.environ["TMPDIR"] = os.getcwd()
    try:
        confine(limits)
    except (OSError, ValueError) as error:
        print(error)
        return NOT_CONFINED
    sys.argv, sys.stdin = ["<code>"], io.StringIO()
    return run(code)


def confine(limits: dict[str, int]) -> None:
    """Gives up rights.

    Raises:
      OSError, ValueError: this kernel, or this kind of processor, has no such means.
    """
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(f"system calls of {platform.machine()} are not known, only of x86-64, ARM64")
    place, architecture = _ARCHITECTURES[platform.machine()]
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    _succeed(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)  # capset(2), version 3
    _succeed(libc.capset(header, nothing))
    _succeed(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    instructions = program(place, architecture)
    filter_ = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in instructions))
    pointed = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(filter_))
    _succeed(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointed, 0, 0))


def _succeed(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel does not confine processes: {os.strerror(number)}")


def program(place: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """The filter of system calls: (code, jump if true, jump if false, constant) an instruction.

    Args:
      place: of the numbers in the tables.
      architecture: as seccomp names it. Calls of another, such as those of 32 bits, kill.
    """
    checks = {
        "clone": [*_argument(0), (_ANY_BIT, 1, 0, _CLONE_THREAD), _refuse(), _allow()],
        # The filter cannot see its arguments; C libraries then use clone.
        "clone3": [(_RETURN, 0, 0, _NO_SUCH_CALL)],
        "kill": [*_argument(0), (_EQUAL, 1, 0, os.getpid()), _refuse(), _allow()],
        "tgkill": [*_argument(0), (_EQUAL, 1, 0, os.getpid()), _refuse(), _allow()],
        "fcntl": [*_argument(1), *_refuse_values(_SET_OWNER), _allow()],
        "ioctl": [*_argument(1), *_refuse_values(_SET_OWNER_OR_TYPE), _allow()],
        "prctl": [*_argument(0), *_refuse_values((_PR_SET_PDEATHSIG,)), _allow()],
        # Limits may be read, not set: the third argument is where new ones are.
        "prlimit64": [
            *_argument(2), (_EQUAL, 1, 0, 0), _refuse(),
            *_argument(2, high=True), (_EQUAL, 1, 0, 0), _refuse(), _allow(),
        ],
    }  # fmt: skip
    result = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _FIRST_UNKNOWN), (_RETURN, 0, 0, _NO_SUCH_CALL),
    ]  # fmt: skip
    for numbers in _DENIED.values():
        number = numbers[place]
        if number is not None:
            result += [(_EQUAL, 0, 1, number), _refuse()]
    for name, (x86, arm) in _CHECKED.items():
        result += [(_EQUAL, 0, len(checks[name]), (x86, arm)[place]), *checks[name]]
    return [*result, _allow()]


def _argument(index: int, *, high: bool = False) -> list[tuple[int, int, int, int]]:
    return [(_LOAD, 0, 0, 16 + 8 * index + 4 * high)]  # both processors store the low half first


def _refuse_values(values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    return [step for value in values for step in ((_EQUAL, 0, 1, value), _refuse())]


def _refuse() -> tuple[int, int, int, int]:
    return _RETURN, 0, 0, _NOT_PERMITTED


def _allow() -> tuple[int, int, int, int]:
    return _RETURN, 0, 0, _ALLOW


def run(code: bytes) -> int:
    """Runs code as a program; an exception is printed as one line, with the line of the code."""
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if error.code in (None, 0):
            return 0
        print(f"error: exit code {error.code}")
        return 1
    except BaseException as error:
        lines = [step.lineno for step in traceback.extract_tb(error.__traceback__)
                 if step.filename == "<code>"]  # fmt: skip
        if isinstance(error, SyntaxError) and error.filename == "<code>":
            lines, text = [error.lineno], f"{type(error).__name__}: {error.msg}"
        else:
            text = traceback.format_exception_only(error)[-1].strip()
        print(f"error: {f'line {lines[-1]}: ' if lines else ''}{text}")
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(status)  # threads that the code left behind end here
