"""Copies of the parts of remote byte stores on the local disk, made while a run reads on.

    DIRECTORY/lock                                    held while copies come and go
    DIRECTORY/stores/DIGEST/in_use                    held, shared, by every process that reads it
    DIRECTORY/stores/DIGEST/train/00000/zarr.json     the `bytes` array of a part, file by file
    DIRECTORY/stores/DIGEST/train/00000/c/0
    DIRECTORY/unfinished/...                          a copy being written: renamed when complete

A store's name is the sha256 of its manifest, which holds that of every array: a store that is
written anew never meets copies of the old one. Locks end with the process that holds them, however
it ends, so that a killed process leaves neither a lock nor a part that reads as whole. Damage that
comes later is found by the checksum of each chunk (`byte_store.Split`), and the copy is dropped.

What is here stays until another store needs the room. The parts of a store that is being read are
never evicted: where it does not fit, as many of its parts are kept as do, and the others are read
from storage. Training reads uniformly at random, and then every part is as likely to be read next
as any other: no policy hits more often than any fixed set of parts, which costs no second copy.
"""

import atexit
import contextlib
import fcntl
import os
import queue
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tensorstore as ts
from absl import logging

_POLL_S = 0.1  # how soon a copy in flight notices that the process ends


class Part(NamedTuple):
    """What is copied: the files below a key-value store, to the folder `name` of a store."""

    digest: str  # of the store
    name: str  # SPLIT/PART
    source: ts.KvStore


class LocalCopies:
    """A folder of copies, of one or more stores, that a background thread fills.

    Any number of processes may share the folder. Nothing that goes wrong here is an error of the
    run: where the disk is full, or the folder cannot be written, copying ends with a line in the
    log.
    """

    def __init__(self, directory: str, limit_bytes: int):
        """`limit_bytes` bounds all files below `directory`, those of other stores included."""
        self._root = Path(os.path.expanduser(directory))
        self._limit = limit_bytes
        self._wanted: queue.SimpleQueue[tuple[Part, Callable[[Path], None]] | None]
        self._wanted = queue.SimpleQueue()
        self._in_use: dict[str, Any] = {}  # by digest: open files with a shared lock
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def want(self, part: Part, ready: Callable[[Path], None]) -> None:
        """Calls `ready` with the folder of a part's copy: now, or from a thread when it is there.

        It is never called where there is no room.
        """
        folder = self._folder(part)
        try:
            self._use(part.digest)
            there = folder.is_dir()
        except OSError as error:
            return self._stop(logging.WARNING, error)
        if there:
            with contextlib.suppress(OSError):  # another process may have dropped it just now
                os.utime(folder)
            ready(folder)
        elif not self._stopped.is_set():
            self._wanted.put((part, ready))
            self._start()

    def drop(self, part: Part, reason: object) -> None:
        """Deletes a damaged copy."""
        folder = self._folder(part)
        logging.warning("Local copy %s is damaged and dropped (%s)", folder, reason)
        with contextlib.suppress(OSError), self._locked():
            self._remove(folder)

    def close(self) -> None:
        """Ends the copying; a copy under way is abandoned."""
        self._stopped.set()
        if self._thread:
            self._wanted.put(None)
            self._thread.join(timeout=5)  # it may wait for another process's lock

    # ---- in the thread

    def _start(self) -> None:
        if self._thread is None:
            # Before the interpreter is torn down: a thread inside tensorstore would not survive it.
            atexit.register(self.close)
            self._thread = threading.Thread(target=self._work, name="local copies", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """One part at a time, in the order they were asked for: the batches' reads come first."""
        while (wanted := self._wanted.get()) and not self._stopped.is_set():
            part, ready = wanted
            try:
                if not (self._folder(part).is_dir() or self._copy(part)):
                    return self._stop(logging.INFO, f"{self._limit / 1e9:.1f} GB are full")
            except OSError as error:
                return self._stop(logging.WARNING, error)
            except ValueError as error:  # whoever reads this part will see more of it
                if not self._stopped.is_set():
                    logging.warning("Part %s of a store cannot be copied: %s", part.name, error)
            else:
                ready(self._folder(part))

    def _copy(self, part: Part) -> bool:
        """Whether a part is in its folder now: there may be no room for it.

        Raises:
          ValueError: storage cannot be read, or the process ends.
        """
        files: dict[str, bytes] = {}
        for key in self._result(part.source.list()):
            files[key.decode()] = self._result(part.source.read(key)).value
        if "zarr.json" not in files:
            raise ValueError("it is not there")
        with self._locked():
            if self._folder(part).is_dir():  # another process was faster
                return True
            if not self._make_room(sum(map(len, files.values()))):
                return False
            self._write(files, self._folder(part))
            return True

    def _result(self, future: Any) -> Any:
        """What a future of tensorstore holds, if it comes before the process ends."""
        while not self._stopped.is_set():
            with contextlib.suppress(TimeoutError):
                return future.result(timeout=_POLL_S)
        raise ValueError("the process ends")

    def _stop(self, level: int, reason: object) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            logging.log(
                level,
                "No more local copies in %s, the rest is read remotely: %s",
                self._root,
                reason,
            )

    # ---- files

    def _folder(self, part: Part) -> Path:
        return self._root / "stores" / part.digest / part.name

    def _use(self, digest: str) -> None:
        if digest not in self._in_use:
            file = self._root / "stores" / digest / "in_use"
            with self._locked():
                file.parent.mkdir(parents=True, exist_ok=True)
                held = open(file, "w")  # noqa: SIM115, until the process ends
                fcntl.flock(held, fcntl.LOCK_SH)
                self._in_use[digest] = held

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Copies come and go in one process at a time."""
        self._root.mkdir(parents=True, exist_ok=True)
        with open(self._root / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, files: Mapping[str, bytes], folder: Path) -> None:
        temporary = self._unfinished()
        try:
            for name, value in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(value)
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _remove(self, folder: Path) -> None:
        if folder.is_dir():
            doomed = self._unfinished()
            folder.rename(doomed)  # at once, so that nobody finds half of it
            shutil.rmtree(doomed, ignore_errors=True)

    def _unfinished(self) -> Path:
        """A new name; to be used under the lock, so what others have left there is garbage."""
        shutil.rmtree(self._root / "unfinished", ignore_errors=True)
        (self._root / "unfinished").mkdir()
        return self._root / "unfinished" / uuid.uuid4().hex

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes fit, if need be after parts of stores that nobody reads are gone.

        Those used longest ago go first.
        """
        held = {
            zarr.parent: sum(file.stat().st_size for file in zarr.parent.rglob("*"))
            for zarr in self._root.glob("stores/*/*/*/zarr.json")
        }
        excess = sum(held.values()) + size - self._limit
        unused = [part for part in held if not self._is_used(part.parents[1])]
        if excess > sum(held[part] for part in unused):
            return False
        for part in sorted(unused, key=lambda part: part.stat().st_mtime):
            if excess <= 0:
                break
            excess -= held[part]
            self._remove(part)
        return True

    def _is_used(self, store: Path) -> bool:
        with open(store / "in_use", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
