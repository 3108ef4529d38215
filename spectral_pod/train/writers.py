"""Where metrics go: `metrics.jsonl`, and TensorBoard event files.

TensorFlow takes seconds to import, and CLU's writers need it. So the event files are written on a
thread of their own, which imports CLU while the first step compiles; without TensorFlow the same
thread writes the same files through TensorBoard's own writer.
"""

import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from absl import logging
from etils import epath

from spectral_pod.errors import UserError


class MetricWriter:
    """Scalars and texts of one run, written by the leading process only."""

    def __init__(self, workdir: str, *, is_leader: bool, resume_step: int):
        """Continues the records in `workdir` after `resume_step`; what came later is rewritten."""
        self._jsonl = epath.Path(workdir) / "metrics.jsonl"
        self._is_leader = is_leader
        self._lines = _kept_lines(self._jsonl, resume_step) if is_leader else []
        self._kept = frozenset(self._lines)
        self._thread = ThreadPoolExecutor(1, "tensorboard")
        self._events = self._thread.submit(_open_events, workdir) if is_leader else None
        self._pending: list[Future[Any]] = []
        if is_leader:
            temporary = self._jsonl.with_suffix(".tmp")  # a run killed here must not lose lines
            temporary.write_text("".join(self._lines))
            temporary.replace(self._jsonl)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to `metrics.jsonl` and the values to the event file."""
        if not self._is_leader:
            return
        line = json.dumps({"step": step} | {k: float(v) for k, v in values.items()}) + "\n"
        if line in self._kept:
            pass  # a finished run that is started again evaluates again
        elif str(self._jsonl).startswith("gs://"):  # objects cannot be appended to
            self._lines.append(line)
            self._jsonl.write_text("".join(self._lines))
        else:
            with open(self._jsonl, "a") as file:
                file.write(line)
        self._submit(lambda events: events.write_scalars(step, dict(values)))

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Markdown texts for TensorBoard's text page."""
        self._submit(lambda events: events.write_texts(step, dict(values)))

    def flush(self) -> None:
        """Waits for everything so far to be on disk: a resumed run writes only what comes later.

        Raises:
          UserError: an event file could not be written; so do the other methods.
        """
        self._submit(lambda events: events.flush())
        wait(self._pending)
        self._raise_failures()

    def close(self) -> None:
        """Waits for everything to be on disk."""
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
                where = self._jsonl.parent
                raise UserError(f"cannot write event files to {where}: {error}") from error


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
