"""Writers of metrics: `metrics.jsonl`, TensorBoard event files, and optionally Weights & Biases.

TensorFlow, which CLU's writers need, takes seconds to import. So event files are written by a
thread of their own, which imports CLU while the first step compiles; without TensorFlow it writes
the same files through TensorBoard's own writer. The same thread writes to Weights & Biases.

Objects in storage cannot be appended to, and TensorFlow accesses gs:// through a library of its own
(see `storage.py`). For a gs:// workdir, files are therefore written locally and then copied.

A run that continues from a checkpoint repeats steps whose points are already in event files. The
files of a continued run therefore begin with `SessionLog.START` of its first step: TensorBoard then
drops the points of that step and of later ones in the files before.
"""

import html
import importlib.util
import itertools
import json
import os
import pathlib
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Self

from absl import logging
from etils import epath

from spectral_pod import errors, project_files, storage
from spectral_pod.errors import UserError

_EVENT_FILES = itertools.count()  # numbers those of this process
_COPY_SECONDS = 30.0  # between copies to storage, if none is requested


class MetricWriter:
    """Scalars and texts of one run; only the leader process writes."""

    def __init__(
        self,
        workdir: str,
        *,
        is_leader: bool,
        resume_step: int,
        wandb_project: str = "",
        run_config: Mapping[str, Any] | None = None,
    ):
        """Continues the records in `workdir` after `resume_step`, dropping later ones.

        Args:
          workdir: the run's folder or gs:// URL.
          is_leader: whether this process writes; the others do nothing.
          resume_step: the step from which the run continues.
          wandb_project: a project of Weights & Biases to write to as well; "" for none.
          run_config: the run's configuration, for Weights & Biases.

        Raises:
          UserError: `wandb_project` is given and the package wandb is not installed.
        """
        self._workdir = workdir
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._pending: list[Future[Any]] = []
        self._writers: Future[list[Any]] | None = None
        self.last_line: dict[str, float] = {}  # of the training metrics that this run continues
        if not is_leader:
            return
        if wandb_project and importlib.util.find_spec("wandb") is None:
            raise UserError(
                f"config.train.wandb_project is {wandb_project!r} and wandb is not installed; "
                "pip install wandb, or set the field to ''"
            )
        lines = epath.Path(workdir) / "metrics.jsonl"
        with errors.naming(lines):
            kept = _kept_lines(lines, resume_step)
            is_continued = any(epath.Path(workdir).glob("events.out.tfevents.*"))
        self._kept = frozenset(map(_point, kept))
        windows = (line for line in map(json.loads, reversed(kept)) if "train/loss" in line)
        self.last_line = next(windows, {})  # lines of evaluations are skipped
        remote = storage.is_remote(workdir)
        if remote:
            self._temporary = tempfile.TemporaryDirectory(prefix="spectral_pod-")
            folder = pathlib.Path(self._temporary.name)
        else:
            folder = pathlib.Path(workdir)
        self._jsonl = folder / "metrics.jsonl"
        with errors.naming(self._jsonl):
            storage.write_whole(epath.Path(self._jsonl), "".join(kept))
        # A run that begins anew at step 0 writes the texts of that step again, too.
        restart_step = (resume_step + 1 if resume_step else 0) if is_continued else None

        def open_writers() -> list[Any]:
            events = _open_events(str(folder), restart_step)
            opened = [_Uploader(folder, epath.Path(workdir), events) if remote else events]
            if wandb_project:
                opened.append(_WandbWriter(workdir, wandb_project, run_config or {}))
            return opened

        self._writers = self._thread.submit(open_writers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line with the values and the time to `metrics.jsonl`; writes event files."""
        if self._writers is None:
            return
        now = {"wall_time": round(time.time(), 3)}  # seconds since 1970
        point = {"step": step} | {k: float(v) for k, v in values.items()}
        line = json.dumps(point | now) + "\n"
        if _point(line) not in self._kept:  # a finished run that is restarted evaluates again
            with errors.naming(self._jsonl), open(self._jsonl, "a") as file:
                file.write(line)
        self._submit(lambda writer: writer.write_scalars(step, dict(values)))

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Writes Markdown texts, for TensorBoard's text page."""
        self._submit(lambda writer: writer.write_texts(step, dict(values)))

    def flush(self) -> None:
        """Waits until everything so far is stored, so that a resumed run need not repeat it.

        Raises:
          UserError: a file could not be written; the other methods raise this, too.
        """
        self._submit(lambda writer: writer.flush())
        if self._writers is not None:
            with errors.naming(self._jsonl), open(self._jsonl, "a") as file:
                os.fsync(file.fileno())  # a checkpoint that outlives a power cut follows
        wait(self._pending)
        self._raise_failures()

    def close(self) -> None:
        """Waits until everything is stored, and closes the files."""
        try:
            self._submit(lambda writer: writer.close())
        finally:
            self._thread.shutdown(wait=True)
        self._raise_failures()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            logging.error("%s", error)  # must not replace the error that ends the run

    def _submit(self, write: Callable[[Any], None]) -> None:
        self._raise_failures()
        if self._writers is None:
            return
        opened = self._writers

        def write_all() -> None:
            for writer in opened.result():
                write(writer)

        self._pending.append(self._thread.submit(write_all))

    def _raise_failures(self) -> None:
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if future not in done]
        for future in done:
            error = future.exception()
            if isinstance(error, UserError):
                raise error
            if error is not None:
                what = f"the metrics in {self._workdir}"
                raise errors.storage_error(error, what) or UserError(f"{what}: {error}") from error


def _kept_lines(file: epath.Path, resume_step: int) -> list[str]:
    """The complete lines up to `resume_step`; a killed run may leave later or partial lines."""
    log = project_files.Log(file, project_files.METRICS)
    if log.damaged:
        copy = log.keep_damaged()
        logging.error("%d line(s) of %s are damaged and left out; see %s", log.damaged, file, copy)
    return [json.dumps(line) + "\n" for line in log.lines if line["step"] <= resume_step]


def _point(line: str) -> str:
    """A line without its time, for comparison with lines of the same step."""
    point = json.loads(line)
    point.pop("wall_time", None)
    return json.dumps(point)


def _open_events(folder: str, restart_step: int | None) -> Any:
    """A writer of an event file; points from `restart_step` on in earlier files are void."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # silences a message at start-up
    try:
        from clu import metric_writers
    except ImportError:
        logging.info("TensorFlow is not installed; event files by TensorBoard's own writer.")
        return _TensorBoardWriter(folder, restart_step)
    if restart_step is not None:  # in a file of its own, as CLU cannot write it
        _TensorBoardWriter(folder, restart_step).close()
    return metric_writers.SummaryWriter(folder)


class _Uploader:
    """A CLU-like writer to a local folder whose files are copied to object storage."""

    def __init__(self, folder: pathlib.Path, target: epath.Path, events: Any):
        self._folder = folder
        self._target = target
        self._events = events
        self._sizes: dict[str, int] = {}  # of the files copied so far, which only grow
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
                with errors.naming(self._target / file.name):
                    (self._target / file.name).write_bytes(data)
                self._sizes[file.name] = len(data)
        self._copied = time.monotonic()


class _TensorBoardWriter:
    """A CLU-like writer, as far as needed here, without TensorFlow.

    TensorBoard's own `EventFileWriter` writes on a thread that dies with a traceback when the disk
    is full; here the calling thread writes, and raises.
    """

    def __init__(self, workdir: str, restart_step: int | None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        process = f"{socket.gethostname()}.{os.getpid()}.{next(_EVENT_FILES)}"
        self._path = folder / f"events.out.tfevents.{int(time.time()):010}.{process}"
        with errors.naming(self._path):
            self._file = RecordWriter(self._path.open("wb"))
        self._write(file_version="brain.Event:2")
        # TensorBoard takes the first one that it reads for the beginning of the run.
        for _ in range(2 if restart_step is not None else 0):
            self._write(step=restart_step, session_log=SessionLog(status=SessionLog.START))

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for name, value in values.items():
            self._write(step=step, summary=scalar_pb(name, value))

    def write_texts(self, step: int, values: Mapping[str, str]) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        for name, text in values.items():
            self._write(step=step, summary=text_pb(name, text))

    def _write(self, **content: Any) -> None:
        with errors.naming(self._path):
            self._file.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._file.flush()

    def flush(self) -> None:
        pass  # every event is flushed

    def close(self) -> None:
        with errors.naming(self._path):
            self._file.close()


class _WandbWriter:
    """A CLU-like writer to one run of Weights & Biases.

    The run's id is kept in the workdir, so that a restart continues the same run. wandb itself
    finds the API key in the environment or ~/.netrc; WANDB_MODE=offline keeps everything on disk.
    """

    def __init__(self, workdir: str, project: str, config: Mapping[str, Any]):
        import wandb

        file = epath.Path(workdir) / "wandb_run_id.txt"
        if not file.exists():
            storage.write_whole(file, uuid.uuid4().hex)
        folder = None if storage.is_remote(workdir) else workdir

        def start(mode: str | None = None) -> Any:
            return wandb.init(
                project=project,
                id=file.read_text().strip(),
                name=file.parent.name,
                dir=folder,
                config=dict(config),
                mode=mode,
                resume="allow",
                # Terminal output and the state of the repository are private.
                settings=wandb.Settings(console="off", disable_git=True, save_code=False),
            )

        try:
            self._run = start()
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(
                f"config.train.wandb_project is {project!r} and Weights & Biases refuses: {error}; "
                "run `wandb login`, set WANDB_MODE=offline, or set the field to ''"
            ) from error
        except wandb.errors.CommError as error:  # not worth ending a run for
            logging.warning(
                "Weights & Biases cannot be reached, and is written to %s/wandb until the next "
                "start; `wandb sync` uploads it: %s", folder or ".", error
            )  # fmt: skip
            wandb.teardown()  # or the service would keep the run's id
            self._run = start("offline")
        # wandb's own step counter only increases, but a resumed run logs some steps again.
        self._run.define_metric("*", step_metric="step")
        self._html = wandb.Html

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def write_texts(self, step: int, values: Mapping[str, str]) -> None:
        pages = {k: self._html(f"<pre>{html.escape(text)}</pre>") for k, text in values.items()}
        self._run.log({"step": step, **pages})

    def flush(self) -> None:
        pass  # wandb sends from a process of its own

    def close(self) -> None:
        self._run.finish()
