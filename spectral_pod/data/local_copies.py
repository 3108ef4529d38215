"""Local copies of the parts of remote byte stores, made in the background of a run.

    DIRECTORY/lock                                    locked while copies are added or removed
    DIRECTORY/stores/DIGEST/in_use                    locked, shared, by every process reading it
    DIRECTORY/stores/DIGEST/train/00000/zarr.json     the `bytes` array of a part, file by file
    DIRECTORY/stores/DIGEST/train/00000/c/0
    DIRECTORY/unfinished/...                          a copy being written, renamed when complete

A store is named by the sha256 of its manifest, which contains that of every array, so a rewritten
store never uses copies of the old one. Locks end with the process that holds them, however it ends:
a killed process leaves neither a lock nor an incomplete part. Later damage is detected by the
checksum of each chunk (`byte_store.Split`), and the copy is dropped.

Copies stay until another store needs the space. Parts of a store in use are never evicted: if the
store is larger than the limit, as many of its parts are kept as fit, and the others are read
remotely. Training reads uniformly at random, so every part is equally likely to be read next, and
no eviction policy has a higher hit rate than a fixed set of parts, which is never copied again.
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

from spectral_pod import storage

_POLL_S = 0.1  # seconds until a copy in progress notices that the process ends


class Part(NamedTuple):
    """A part to copy: the files below a key-value store, into the folder `name` of a store."""

    digest: str  # of the store
    name: str  # SPLIT/PART
    source: ts.KvStore


class LocalCopies:
    """A folder of copies of one or more stores, filled by a background thread.

    Any number of processes may share the folder. Failures never end the run: if the disk is full or
    the folder is not writable, copying stops and a line is logged.
    """

    def __init__(self, directory: str, limit_bytes: int):
        """`limit_bytes` limits all copies below `directory`, including those of other stores."""
        self._root = Path(storage.place(directory, "config.data.copies_dir", local=True))
        self._limit = limit_bytes
        self._requests: queue.SimpleQueue[tuple[Part, Callable[[Path], None]] | None]
        self._requests = queue.SimpleQueue()
        self._in_use: dict[str, Any] = {}  # open files with a shared lock, by digest
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def request(self, part: Part, ready: Callable[[Path], None]) -> None:
        """Calls `ready` with the folder of a part's copy: now, or later from a thread.

        It is never called if there is no room for the copy.
        """
        folder = self._folder(part)
        try:
            self._use(part.digest)
            exists = folder.is_dir()
        except OSError as error:
            return self._stop(logging.WARNING, error)
        if exists:
            with contextlib.suppress(OSError):  # another process may just have dropped it
                os.utime(folder)
            ready(folder)
        elif not self._stopped.is_set():
            self._requests.put((part, ready))
            self._start()

    def drop(self, part: Part, reason: object) -> None:
        """Deletes a damaged copy and logs the reason."""
        folder = self._folder(part)
        logging.warning("Local copy %s is damaged and dropped (%s)", folder, reason)
        with contextlib.suppress(OSError), self._locked():
            self._remove(folder)

    @property
    def stopped(self) -> bool:
        """Whether no further copies will be made."""
        return self._stopped.is_set()

    def close(self) -> None:
        """Stops copying; a copy in progress is abandoned."""
        self._stopped.set()
        if self._thread:
            self._requests.put(None)
            self._thread.join(timeout=5)  # it may be waiting for another process's lock

    # ---- in the background thread

    def _start(self) -> None:
        if self._thread is None:
            # Stop before the interpreter shuts down: a thread inside tensorstore would crash then.
            atexit.register(self.close)
            self._thread = threading.Thread(target=self._work, name="local copies", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Copies one part at a time, in the order of requests, leaving bandwidth for batches."""
        while (request := self._requests.get()) and not self._stopped.is_set():
            part, ready = request
            try:
                if not (self._folder(part).is_dir() or self._copy(part)):
                    return self._stop(logging.INFO, f"{self._limit / 1e9:.1f} GB are full")
            except OSError as error:
                return self._stop(logging.WARNING, error)
            except ValueError as error:  # the reader of this part will report it in full
                if not self._stopped.is_set():
                    logging.warning("Part %s of a store cannot be copied: %s", part.name, error)
            else:
                ready(self._folder(part))

    def _copy(self, part: Part) -> bool:
        """Copies a part unless there is no room; returns whether its folder is complete.

        Raises:
          ValueError: storage cannot be read, or the process ends.
        """
        files: dict[str, bytes] = {}
        for key in self._result(part.source.list()):
            name = key.decode()
            if not storage.stays_inside(name):
                raise ValueError(f"its object {name!r} would be written outside of its folder")
            files[name] = self._result(part.source.read(key)).value
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
        """Waits for a tensorstore future, unless the process ends first."""
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
                lock = open(file, "w")  # noqa: SIM115, until the process ends
                fcntl.flock(lock, fcntl.LOCK_SH)
                self._in_use[digest] = lock

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Serializes additions and removals of copies between processes."""
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
            removed = self._unfinished()
            folder.rename(removed)  # atomically, so that no reader sees a partial copy
            shutil.rmtree(removed, ignore_errors=True)

    def _unfinished(self) -> Path:
        """A new path to write to. Needs the lock; whatever else is there is garbage."""
        shutil.rmtree(self._root / "unfinished", ignore_errors=True)
        (self._root / "unfinished").mkdir()
        return self._root / "unfinished" / uuid.uuid4().hex

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes fit, after removing parts of unused stores if necessary.

        The least recently used parts are removed first.
        """
        sizes = {
            zarr.parent: sum(file.stat().st_size for file in zarr.parent.rglob("*"))
            for zarr in self._root.glob("stores/*/*/*/zarr.json")
        }
        excess = sum(sizes.values()) + size - self._limit
        unused = [part for part in sizes if not self._is_used(part.parents[1])]
        if excess > sum(sizes[part] for part in unused):
            return False
        for part in sorted(unused, key=lambda part: part.stat().st_mtime):
            if excess <= 0:
                break
            excess -= sizes[part]
            self._remove(part)
        return True

    def _is_used(self, store: Path) -> bool:
        with open(store / "in_use", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
