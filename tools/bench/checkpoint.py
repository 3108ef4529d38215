"""Sealed checkpoints: how long a save blocks training, and how long a save and a restore take.

The state is 1 GB (10^9 bytes) of float32 in 32 arrays, in a temporary folder (below $TMPDIR). Times
are wall times, as disks use no CPU time. The baseline writes the same arrays with numpy.save and
fsync, without shards, seals or checks. Group: checkpoint.

`checkpoint_blocks_of_save` is the share of a save for which `save` blocks the training loop.
`checkpoint_delays_of_save` includes the slowdown of the next step: arrays of CPU devices are in
host memory already and are not copied in `save`, so a step that overwrites them copies them first.
Use two cores, one to write and one to train, and the glibc settings of launch/local.sh; otherwise
the first use of fresh memory dominates:

    export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
    python -m tools.bench checkpoint --cores=2
"""

import functools
import itertools
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from spectral_pod.train.checkpoint import Checkpointer

from .settings import Settings
from .timing import (
    Case,
    Comparison,
    Group,
    Ratio,
    Row,
    Seconds,
    timed,
    times_faster,
)

CLOCK = "wall"


def groups(settings: Settings) -> list[Group]:
    shape = (4, 8) if settings.quick else (3125, 2500)
    return [Group("checkpoint", 1, functools.partial(_checkpoint, settings, shape))]


def _checkpoint(settings: Settings, shape: tuple[int, int]) -> Comparison:
    arrays = 32
    keys = jax.random.split(jax.random.key(0), arrays)
    training = _Training(
        {f"array_{i}": jax.random.normal(key, shape) for i, key in enumerate(keys)}
    )
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), training.state
    )
    folder = settings.stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-checkpoint-"))
    checkpointer = settings.stack.enter_context(
        Checkpointer(f"{folder}/checkpoints", keep_latest=1, keep_best=0)
    )
    steps = itertools.count(1)

    def save() -> None:
        checkpointer.save(next(steps), training.state, None)

    def save_and_wait() -> None:
        save()
        checkpointer.wait_until_finished()

    def save_and_step() -> Any:
        save()
        return training.step()

    def then_wait(fn: Any) -> Seconds:
        seconds = timed(fn)
        checkpointer.wait_until_finished()
        return seconds

    def numpy_save() -> None:
        for name, value in training.state.items():
            with open(f"{folder}/{name}.npy", "wb") as file:
                np.save(file, np.asarray(value))
                file.flush()
                os.fsync(file.fileno())

    megabytes = {"MB": arrays * 4e-6 * shape[0] * shape[1]}
    text = f"{arrays} float32 {list(shape)}"
    restore = functools.partial(timed, checkpointer.restore, abstract)
    cases = [
        Case("step", "overwrites the values", text, functools.partial(timed, training.step)),
        Case(
            "save_blocks", "until save returns and training continues", text,
            functools.partial(then_wait, save), "save",
        ),
        Case(
            "save_and_step", "until the step after a save is done", text,
            functools.partial(then_wait, save_and_step),
        ),
        Case(
            "save", "until it is on disk, hashed and sealed", text,
            functools.partial(timed, save_and_wait), "numpy_save", work=megabytes,
        ),
        Case("restore", "the newest sound step, hashed", text, restore, work=megabytes),
        Case(
            "numpy_save", "the same arrays by numpy.save and fsync", text,
            functools.partial(timed, numpy_save), work=megabytes,
        ),
    ]  # fmt: skip
    return Comparison(
        cases,
        [
            times_faster("checkpoint_blocks_of_save", "save", "save_blocks", "<= 0.05"),
            Ratio("checkpoint_delays_of_save", _delays),
            times_faster("checkpoint_save_vs_numpy", "save", "numpy_save"),
        ],
    )


class _Training:
    """A state, and the least that a training step does to it: it overwrites every value."""

    def __init__(self, state: Any):
        self.state = state
        shrink = lambda state: jax.tree.map(lambda x: 0.999 * x, state)  # noqa: E731
        self._update = jax.jit(shrink, donate_argnums=0)

    def step(self) -> Any:
        self.state = self._update(self.state)
        return self.state


def _delays(rows: Mapping[str, Row]) -> float:
    """The time that a save adds to the step after it, blocking included, relative to the save."""
    return (rows["save_and_step"].ms - rows["step"].ms) / rows["save"].ms
