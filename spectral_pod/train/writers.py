"""Where metrics go: `metrics.jsonl`, and TensorBoard event files.

TensorFlow takes seconds to import, and CLU's writers need it. So the event files are written on a
thread of their own, which imports CLU while the first step compiles; without TensorFlow the same
thread writes the same files through TensorBoard's own writer.

Objects in storage cannot be appended to, and TensorFlow's own way to gs:// is another than the rest
of a run takes. There all files are written to a temporary folder, which is copied.
"""

import json
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from absl import logging
from etils import epath

from spectral_pod import storage
from spectral_pod.errors import UserError

_COPY_SECONDS = 30.0  # between copies to storage, as far as nobody asks for one


class MetricWriter:
    """Scalars and texts of one run, written by the leading process only."""

    def __init__(self, workdir: str, *, is_leader: bool, resume_step: int):
        """Continues the records in `workdir` after `resume_step`; what came later is rewritten."""
        self._workdir = workdir
        self._thread = ThreadPoolExecutor(1, "tensorboard")
        self._pending: list[Future[Any]] = []
        self._events: Future[Any] | None = None
        if not is_leader:
            return
        kept = _kept_lines(epath.Path(workdir) / "metrics.jsonl", resume_step)
        self._kept = frozenset(kept)
        if storage.is_remote(workdir):
            self._temporary = tempfile.TemporaryDirectory(prefix="spectral_pod-")
            folder = pathlib.Path(self._temporary.name)
            self._events = self._thread.submit(_Copied, folder, epath.Path(workdir))
        else:
            folder = pathlib.Path(workdir)
            self._events = self._thread.submit(_open_events, workdir)
        self._jsonl = folder / "metrics.jsonl"
        storage.write_whole(epath.Path(self._jsonl), "".join(kept))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to `metrics.jsonl` and the values to the event file."""
        if self._events is None:
            return
        line = json.dumps({"step": step} | {k: float(v) for k, v in values.items()}) + "\n"
        if line not in self._kept:  # a finished run that is started again evaluates again
            with open(self._jsonl, "a") as file:
                file.write(line)
        self._submit(lambda events: events.write_scalars(step, dict(values)))

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Markdown texts for TensorBoard's text page."""
        self._submit(lambda events: events.write_texts(step, dict(values)))

    def flush(self) -> None:
        """Waits for everything so far to be stored: a resumed run writes only what comes later.

        Raises:
          UserError: a file could not be written; so do the other methods.
        """
        self._submit(lambda events: events.flush())
        wait(self._pending)
        self._raise_failures()

    def close(self) -> None:
        """Waits for everything to be stored."""
        self._submit(lambda events: events.close())
        self._thread.shutdown(wait=True)
        self._raise_failures()

    def _submit(self, write: Any) -> None:
        self._raise_failures()
        if self._events is not None:
            opened = self._events
            self._pending.append(self._thread.submit(lambda: write(opened.result())))

    def _raise_failures(self) -> None:
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if future not in done]
        for future in done:
            if error := future.exception():
                raise UserError(f"cannot write metrics to {self._workdir}: {error}") from error


def _kept_lines(file: epath.Path, resume_step: int) -> list[str]:
    """The complete lines up to `resume_step`: a killed run may have left later or torn ones."""
    if not file.exists():
        return []
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue
        if line.endswith("\n") and step <= resume_step:
            kept.append(line)
    return kept


def _open_events(workdir: str) -> Any:
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # unused here, and it says so at start-up
    try:
        from clu import metric_writers

        return metric_writers.SummaryWriter(workdir)
    except ImportError:
        logging.info("TensorFlow is not installed; event files by TensorBoard's own writer.")
        return _TensorBoardWriter(workdir)


class _Copied:
    """The calls of a CLU writer on a local folder, whose files are copied to object storage."""

    def __init__(self, folder: pathlib.Path, target: epath.Path):
        self._folder = folder
        self._target = target
        self._events = _open_events(str(folder))
        self._sizes: dict[str, int] = {}  # of what was copied; files only grow
        self._copied = time.monotonic()

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._events.write_scalars(step, values)
        if time.monotonic() - self._copied > _COPY_SECONDS:
            self.flush()

    def write_texts(self, step: int, values: Mapping[str, str]) -> None:
        self._events.write_texts(step, values)

    def flush(self) -> None:
        self._events.flush()
        self._copy()

    def close(self) -> None:
        self._events.close()
        self._copy()

    def _copy(self) -> None:
        for file in self._folder.iterdir():
            data = file.read_bytes()
            if self._sizes.get(file.name) != len(data):
                (self._target / file.name).write_bytes(data)
                self._sizes[file.name] = len(data)
        self._copied = time.monotonic()


class _TensorBoardWriter:
    """The calls of a CLU writer that are used here, without TensorFlow."""

    def __init__(self, workdir: str):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._file = EventFileWriter(workdir)

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for name, value in values.items():
            self._add(step, scalar_pb(name, value))

    def write_texts(self, step: int, values: Mapping[str, str]) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        for name, text in values.items():
            self._add(step, text_pb(name, text))

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._file.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
