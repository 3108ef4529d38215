"""TensorBoard event files: under which run and tag each metric appears, and what it means.

Every split is a run of TensorBoard, the folder `train`, `validation` or `test` of the workdir, or
`validation/SET` where there are several sets. A metric has the same tag in all of them, so that its
curves share a chart. TensorBoard sorts tags by name, groups them by the part before the first "/",
and opens the first two groups: the names of the groups put what matters most first.

A run that continues from a checkpoint repeats steps whose points are already in event files. The
files of a continued run therefore begin with `SessionLog.START` of its first step: TensorBoard then
drops the points of that step and of later ones in the files before.
"""

import collections
import io
import itertools
import os
import pathlib
import shlex
import socket
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from spectral_pod import errors, storage
from spectral_pod.errors import DataError
from spectral_pod.train.goodput import PHASES

SPLITS = ("train", "validation", "test")
_LAST = "; of the last step before the point"
_EXAMPLES = "The first records of the split, and whether their classes are predicted"
_PROBES = "What layers show of themselves, by step"
_LAYERS = "What layers report, the mean over layers" + _LAST

# By the names in metrics.jsonl, or what they begin with: the names in TensorBoard, and what they
# mean. The metrics of an objective are `metrics/`, and what else layers report is `model/`.
_TAGS = {
    "auxiliary_loss": ("metrics/auxiliary_loss", "What layers add to the loss" + _LAST),
    "bad_steps": ("optimizer/bad_steps", "Bad steps in a row, whose update was skipped"),
    "rollback_to": ("optimizer/rollback_to", "The step restored after a bad step"),
    "learning_rate/": (
        "optimizer/learning_rate/",
        "Learning rate of a group of parameters" + _LAST,
    ),
    "grad_norm/": (
        "optimizer/grad_norm/",
        "Euclidean norm of a module's gradients, before clipping" + _LAST,
    ),
    "param_norm/": ("optimizer/param_norm/", "Euclidean norm of a module's parameters" + _LAST),
    "probes/": (
        "probes/",
        "What a layer shows of itself on the batch of the next step: `layers/probes.py` and "
        "`train/probes.py` say what",
    ),
    "speed/steps_per_second": (
        "speed/steps_per_second",
        "Optimizer steps per second of training: of steps and of waiting for data",
    ),
    "speed/bytes_per_second": (
        "speed/bytes_per_second",
        "Bytes of all batches, with padding, per second of training",
    ),
    "speed/model_flops_utilisation": (
        "speed/model_flops_utilisation",
        "FLOPs of the model, without recomputation, per second of training, as a fraction of the "
        "peak of all devices",
    ),
    "goodput/fraction": (
        "speed/goodput",
        "Fraction of all time since the first start of the run that was spent in steps",
    ),
    **{
        f"goodput/{phase}": (f"time/{phase}", f"Seconds since the first start of the run: {what}")
        for phase, what in PHASES.items()
    },
    "time_share/": ("time_share/", "Share of the time since the last point, in [0, 1]"),
    "host/slowest": ("time_of_hosts/slowest", "The process with the longest median"),
    "host/slowest_seconds": ("time_of_hosts/slowest_seconds", "That longest median"),
    "host/": ("time_of_hosts/", "A process's own seconds between two steps: median, percentile"),
    "system/cpu_percent": (
        "system/cpu_percent",
        "Use of processors by process 0 since the last point; 100 is one busy core",
    ),
    "system/": ("system/", "Memory or free space now, in 10^9 bytes, as process 0 sees it"),
}


class Tag(NamedTuple):
    """Where TensorBoard shows a metric, and a sentence on what it is, or ""."""

    run: str
    name: str
    description: str


def tag_of(name: str, descriptions: Mapping[str, str]) -> Tag:
    """Where TensorBoard shows a metric, by its name in `metrics.jsonl`.

    Args:
      descriptions: of the metrics of the objective, by their names without a split.
    """
    run, metric = split_name(name)
    if name != metric:
        return Tag(run, f"metrics/{metric}", descriptions.get(metric, ""))
    known = max((prefix for prefix in _TAGS if name.startswith(prefix)), key=len, default="")
    if not known:
        return Tag(run, f"model/{name}", _LAYERS)
    tag, description = _TAGS[known]
    return Tag(run, tag + name.removeprefix(known), description)


def split_name(name: str) -> tuple[str, str]:
    """The run of TensorBoard that a name belongs to, and the name within it."""
    split, *sets, last = name.split("/") if "/" in name else ("", name)
    return ("/".join((split, *sets)), last) if split in SPLITS else ("train", name)


def how_to_view(workdir: str) -> str:
    """The command that opens TensorBoard; in a container, which ends, also one for elsewhere."""
    script = os.path.join(os.path.dirname(sys.executable), "tensorboard")
    if os.path.exists(script):
        below = os.path.relpath(script)
        command = [script if below.startswith(os.pardir) else below]
    else:
        command = [sys.executable, "-m", "tensorboard.main"]
    # Its fast loader finds fewer kinds of credentials for gs://.
    flags = [f"--logdir={workdir}", *(["--load_fast=false"] if storage.is_remote(workdir) else [])]
    here = shlex.join([*command, *flags])
    marks = os.path.exists("/.dockerenv"), os.path.exists("/run/.containerenv")
    if not (any(marks) or "KUBERNETES_SERVICE_HOST" in os.environ):
        return here
    elsewhere = shlex.join(["tensorboard", *flags])
    return f"{here}\n  outside of this container, after pip install tensorboard gcsfs: {elsewhere}"


class EventFiles:
    """The event files of all runs of a workdir."""

    def __init__(
        self,
        folder: pathlib.Path,
        descriptions: Mapping[str, str],
        restart_step: int | None = None,
        runs: Collection[str] = ("train",),
    ):
        """Opens files of new names.

        Args:
          folder: a local folder.
          descriptions: of the metrics of the objective.
          restart_step: points of earlier files are void from this step on; None if there are none.
          runs: those that may have such points.
        """
        self._folder, self._descriptions, self._restart_step = folder, descriptions, restart_step
        self._files: dict[str, _EventFile] = {}
        for run in runs:
            self._file(run)

    def write_scalars(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Writes points at a step; `seconds` is the time that they are of, since 1970."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        summaries: dict[str, Any] = collections.defaultdict(Summary)
        for name, value in values.items():
            run, tag, description = tag_of(name, self._descriptions)
            summaries[run].MergeFrom(scalar_pb(tag, value, description))
        for run, summary in summaries.items():
            self._file(run).write(seconds, step=step, summary=summary)

    def write_texts(self, step: int, values: Mapping[str, str]) -> None:
        """Writes Markdown texts."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        for name, text in values.items():
            run, tag = split_name(name)
            self._file(run).write(time.time(), step=step, summary=text_pb(tag, text))

    def write_images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 [height, width, 3]."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.image import metadata
        from tensorboard.util import tensor_util

        for name, pixels in values.items():
            run, tag = split_name(name)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG", optimize=True)
            height, width = pixels.shape[:2]
            content = [str(width).encode(), str(height).encode(), png.getvalue()]
            about = _PROBES if tag.startswith("probes/") else _EXAMPLES
            summary = Summary()
            summary.value.add(
                tag=f"pictures/{tag}",  # a group of their own, behind the curves that matter most
                tensor=tensor_util.make_tensor_proto(content),
                metadata=metadata.create_summary_metadata(display_name=None, description=about),
            )
            self._file(run).write(time.time(), step=step, summary=summary)

    def flush(self) -> None:
        """Does nothing: every event is flushed."""

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _file(self, run: str) -> "_EventFile":
        if run not in self._files:
            if not storage.stays_inside(run):
                raise DataError(f"{run!r} is no name of a set of data; rename its folder")
            self._files[run] = _EventFile(self._folder / run, self._restart_step)
        return self._files[run]


_NUMBERS = itertools.count()  # of the event files of this process


class _EventFile:
    """One file. TensorFlow's writers take seconds to import; TensorBoard's own `EventFileWriter`
    writes on a thread that dies with a traceback when the disk is full. Here the calling thread
    writes, and raises.
    """

    def __init__(self, folder: pathlib.Path, restart_step: int | None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        process = f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._path = folder / f"events.out.tfevents.{int(time.time()):010}.{process}"
        with errors.naming(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(self._path.open("wb"))
        self.write(time.time(), file_version="brain.Event:2")
        # TensorBoard takes the first one that it reads for the beginning of the run.
        for _ in range(2 if restart_step is not None else 0):
            start = SessionLog(status=SessionLog.START)
            self.write(time.time(), step=restart_step, session_log=start)

    def write(self, seconds: float, **content: Any) -> None:
        with errors.naming(self._path):
            self._file.write(self._event(wall_time=seconds, **content).SerializeToString())
            self._file.flush()

    def close(self) -> None:
        with errors.naming(self._path):
            self._file.close()
