"""Writers of metrics: `metrics.jsonl`, TensorBoard event files, and optionally Weights & Biases.

The lines are written at once; a thread of their own writes the event files and to Weights & Biases,
which take a second to import while the first step compiles.

Objects in storage cannot be appended to. For a gs:// workdir, files are therefore written locally
and then copied.
"""

import html
import importlib.util
import json
import os
import pathlib
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Self

import numpy as np
from absl import logging
from etils import epath

from spectral_pod import errors, project_files, storage
from spectral_pod.errors import UserError
from spectral_pod.train.event_files import EventFiles, split_name

_COPY_SECONDS = 30.0  # between copies to storage, if none is requested


class MetricWriter:
    """Scalars and texts of one run; only the leader process writes."""

    def __init__(
        self,
        workdir: str,
        *,
        is_leader: bool,
        resume_step: int,
        descriptions: Mapping[str, str] | None = None,
        wandb_project: str = "",
        run_config: Mapping[str, Any] | None = None,
    ):
        """Continues the records in `workdir` after `resume_step`, dropping later ones.

        Args:
          workdir: the run's folder or gs:// URL.
          is_leader: whether this process writes; the others do nothing.
          resume_step: the step from which the run continues.
          descriptions: of the metrics of the objective, by their names without a split.
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
            found = _sound_lines(lines)
            is_continued = lines.exists()
            has_events = any((epath.Path(workdir) / "train").glob("events.out.tfevents.*"))
        kept = [json.dumps(line) + "\n" for line in found if line["step"] <= resume_step]
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
        runs = {split_name(name)[0] for line in found for name in line}
        # Older versions had one event file for all splits; their curves are drawn again.
        drawn = [] if has_events else list(map(json.loads, kept))

        def open_writers() -> list[Any]:
            runs_inside = sorted(filter(storage.stays_inside, {"train", *runs}))
            events = EventFiles(folder, descriptions or {}, restart_step, runs_inside)
            for line in drawn:
                step, seconds = int(line.pop("step")), line.pop("wall_time", 0.0)
                events.write_scalars(step, line, seconds)
            target = epath.Path(workdir)
            opened: list[Any] = [_Uploader(folder, target, events) if remote else events]
            if wandb_project:
                opened.append(_WandbWriter(workdir, wandb_project, run_config or {}))
            return opened

        self._writers = self._thread.submit(open_writers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line with the values and the time to `metrics.jsonl`; writes event files."""
        if self._writers is None:
            return
        seconds = round(time.time(), 3)  # since 1970
        point = {"step": step} | {k: float(v) for k, v in values.items()}
        line = json.dumps(point | {"wall_time": seconds}) + "\n"
        if _point(line) not in self._kept:  # a finished run that is restarted evaluates again
            with errors.naming(self._jsonl), open(self._jsonl, "a") as file:
                file.write(line)
        self._submit(lambda writer: writer.write_scalars(step, dict(values), seconds))

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Writes Markdown texts, for TensorBoard's text page."""
        self._submit(lambda writer: writer.write_texts(step, dict(values)))

    def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 [height, width, 3]."""
        self._submit(lambda writer: writer.write_images(step, dict(values)))

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


def _sound_lines(file: epath.Path) -> list[dict[str, float]]:
    """The complete lines of a file, which may be missing; a killed run may leave partial ones."""
    log = project_files.Log(file, project_files.METRICS)
    if log.damaged:
        copy = log.keep_damaged()
        logging.error("%d line(s) of %s are damaged and left out; see %s", log.damaged, file, copy)
    return log.lines


def _point(line: str) -> str:
    """A line without times, for comparison with lines of the same step."""
    of_time = ("wall_time", "goodput/")
    return json.dumps({k: x for k, x in json.loads(line).items() if not k.startswith(of_time)})


class _Uploader:
    """Event files and lines in a local folder, which are copied to object storage."""

    def __init__(self, folder: pathlib.Path, target: epath.Path, events: EventFiles):
        self._folder = folder
        self._target = target
        self._events = events
        self._sizes: dict[pathlib.Path, int] = {}  # of the files copied so far, which only grow
        self._copied = time.monotonic()

    def write_scalars(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        self._events.write_scalars(step, values, seconds)
        if time.monotonic() - self._copied > _COPY_SECONDS:
            self.flush()

    def write_texts(self, step: int, values: Mapping[str, str]) -> None:
        self._events.write_texts(step, values)

    def write_images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        self._events.write_images(step, values)

    def flush(self) -> None:
        self._events.flush()
        self._copy()

    def close(self) -> None:
        self._events.close()
        self._copy()

    def _copy(self) -> None:
        for file in filter(pathlib.Path.is_file, self._folder.rglob("*")):
            data = file.read_bytes()
            if self._sizes.get(file) != len(data):
                target = self._target / file.relative_to(self._folder).as_posix()
                with errors.naming(target):
                    target.write_bytes(data)
                self._sizes[file] = len(data)
        self._copied = time.monotonic()


class _WandbWriter:
    """A writer to one run of Weights & Biases.

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
        self._html, self._image = wandb.Html, wandb.Image

    def write_scalars(self, step: int, values: Mapping[str, float], _: float) -> None:
        self._run.log({"step": step, **values})

    def write_texts(self, step: int, values: Mapping[str, str]) -> None:
        pages = {k: self._html(f"<pre>{html.escape(text)}</pre>") for k, text in values.items()}
        self._run.log({"step": step, **pages})

    def write_images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        self._run.log({"step": step} | {k: self._image(pixels) for k, pixels in values.items()})

    def flush(self) -> None:
        pass  # wandb sends from a process of its own

    def close(self) -> None:
        self._run.finish()
