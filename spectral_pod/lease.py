"""A lease: one process at a time writes a place, on disk or on gs://.

    with Lease(f"{workdir}/lease.json", f"workdir {workdir}") as lease:
        ...
        lease.check()   # before what another writer would suffer from

A lease is a small file that names its holder, and is only ever replaced if it is still what was
read before (tensorstore's conditional writes: a lock on disk, preconditions on gs://). Its holder
renews it every few seconds. Another process takes it over if the holder has died, which it can see
in the same machine, or else if the lease has not changed while it watched; no clocks are compared.
"""

import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from absl import logging

from spectral_pod import errors, storage
from spectral_pod.errors import TakenOverError, UserError

_RENEW_SECONDS = 5.0
EXPIRY_SECONDS = 30.0  # without renewal, after which a lease may be taken over
_POLL_SECONDS = 0.5
_ENDED = "another process, which has ended"
_RELEASE_SECONDS = 5.0  # for the release; where storage is out the lease expires by itself
# For a request of the renewing thread, which must have left the storage library before the process
# ends: C++ aborts a process whose threads are still in it.
_REQUEST_SECONDS = 3.0


class InUseError(UserError):
    """Another process holds the lease."""


def of_workdir(workdir: str, say: Callable[[str], None]) -> "Lease":
    """The lease on a run's workdir, a path or a gs:// URL."""
    return Lease(f"{workdir}/lease.json", f"workdir {workdir}", say=say)


class Claim(NamedTuple):
    """A lease as processes know it that write for its holder, to which it can be sent."""

    path: str
    what: str
    id: str  # of the holder

    def check(self) -> None:
        """Reads the lease, and checks that its holder is still the same.

        Raises:
          TakenOverError: it is another.
          ValueError: it cannot be read.
        """
        folder, name = os.path.split(self.path)
        found = storage.kvstore(folder or ".").read(name).result()
        holder = _holder(found.value) if found.state == "value" else {}
        if holder.get("id") != self.id:
            raise _taken_over(self.what, _named(holder) if found.state == "value" else _ENDED)


class Lease:
    """The lease on a place; a context manager. Its holder is a process, not a thread."""

    def __init__(
        self,
        path: str,
        what: str,
        *,
        wait: bool = False,
        say: Callable[[str], None] = logging.info,
    ):
        """The lease in the file or object at `path`.

        Args:
          path: a local path or a gs:// URL.
          what: names the place, in messages.
          wait: whether entering waits for the end of another holder, or raises `InUseError`.
          say: prints a line about a wait.
        """
        folder, self._name = os.path.split(path)
        self._what, self._wait, self._say = what, wait, say
        self._folder, self._path = folder or ".", path
        place = path if storage.is_remote(path) else os.path.realpath(path)
        self._me = _this_process() | {"id": uuid.uuid4().hex, "place": place}
        self._lost = ""
        self._ended = threading.Event()
        self._wake, self._attempted = threading.Event(), threading.Event()
        self._asked = False  # `check` has waited for a renewal since the last one

    def __enter__(self) -> Self:
        """Takes the lease.

        Raises:
          InUseError: another process holds it.
          UserError: the place cannot be written.
        """
        try:
            if not storage.is_remote(self._folder):
                os.makedirs(self._folder, exist_ok=True)
            self._store = storage.kvstore(self._folder)
            self._take()
        except (ValueError, OSError) as error:
            what = f"cannot write {self._what}"
            raise errors.storage_error(error, what) or UserError(f"{what}: {error}") from error
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout=_RELEASE_SECONDS)
        if self._lost:
            return
        try:
            deleted = self._store.write(self._name, None, if_equal=self._generation)
            deleted.result(timeout=_RELEASE_SECONDS)
        except (ValueError, TimeoutError) as error:
            logging.warning("The lease %s is not released, and expires: %s", self._path, error)

    @property
    def claim(self) -> Claim:
        """This lease, for processes that write for its holder."""
        return Claim(self._path, self._what, self._me["id"])

    def check(self) -> None:
        """Checks that this process still holds the lease, as far as is known without waiting.

        Raises:
          TakenOverError: another process has taken it over.
        """
        is_silent = time.monotonic() - self._renewed > EXPIRY_SECONDS
        if is_silent and not (self._lost or self._asked):
            # This process was suspended, and somebody may have taken over; or storage is out, and
            # then nobody can, and there is nothing more to wait for.
            self._asked = True
            self._attempted.clear()
            self._wake.set()
            self._attempted.wait(_RENEW_SECONDS)
        if self._lost:
            raise _taken_over(self._what, self._lost)

    def _take(self) -> None:
        seen, since, told = None, time.monotonic(), False
        while True:
            found = self._store.read(self._name).result()
            now = time.monotonic()
            if found.stamp.generation != seen:
                renewed = seen is not None and found.state == "value"
                seen, since = found.stamp.generation, now
            else:
                renewed = False
            holder = _holder(found.value) if found.state == "value" else {}
            is_copy = "place" in holder and holder["place"] != self._me["place"]
            is_free = (
                is_copy
                or found.state != "value"
                or _is_dead(holder)
                or now - since > EXPIRY_SECONDS
            )
            if is_free and self._write(found.stamp.generation):
                return
            if not self._wait and (renewed or _is_alive(holder)):
                raise InUseError(
                    f"{self._what} is in use by {_named(holder)}; wait for its end, stop it, or "
                    "give another one"
                )
            if not is_free and not told:
                told = True
                self._say(
                    f"waiting for {_named(holder)}, which holds {self._what}, or for "
                    f"{EXPIRY_SECONDS:.0f} s without a sign of it"
                )
            time.sleep(_POLL_SECONDS)

    def _write(self, generation: bytes, timeout: float | None = None) -> bool:
        """Replaces the lease if it is still of this generation; returns whether it was."""
        content = json.dumps(self._me | {"renewed": uuid.uuid4().hex}).encode()
        written = self._store.write(self._name, content, if_equal=generation)
        new = written.result(timeout=timeout).generation
        if not new:  # it was not; or it was, and a repeated request finds its own result
            found = self._store.read(self._name).result(timeout=timeout)
            if found.state != "value" or _holder(found.value).get("id") != self._me["id"]:
                return False
            new = found.stamp.generation
        self._generation = new
        return True

    def _renew(self) -> None:
        while not self._lost:
            self._wake.wait(_RENEW_SECONDS)
            self._wake.clear()
            if self._ended.is_set():
                return
            try:
                self._renew_once()
            except Exception as error:  # whoever wants to take it over cannot reach storage either
                logging.warning("The lease %s is not renewed: %s", self._path, error)
            self._attempted.set()

    def _renew_once(self) -> None:
        if not self._write(self._generation, _REQUEST_SECONDS):
            found = self._store.read(self._name).result(timeout=_REQUEST_SECONDS)
            if found.state == "value":
                self._lost = _named(_holder(found.value))
                return
            if time.monotonic() - self._renewed > EXPIRY_SECONDS:
                self._lost = _ENDED  # and has deleted the file
                return
            # A person has deleted the file; it is written again unless another process was faster.
            self._store = storage.kvstore(self._folder)
            if not self._write(found.stamp.generation, _REQUEST_SECONDS):
                return
        self._renewed, self._asked = time.monotonic(), False


def _taken_over(what: str, by: str) -> TakenOverError:
    return TakenOverError(
        f"{what} was taken over by {by}, as this process did not show that it was alive for more "
        f"than {EXPIRY_SECONDS:.0f} s; it ends here"
    )


def _this_process() -> dict[str, Any]:
    """What identifies this process, to the processes of this machine and to people."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "machine": _machine(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _started(pid: int) -> str:
    """When a living process started, in ticks since the machine did; "" if there is none.

    Not by the clock, which can be set.
    """
    try:
        state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _machine() -> str:
    """Identifies the set of processes among which process numbers are unique; "" if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"  # of a container
    except OSError:
        return ""


def _holder(raw: bytes) -> dict[str, Any]:
    """The holder that a lease names; empty if it is damaged."""
    try:
        holder = json.loads(raw)
        return holder if isinstance(holder, dict) else {}
    except ValueError:
        return {}


def _is_here(holder: dict[str, Any]) -> bool:
    return bool(holder.get("machine")) and holder["machine"] == _machine()


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to be alive, as a process of this machine."""
    pid, started = holder.get("pid"), holder.get("started")
    return _is_here(holder) and isinstance(pid, int) and bool(started) and _started(pid) == started


def _is_dead(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and not _is_alive(holder)


def _named(holder: dict[str, Any]) -> str:
    names = [str(holder.get(name, "unknown")) for name in ("pid", "host", "since")]
    return "process {} on host {} (since {})".format(*names)
