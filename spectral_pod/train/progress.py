"""How a run is going: told to the user, written to the metrics, and checked."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spectral_pod.analysis import flops
from spectral_pod.config import row_len
from spectral_pod.errors import NonFiniteError
from spectral_pod.parallel.runtime import say
from spectral_pod.train.metrics import derived, summary
from spectral_pod.train.sources import Sources
from spectral_pod.train.state import TrainState
from spectral_pod.train.writers import MetricWriter


class Progress:
    """Reads each step's metrics one step late, checks and writes them, and tells how far we are."""

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        abstract: TrainState,
        sources: Sources,
        writer: MetricWriter,
        first_step: int,
    ):
        self._config, self._writer, self._objective = config, writer, sources.objective
        self._pending: tuple[int, Any] | None = None
        self._averages: Any = None
        self._spent: dict[str, float] = collections.defaultdict(float)
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
        _check_finite(step, averages, scalars)
        self._averages = averages if self._averages is None else self._averages.merge(averages)
        first = step == self._first_step + 1
        # A window ends at every checkpoint too: a run that resumes there writes the same windows.
        every = (self._config.train.log_every_steps, self._config.checkpoint.every_steps)
        ends = step == 1 or any(step % n == 0 for n in every)
        if first or ends:
            self._report(step, scalars, first, ends)

    def _report(self, step: int, scalars: dict[str, Any], first: bool, ends: bool) -> None:
        now = time.time()
        elapsed, num_steps = now - self._window_start, step - self._window_first
        means = derived(self._objective, {k: float(v) for k, v in self._averages.compute().items()})
        busy = max(self._spent["data"] + self._spent["step"], 1e-9)
        if not first:  # the first step compiles
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
            self._writer.scalars(step, values)
            self._averages = None
        left = (self._config.train.total_steps - step) * elapsed / num_steps
        eta = "compiling" if first else f"{int(left // 60)}:{int(left % 60):02d}"
        say(
            f"step {step}/{self._config.train.total_steps}  {summary(self._objective, means)}  "
            f"{rate / 1e3:.1f} kB/s  ETA {eta}"
        )
        self._spent = collections.defaultdict(float)
        self._window_start, self._window_first = now, step


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
