"""The progress of a run: printed, written to the metrics, and checked.

A line of the metrics describes the steps since the last line: what is trained, and

    speed/            by the time of steps and of waiting for data
    time_share/PHASE  the share of all time in a phase, such as data, step or eval; each is in
                      [0, 1]. What their sum lacks of 1 is the time outside of them. A step lasts
                      until its metrics are read, not only until it is dispatched
    host/             each host's own time between steps

and, since the first start of the run, `goodput/fraction` and the seconds by cause (`goodput.py`).
The first line is of the first step alone: it begins after compilation, and ends when that step is
computed, before anything is done for the second one. It has no speed: devices load a program when
it first runs.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spectral_pod.analysis import flops
from spectral_pod.config import Config, row_len
from spectral_pod.errors import NonFiniteError
from spectral_pod.objectives import computed
from spectral_pod.parallel import runtime
from spectral_pod.parallel.runtime import print_once
from spectral_pod.train import system
from spectral_pod.train.goodput import Goodput, Stopwatch
from spectral_pod.train.sources import Sources
from spectral_pod.train.state import TrainState
from spectral_pod.train.writers import MetricWriter

_HOSTS = 64  # up to which the times of all hosts are written; of more, only the slowest


class BadStepError(Exception):
    """A bad step, which `train.on_bad_step` asks to roll back."""

    def __init__(self, step: int, why: str):
        super().__init__(f"step {step}: {why}")
        self.step = step


class Progress:
    """Reads each step's metrics one step late, checks and writes them, and prints the progress."""

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: Mesh,
        abstract: TrainState,
        sources: Sources,
        writer: MetricWriter,
        first_step: int,
        window: Mapping[str, list[float]],
        stopwatch: Stopwatch,
        ended: bool = False,
    ):
        """Continues after `first_step`; `window` is what `window` gave when that step was saved.

        `ended` says whether the run had come to its end there.
        """
        self._config, self._workdir, self._writer = config, workdir, writer
        self._objective = sources.objective
        self._pending: tuple[int, Any] | None = None
        self._averages: Any = None  # of the window: the steps since the last line of metrics
        self._saved_window = dict(window)  # until the first step shows its structure
        self._stopwatch, self._goodput = stopwatch, Goodput(writer.last_line, stopwatch, ended)
        self._counted: dict[str, float] = {}  # by the stopwatch, when the window began
        self._host_seconds: list[float] = []  # of each step of the window, before its dispatch
        self._since_step = 0.0  # time of the last step's end; 0: not to be counted from
        self._first_step, self._num_timed, self._seconds_timed = first_step, 0, 0.0
        self.restart_timers(first_step)
        self._bytes_a_step = config.train.global_batch_size * row_len(config)
        peak = flops.peak_flops(mesh.devices.flat[0])
        self._peak = peak * mesh.size if peak else None
        self._model_flops = (
            flops.train_flops(config, abstract.params, sources.num_classes, sources.vocab_size)
            if self._peak
            else 0.0
        )

    @contextlib.contextmanager
    def time_step(self) -> Iterator[None]:
        """Counts the time of a step; that since the step before counts as this host's own, in
        which the other hosts may have waited for it."""
        if self._since_step:
            self._host_seconds.append(self._stopwatch.count() - self._since_step)
        with self._stopwatch.time("step"):
            yield
        self._since_step = self._stopwatch.count()

    def reset_host_timer(self) -> None:
        """The time since the last step is not this host's own: all hosts evaluate or save."""
        self._since_step = 0.0

    def add(self, step: int, metrics: Any) -> None:
        """Takes a step's metrics, which are still being computed, and reads those of the step
        before; of the first step at once, whose time would include work for the second one."""
        before, self._pending = self._pending, (step, metrics)
        if before is not None:
            self._read(*before)
        elif step == self._first_step + 1:
            self.flush_pending()

    def flush_pending(self) -> None:
        """Reads the metrics of the last step, if that is still to be done."""
        if self._pending is not None:
            before, self._pending = self._pending, None
            with self._stopwatch.time("step"):
                self._read(*before)

    def bytes_per_second(self) -> float:
        """Bytes trained on per second, of the time of steps and of waiting for data."""
        return self._num_timed * self._bytes_a_step / max(self._seconds_timed, 1e-9)

    def report_eval(self, split: str, step: int, evaluation: Mapping[str, Any]) -> None:
        """Prints and writes an evaluation and that of each of its sets, and the time up to it."""
        objective = self._objective
        scalars: dict[str, float] = {}
        sets = evaluation.get("sets", {})
        for name, values in {"": evaluation, **sets}.items():
            line = objective.eval_line(f"{split}, {name}" if name else split, values)
            print_once(f"step {step} {line}")
            tag = f"{split}/{name}" if name else split
            scalars |= {f"{tag}/{metric}": x for metric, x in objective.scalars(values).items()}
        self._writer.scalars(step, scalars | self._goodput.scalars())

    def _read(self, step: int, metrics: Any) -> None:
        averages, scalars = jax.device_get(metrics)
        if self._saved_window:
            self._averages, self._saved_window = _like(averages, self._saved_window), {}
        if scalars.get("bad_steps", 0):
            self._bad(step, averages, scalars)
        else:
            _check_finite(step, averages, scalars)
            self._averages = averages if self._averages is None else self._averages.merge(averages)
        first = step == self._first_step + 1  # shows at once that the run works
        # A window ends at every checkpoint too: a run that resumes there writes the same windows.
        every = (self._config.train.log_every_steps, self._config.checkpoint.every_steps)
        ends = step == 1 or any(step % n == 0 for n in every)
        if first or ends:
            self._report(step, scalars, ends)

    def _bad(self, step: int, averages: Any, scalars: Mapping[str, Any]) -> None:
        loss, in_a_row = float(averages.compute()["loss"]), int(scalars["bad_steps"])
        what = f"its loss is {loss:g}, which is a spike, or its gradients are not finite"
        if in_a_row > self._config.train.max_bad_steps:
            raise NonFiniteError(
                f"step {step}: {what}; it is the {in_a_row}th such step in a row, and "
                f"config.train.max_bad_steps is {self._config.train.max_bad_steps}. The newest "
                "sound checkpoint is kept"
            )
        if self._config.train.on_bad_step == "rollback":
            raise BadStepError(step, what)
        self._writer.scalars(step, {"bad_steps": in_a_row})
        print_once(f"step {step}: {what}; its update is skipped")

    def window(self) -> dict[str, list[float]]:
        """The sums of the training metrics since the last line, to be saved with the last step.

        A run that continues from that step then writes the next line as if it had not ended. They
        are flat arrays by name, and exact: Python has the values of float32 and of int32.
        """
        if self._averages is None:
            return self._saved_window
        return {name: np.asarray(x).ravel().tolist() for name, x in _named(self._averages)}

    def restart_timers(self, step: int) -> None:
        """Starts to measure time after `step`."""
        self._start_window(self._stopwatch.count(), step)
        self.reset_host_timer()
        system.restart()

    def restart(self, step: int) -> None:
        """Starts a new window after `step`; drops the metrics that are pending."""
        self._pending, self._averages, self._saved_window = None, None, {}
        self.restart_timers(step)

    def _report(self, step: int, scalars: dict[str, Any], ends: bool) -> None:
        if self._averages is None:  # every step of the window was bad
            return
        now = self._stopwatch.count()  # including the wait for this step, which is going on
        spent = {
            phase: seconds - before
            for phase, seconds in self._stopwatch.seconds.items()
            if seconds > (before := self._counted.get(phase, 0.0))
        }
        elapsed = max(now - self._window_start, 1e-9)
        num_steps = step - self._window_first
        means = computed(self._averages)
        busy = max(spent.get("data", 0.0) + spent.get("step", 0.0), 1e-9)
        self._num_timed += num_steps
        self._seconds_timed += busy
        rate = self._bytes_a_step * num_steps / busy
        values = {f"train/{name}": x for name, x in self._objective.scalars(means).items()}
        values |= {name: float(value) for name, value in scalars.items()}
        values |= {f"time_share/{phase}": x / elapsed for phase, x in spent.items()}
        line = f"step {step}/{self._config.train.total_steps}  {self._objective.line(means)}"
        if step > self._first_step + 1:  # the first one lasts longer than all others
            values |= {"speed/steps_per_second": num_steps / busy, "speed/bytes_per_second": rate}
            if self._peak is not None:
                values["speed/model_flops_utilisation"] = (
                    self._model_flops * num_steps / busy / self._peak
                )
            left = (self._config.train.total_steps - step) * elapsed / num_steps
            line += f"  {rate / 1e3:.1f} kB/s  ETA {int(left // 60)}:{int(left % 60):02d}"
        if ends:
            values |= (
                self._goodput.scalars()
                | self._host_times()
                | system.usage(self._workdir, self._config.data.dir)
            )
            self._writer.scalars(step, values)
            self._averages = None
        print_once(line)
        self._start_window(now, step)

    def _start_window(self, now: float, step: int) -> None:
        self._window_start, self._window_first = now, step
        self._counted = dict(self._stopwatch.seconds)

    def _host_times(self) -> dict[str, float]:
        """Each host's own seconds a step, median and 99th percentile; other hosts' latest values.

        Collectives make all hosts equally slow; the one that delays them shows in the time before.
        Empty until all hosts have shared their times, as the slowest is the last to do so.
        """
        if not self._host_seconds:
            return {}
        mine = np.percentile(self._host_seconds, [50, 99]).tolist()
        self._host_seconds = []
        if runtime.num_processes() == 1:
            return {"host/0/p50_seconds": mine[0], "host/0/p99_seconds": mine[1]}
        runtime.share("host_seconds", json.dumps(mine))
        if not runtime.is_leader():
            return {}
        hosts = {i: json.loads(text) for i, text in runtime.shared("host_seconds").items()}
        if len(hosts) < runtime.num_processes():
            return {}
        slowest = max(hosts, key=lambda i: hosts[i][0])
        values = {"host/slowest": float(slowest), "host/slowest_seconds": hosts[slowest][0]}
        for i in hosts if len(hosts) <= _HOSTS else (slowest,):
            values |= {f"host/{i}/p50_seconds": hosts[i][0], f"host/{i}/p99_seconds": hosts[i][1]}
        return values


def _named(averages: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(averages)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def _like(averages: Any, window: Mapping[str, list[float]]) -> Any | None:
    """The sums of `Progress.window` as metrics with the structure and dtypes of `averages`.

    None if there are none, or if another version saved them of other metrics.
    """
    named = [(name, np.asarray(x)) for name, x in _named(averages)]
    if {name: len(sums) for name, sums in window.items()} != {name: x.size for name, x in named}:
        return None
    try:
        leaves = [np.asarray(window[name], x.dtype).reshape(x.shape) for name, x in named]
    except (ValueError, OverflowError):  # an older seal, which has no checksum, was changed
        return None
    return jax.tree.unflatten(jax.tree.structure(averages), leaves)


def _check_finite(step: int, averages: Any, scalars: Mapping[str, Any]) -> None:
    loss = float(averages.compute()["loss"])
    bad = [name for name, value in scalars.items() if not np.isfinite(value)]
    if np.isfinite(loss) and not bad:
        return
    params = [name.split("/")[1] for name in bad if name.startswith("param_norm/")]
    grads = [name.split("/")[1] for name in bad if name.startswith("grad_norm/")]
    raise NonFiniteError(
        f"step {step}: the loss is {loss}; non-finite gradients in {grads or 'no group'}, "
        f"non-finite parameters in {params or 'no group'}. Nothing of this step was saved; the "
        "newest sound checkpoint is kept. Look at the data of this step, or start again in another "
        "--workdir with lower learning rates or a lower config.optimizer.clip_norm"
    )
