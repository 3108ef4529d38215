"""Exceptions that end a run: `main` prints the message and exits with the class's exit code.

    0    success
    1    a bug; the traceback is on stderr
    2    a user error: UserError
    3    a non-finite loss or gradient: NonFiniteError
    75   preempted, the state is saved: Preempted           restart to continue
    76   another process of the run is lost: LostPeerError  restart
    77   no progress for too long; stacks were written      restart
    78   --stop_after_minutes is over, the state is saved: TimeUp
    130  Ctrl-C

JAX's runtime aborts a process (134) when the coordinator dies. That, and any other death by a
signal, also calls for a restart; `launch/supervise.sh` does it.

A full disk, a limit of the machine or a lost file system is for the user to solve, too. `naming`
and `storage_error` make one `StorageError` of whatever a library raises then.
"""

import contextlib
import errno
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """The message says what is wrong, which field, file or host is at fault, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration is invalid: a misspelt field, an impossible mesh, a mismatched workdir."""


class DataError(UserError):
    """A data store is missing, damaged, or does not match the configuration."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or cannot be restored into this model."""


class StorageError(UserError, OSError):
    """A file cannot be read or written: a full disk, a limit, a permission, a lost file system."""


class TakenOverError(UserError):
    """Another process has taken over the workdir or the store that this one was writing."""


class NonFiniteError(UserError):
    """The loss or a gradient is NaN or infinite; the newest valid checkpoint is kept."""

    exit_code = 3


class Preempted(UserError):
    """SIGTERM was received; the current state, or else the last checkpoint, is saved."""

    exit_code = 75


class TimeUp(Preempted):
    """`--stop_after_minutes` is over; the current state, or else the last checkpoint, is saved.

    The run was to end here, so that only a person continues it: a restart would not.
    """

    exit_code = 78


class LostPeerError(UserError):
    """Another process of the run died, exited, or did not reach a barrier in time."""

    exit_code = 76


STALLED = 77


# ---- errors that files, disks and limits of the machine cause

_CURES = {
    (errno.ENOSPC, errno.EDQUOT): "free some space there (`df -h`, `df -i`, `quota` show it)",
    (errno.EFBIG,): "raise the limit on the size of files (`ulimit -f`), or choose another disk",
    (errno.EMFILE,): "raise the limit on open files of a process (`ulimit -n`)",
    (errno.ENFILE,): "this machine has too many open files; end what holds them",
    (errno.ENOMEM,): "this machine, or the container, has too little memory",
    (errno.EACCES, errno.EPERM): "check who owns it and what you may do there",
    (errno.EROFS,): "its file system is read-only; remount it, or choose another place",
    (errno.ENOENT,): "it was removed meanwhile, or its disk is not mounted",
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG): (
        "choose another place, or move away what is there"
    ),
    (
        errno.EIO, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EUCLEAN, errno.ESTALE,
        errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
        errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
    ): "its disk or file server fails; see that it is mounted and answers (`dmesg` says more)",
}  # fmt: skip
_CURE = {number: cure for numbers, cure in _CURES.items() for number in numbers}
_REMOTE = ("gcsfs", "aiohttp", "google.auth", "google.api_core", "requests")
_NUMBER = re.compile(r"os_error_code='(\d+)'|\[Errno (\d+)\]")  # of tensorstore, and of Python


def storage_error(error: BaseException, what: Any = "") -> StorageError | None:
    """The `StorageError` for an error that storage or a limit causes; None for any other error.

    Args:
      error: of any type, as libraries in C++ raise ValueError or RuntimeError.
      what: the file, folder or URL at fault, named in the message.
    """
    if isinstance(error, StorageError):
        return error
    for cause in _causes(error):
        cure = _cure(cause)
        if cure is not None:
            place = f"{what}: " if str(what) and str(what) not in str(cause) else ""
            return StorageError(f"{place}{cause}; {cure}, and start again")
    return None


@contextlib.contextmanager
def naming(what: Any) -> Iterator[None]:
    """Errors of storage in this context become a `StorageError` that names `what`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        fault = storage_error(error, what)
        if fault is None:
            raise
        raise fault from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and the errors of a group."""
    yield error
    for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield from _causes(part)
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)


def _cure(error: BaseException) -> str | None:
    """What to do about an error of storage; None if it is none."""
    if any(cls.__module__.startswith(_REMOTE) for cls in type(error).__mro__):
        return "check the network and that storage answers"
    if isinstance(error, OSError):
        if error.errno is None:  # raised by a library: a damaged file, a refusal of remote storage
            return "check that file or URL"
        return _CURE.get(error.errno)
    text = str(error)
    if match := _NUMBER.search(text):
        return _CURE.get(int(match[1] or match[2]))
    return next((cure for number, cure in _CURE.items() if os.strerror(number) in text), None)


def check_packages(package: str) -> None:
    """Ends `python -m PACKAGE.NAME` with one line if this Python lacks the project's packages.

    Who imports a module of the package, as the launcher of TPUs does, may not need them.
    """
    _, _, after = "\n".join(sys.orig_argv).partition("\n-m\n")
    if after.startswith(f"{package}.") and importlib.util.find_spec("jax") is None:
        sys.stderr.write(
            f"{sys.executable} does not have the packages of spectral_pod. In a checkout, "
            "launch/setup.sh installs them, once, and source .venv/bin/activate selects them\n"
        )
        sys.exit(UserError.exit_code)
