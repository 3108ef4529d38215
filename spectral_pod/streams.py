"""Standard streams of a run that outlast whoever reads them.

What a run produces is in its workdir; the lines that it prints are a view of it. So a run of days
does not end because its reader did: `| head`, a `tee` whose disk is full, a terminal or a collector
of logs that went away. It goes on, what cannot be printed is dropped, and a line on the other
stream says so once. (Tools end then: their stdout is what they produce.)
"""

import contextlib
import io
import logging
import os
import select
import sys
from typing import Any

from absl import logging as absl_logging

_NAMES = {1: "stdout", 2: "stderr"}  # by file descriptor


class _Lasting(io.FileIO):
    """A file to write to, without errors."""

    _has_failed = False

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # full, and set not to block
                select.select([], [self], [])
            return written
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                self._tell(error)
            return len(data)

    def _tell(self, error: OSError) -> None:
        this = self.fileno()
        line = (
            f"{_NAMES[this]} cannot be written ({error.strerror}): its lines are dropped, and the "
            "run goes on; its metrics are in the workdir\n"
        )
        with contextlib.suppress(OSError):
            os.write(3 - this, line.encode())  # to the other stream


def outlast_readers() -> None:
    """Makes sys.stdout and sys.stderr drop what cannot be written, and closed ones go nowhere.

    Characters that the encoding of a stream lacks are written as escapes.
    """
    for descriptor in (0, 1, 2):  # or the next file that is opened would be taken for the stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest descriptor, which is this one
    for descriptor, name in _NAMES.items():
        stream = getattr(sys, name)
        if stream is None:  # was closed when Python started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, until the process ends
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        lasting = io.TextIOWrapper(
            io.BufferedWriter(_Lasting(descriptor, "w", closefd=False)),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, lasting)
        for handler in (*logging.root.handlers, absl_logging.get_absl_handler().python_handler):
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(lasting)
