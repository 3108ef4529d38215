"""Sealed checkpoints: how long a save stops a run, how long it takes, and a restore.

The state is 256 MiB of random float32 in 32 arrays, in a temporary folder ($TMPDIR decides where).
By wall time, as disks take no CPU time; the baseline writes the same arrays with numpy.save and
fsync, which seals, shards and checks nothing. Group: checkpoint.
"""

import functools
import itertools
import os
import tempfile

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from spectral_pod.train.checkpoint import Checkpointer
from tools.bench.settings import Settings
from tools.bench.timing import Case, Comparison, Group, Seconds, timed, times_faster

CLOCK = "wall"


def groups(settings: Settings) -> list[Group]:
    shape = (4, 8) if settings.quick else (1024, 2048)
    return [Group("checkpoint", 1, functools.partial(_checkpoint, settings, shape))]


def _checkpoint(settings: Settings, shape: tuple[int, int]) -> Comparison:
    arrays = 32
    keys = jax.random.split(jax.random.key(0), arrays)
    state = {f"array_{i}": jax.random.normal(key, shape) for i, key in enumerate(keys)}
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    folder = settings.stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-checkpoint-"))
    checkpointer = settings.stack.enter_context(
        Checkpointer(f"{folder}/checkpoints", keep_latest=1, keep_best=0)
    )
    steps = itertools.count(1)

    def save_and_wait() -> None:
        checkpointer.save(next(steps), state, None)
        checkpointer.wait_until_finished()

    def blocked() -> Seconds:
        seconds = timed(checkpointer.save, next(steps), state, None)
        checkpointer.wait_until_finished()
        return seconds

    def numpy_save() -> None:
        for name, value in state.items():
            with open(f"{folder}/{name}.npy", "wb") as file:
                np.save(file, np.asarray(value))
                file.flush()
                os.fsync(file.fileno())

    megabytes = {"MB": arrays * 4e-6 * shape[0] * shape[1]}
    text = f"{arrays} float32 {list(shape)}"
    restore = functools.partial(timed, checkpointer.restore, abstract)
    write = functools.partial(timed, numpy_save)
    cases = [
        Case("save_blocks", "until save returns and the run goes on", text, blocked, "save"),
        Case(
            "save", "until it is on disk, hashed and sealed", text,
            functools.partial(timed, save_and_wait), "numpy_save", work=megabytes,
        ),
        Case("restore", "the newest sound step, hashed", text, restore, work=megabytes),
        Case("numpy_save", "the same arrays by numpy.save and fsync", text, write, work=megabytes),
    ]  # fmt: skip
    return Comparison(
        cases,
        [
            times_faster("checkpoint_blocks_of_save", "save", "save_blocks"),
            times_faster("checkpoint_save_vs_numpy", "save", "numpy_save"),
        ],
    )
