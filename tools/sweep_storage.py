"""Where a sweep is stored: Optuna's journal, in a folder or on gs://, for any number of workers."""

import json
from collections.abc import Iterable
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from spectral_pod import storage


class Journal(BaseJournalBackend):
    """A journal of numbered files, each with the entries that one call has appended.

    A file is written only if there is none of its number (tensorstore's conditional writes: a lock
    on disk, preconditions on gs://), so that workers need no server and no lock of their own.
    """

    def __init__(self, place: str):
        """The journal in a folder or below a gs:// URL."""
        self._files = storage.kvstore(place)
        self._entries: list[dict[str, Any]] = []  # of the files that have been read
        self._count = 0  # of these files

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        while self._read_next().state == "value":
            pass
        return self._entries[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raw = json.dumps(logs).encode()
        while True:
            while (found := self._read_next()).state == "value":
                pass
            absent = found.stamp.generation
            written = self._files.write(self._name, raw, if_equal=absent).result()
            # A repeated request finds its own result, and says that it has not written.
            if written.generation or self._files.read(self._name).result().value == raw:
                return

    @property
    def _name(self) -> str:
        """Of the first file that has not been read."""
        return f"{self._count:08d}.json"

    def _read_next(self) -> Any:
        """What is found of the next file; it counts as read if it is there."""
        found = self._files.read(self._name).result()
        if found.state == "value":
            self._entries += json.loads(found.value)
            self._count += 1
        return found


def journal(out: str) -> JournalStorage:
    """The storage of the sweep in `out`."""
    return JournalStorage(Journal(f"{out}/journal"))
