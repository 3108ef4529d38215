"""How a run is going: told to the user, written to the metrics, and checked."""

import collections
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spectral_pod.analysis import flops
from spectral_pod.config import row_len
from spectral_pod.errors import NonFiniteError
from spectral_pod.parallel import runtime
from spectral_pod.parallel.runtime import say
from spectral_pod.train.metrics import derived, summary
from spectral_pod.train.sources import Sources
from spectral_pod.train.state import TrainState
from spectral_pod.train.system import usage
from spectral_pod.train.writers import MetricWriter

_HOSTS = 64  # whose times are written one by one; of more only the slowest


class BadStepError(Exception):
    """A step that `train.on_bad_step` has rolled back: its update was not taken."""

    def __init__(self, step: int, why: str):
        super().__init__(f"step {step}: {why}")
        self.step = step


class Progress:
    """Reads each step's metrics one step late, checks and writes them, and tells how far we are."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        mesh: Mesh,
        abstract: TrainState,
        sources: Sources,
        writer: MetricWriter,
        first_step: int,
    ):
        self._config, self._workdir, self._writer = config, workdir, writer
        self._objective = sources.objective.name
        self._pending: tuple[int, Any] | None = None
        self._averages: Any = None
        self._spent: dict[str, float] = collections.defaultdict(float)
        self._goodput = Goodput(writer.last_line, psutil.Process().create_time())
        self._host_seconds: list[float] = []  # of each step of the window, before its dispatch
        self._since_step = 0.0
        self._window_start, self._window_first = time.time(), first_step
        self._first_step, self._num_timed, self._seconds_timed = first_step, 0, 0.0
        self._bytes_a_step = config.train.global_batch_size * row_len(config)
        peak = flops.peak_flops(mesh.devices.flat[0])
        self._peak = peak * mesh.size if peak else None
        self._model_flops = (
            flops.train_flops(config, abstract.params, sources.num_classes, sources.vocab_size)
            if self._peak
            else 0.0
        )

    @contextlib.contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Counts the time spent in `phase` towards the split of the current window."""
        start = time.time()
        yield
        self._spent[phase] += time.time() - start
        self._goodput.add(phase, time.time() - start)

    @contextlib.contextmanager
    def time_step(self) -> Iterator[None]:
        """As `time("step")`; what came since the step before is this host's own time, during which
        it may have kept the others waiting."""
        if self._since_step:
            self._host_seconds.append(time.time() - self._since_step)
        with self.time("step"):
            yield
        self._since_step = time.time()

    def no_host_time(self) -> None:
        """What came since the last step was the run's, not this host's: an evaluation, a save."""
        self._since_step = 0.0

    def add(self, step: int, metrics: Any) -> None:
        """Hands over a step's metrics, still being computed, and reads those of the step before."""
        before, self._pending = self._pending, (step, metrics)
        if before is not None:
            self._read(*before)

    def settle(self) -> None:
        """Reads what is pending."""
        if self._pending is not None:
            before, self._pending = self._pending, None
            with self.time("step"):
                self._read(*before)

    def bytes_per_second(self) -> float:
        """Bytes trained on per second of data wait and step, compilation left out."""
        return self._num_timed * self._bytes_a_step / max(self._seconds_timed, 1e-9)

    def report_eval(self, split: str, step: int, result: Mapping[str, Any]) -> None:
        values = derived(self._objective, result)
        scalars = {f"{split}/{name}": x for name, x in values.items()}
        say(f"step {step} {eval_line(split, self._objective, result)}")
        for held, part in result.get("sets", {}).items():
            values = derived(self._objective, part)
            scalars |= {f"{split}/{held}/{name}": x for name, x in values.items()}
            say(f"step {step} {eval_line(f'{split}, {held}', self._objective, part)}")
        self._writer.scalars(step, scalars)

    def _read(self, step: int, metrics: Any) -> None:
        averages, scalars = jax.device_get(metrics)
        if scalars.get("bad_steps", 0):
            self._bad(step, averages, scalars)
        else:
            _check_finite(step, averages, scalars)
            self._averages = averages if self._averages is None else self._averages.merge(averages)
        first = step == self._first_step + 1  # the user sees at once that it runs
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
        say(f"step {step}: {what}; its update is skipped")

    def restart(self, step: int) -> None:
        """Counts anew from `step`, with what comes then; what is pending was in vain."""
        self._pending, self._averages = None, None
        self._spent = collections.defaultdict(float)
        self._window_start, self._window_first = time.time(), step
        self.no_host_time()

    def _report(self, step: int, scalars: dict[str, Any], ends: bool) -> None:
        if self._averages is None:  # every step of the window was bad
            return
        now = time.time()
        elapsed, num_steps = now - self._window_start, step - self._window_first
        means = derived(self._objective, {k: float(v) for k, v in self._averages.compute().items()})
        busy = max(self._spent["data"] + self._spent["step"], 1e-9)
        self._num_timed += num_steps
        self._seconds_timed += busy
        rate = self._bytes_a_step * num_steps / busy
        values = {f"train/{name}": value for name, value in means.items()}
        values |= {name: float(value) for name, value in scalars.items()}
        values |= {"speed/steps_per_second": num_steps / busy, "speed/bytes_per_second": rate}
        values |= {f"time/{phase}": spent / elapsed for phase, spent in self._spent.items()}
        if self._peak is not None:
            values["speed/model_flops_utilisation"] = (
                self._model_flops * num_steps / busy / self._peak
            )
        if ends:
            values |= (
                self._goodput.scalars()
                | self._hosts()
                | usage(self._workdir, self._config.data.dir)
            )
            self._writer.scalars(step, values)
            self._averages = None
        left = (self._config.train.total_steps - step) * elapsed / num_steps
        say(
            f"step {step}/{self._config.train.total_steps}  {summary(self._objective, means)}  "
            f"{rate / 1e3:.1f} kB/s  ETA {int(left // 60)}:{int(left % 60):02d}"
        )
        self._spent = collections.defaultdict(float)
        self._window_start, self._window_first = now, step

    def _hosts(self) -> dict[str, float]:
        """Each host's own seconds a step, median and 99th percentile; of the others as told last.

        A collective makes all hosts equally slow; who is to blame shows in the time before it.
        Nothing is said before all have told: the slowest host is the last to do so.
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
        hosts = {i: json.loads(told) for i, told in runtime.shared("host_seconds").items()}
        if len(hosts) < runtime.num_processes():
            return {}
        slowest = max(hosts, key=lambda i: hosts[i][0])
        values = {"host/slowest": float(slowest), "host/slowest_seconds": hosts[slowest][0]}
        for i in hosts if len(hosts) <= _HOSTS else (slowest,):
            values |= {f"host/{i}/p50_seconds": hosts[i][0], f"host/{i}/p99_seconds": hosts[i][1]}
        return values


class Goodput:
    """Which part of all time since the first start of a run went into steps that count.

    Continues from what the last line of the metrics that still counts says: what came after it and
    before this start, steps done twice and the time between, is `restart`.
    """

    def __init__(self, last_line: Mapping[str, float], started: float):
        self._seconds: dict[str, float] = collections.defaultdict(float)
        for name, value in last_line.items():
            if name.startswith("goodput/") and name.endswith("_seconds"):
                self._seconds[name.removeprefix("goodput/").removesuffix("_seconds")] = value
        if "wall_time" in last_line:
            self._seconds["restart"] += max(0.0, started - last_line["wall_time"])
        self._before = sum(self._seconds.values())
        self._seconds.pop("other", None)
        self._started = started

    def add(self, cause: str, seconds: float) -> None:
        self._seconds[cause] += seconds

    def scalars(self) -> dict[str, float]:
        """`goodput/fraction`, and the seconds by cause; what no cause has is `other`."""
        total = self._before + time.time() - self._started
        values = {f"goodput/{cause}_seconds": x for cause, x in self._seconds.items()}
        values["goodput/other_seconds"] = max(0.0, total - sum(self._seconds.values()))
        return values | {"goodput/fraction": self._seconds["step"] / max(total, 1e-9)}


def eval_line(split: str, objective: str, result: Mapping[str, Any]) -> str:
    """An evaluation's result in a line."""
    counted = "records" if "records" in result else "positions"
    on = f"on {result[counted]:,} {counted}"
    return f"{split}: {summary(objective, derived(objective, result))}  {on}"


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
