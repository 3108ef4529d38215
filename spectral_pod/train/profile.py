"""Traces for XProf, of planned steps or on request: `touch WORKDIR/PROFILE`.

TensorBoard's profile page (PyPI: xprof) expects a trace at
WORKDIR/plugins/profile/NAME/HOST-PROCESS.xplane.pb. All processes write to the same folder without
communication, as NAME is derived from the planned steps or from the time of the request.
"""

import contextlib
import os
import pathlib
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from absl import logging
from etils import epath

from spectral_pod import storage

REQUEST = "PROFILE"  # a file in the workdir; requests differ by its modification time
_POLL_SECONDS, _POLL_SECONDS_REMOTE = 3.0, 30.0  # all hosts of a pod poll the same object
_REQUESTED_STEPS = 5
_KEPT_POLLS = 4  # polls before a request is deleted, so that every process sees it


class Profiler:
    """Traces this process's host and devices; threads poll for requests and store traces.

    A trace that cannot be taken or stored is logged as a warning and never ends the run.
    """

    def __init__(self, workdir: str, steps: Sequence[int], process_index: int):
        """`steps` are the first and last step of a planned trace, or empty."""
        self._workdir = epath.Path(workdir)
        self._planned = tuple(steps)
        self._process_index = process_index
        self._until: int | None = None  # the last step of the current trace
        self._name = ""  # of the current trace
        self._folder: Any = None  # where the current trace is written until it is stored
        self._storing: Future[None] | None = None
        self._storer = ThreadPoolExecutor(1, "profile")
        self._requested = self._taken = 0  # times of the last request seen and the last one served
        self._closed = threading.Event()
        threading.Thread(target=self._poll, name="profile requests", daemon=True).start()

    def step(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Starts or ends a trace if due before a step; the context annotates the step."""
        # One step late, as the loop reads metrics: only then have the devices finished the last.
        if self._until is not None and step > self._until + 1:
            self._stop()
        if self._until is None and (self._storing is None or self._storing.done()):
            self._start_if_due(step)
        if self._until is None or step > self._until:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def close(self) -> None:
        """Ends the current trace, and waits until it is stored."""
        if self._until is not None:
            self._stop()
        self._closed.set()
        self._storer.shutdown()

    def _start_if_due(self, step: int) -> None:
        if self._planned and self._planned[0] <= step <= self._planned[1]:
            (first, last), self._planned = self._planned, ()
            self._start(f"steps_{first}-{last}", last)
        elif self._requested != self._taken:
            self._taken = self._requested
            name = time.strftime("%Y_%m_%d_%H_%M_%S", time.gmtime(self._taken))
            self._start(name, step + _REQUESTED_STEPS - 1)

    def _start(self, name: str, until: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.session_id = name
        options.python_tracer_level = 0  # would slow down what is measured
        folder = tempfile.TemporaryDirectory(prefix="spectral_pod-")
        try:
            jax.profiler.start_trace(folder.name, profiler_options=options)
        except RuntimeError as error:
            folder.cleanup()
            logging.warning("no trace %s: %s", name, error)
        else:
            self._name, self._folder, self._until = name, folder, until

    def _stop(self) -> None:
        self._storing = self._storer.submit(self._store, self._name, self._folder)
        self._until = None

    def _store(self, name: str, folder: tempfile.TemporaryDirectory[str]) -> None:
        host = f"{socket.gethostname()}-{self._process_index}"
        target = self._workdir / "plugins" / "profile" / name / f"{host}.xplane.pb"
        try:
            with folder:
                jax.profiler.stop_trace()
                (trace,) = pathlib.Path(folder.name).rglob("*.xplane.pb")
                target.parent.mkdir(parents=True, exist_ok=True)
                storage.write_whole(target, trace.read_bytes())
        except (RuntimeError, ValueError, *storage.failures()) as error:
            logging.warning("the trace %s is lost: %s", target, error)
        else:
            logging.info("trace: %s", target)

    def _poll(self) -> None:
        """Records requests; process 0 deletes each once every process has had time to see it."""
        file, noted = self._workdir / REQUEST, 0.0
        remote = storage.is_remote(os.fspath(self._workdir))
        pause = _POLL_SECONDS_REMOTE if remote else _POLL_SECONDS
        while not self._closed.wait(pause):
            try:
                requested = int(storage.modified(file))
                if requested != self._requested:
                    self._requested, noted = requested, time.monotonic()
                elif self._process_index == 0 and time.monotonic() - noted > _KEPT_POLLS * pause:
                    file.unlink()
            except storage.failures():
                continue  # there is no request, or storage does not answer: try again later
