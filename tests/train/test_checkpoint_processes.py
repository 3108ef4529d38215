"""Checkpoints of other meshes, of two processes, and of those that are killed.

Run as a script, this file is one of its own children: `CHILDREN` lists them.
"""

import json
import pathlib
import random
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spectral_pod.errors import CheckpointError
from spectral_pod.train import checkpoint
from tests import processes
from tests.train.states import abstract, assert_same, flip_a_bit, make_state, open_checkpointer


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run" / "checkpoints"


def sharded(shape, axes, spec):
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    return NamedSharding(mesh, PartitionSpec(*spec))


def mesh_child(directory):
    """Saves on 4x1, restores on 2x2 and on one device."""

    def place(state, sharding):
        alone = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.device_put(x, sharding if x.ndim == 2 else alone), state)

    rows = sharded((4, 1), ("data", "tensor"), ("data", "tensor"))
    tiles = sharded((2, 2), ("data", "tensor"), ("tensor", "data"))
    with open_checkpointer(directory) as checkpointer:
        checkpointer.save(1, place(make_state(1), rows), None)
        for sharding in (rows, tiles):
            expected = place(make_state(1), sharding)
            assert_same(checkpointer.restore(abstract(expected)), expected)
        alone = make_state(1)
        assert_same(checkpointer.restore(abstract(alone)), alone)


def endless_child(directory):
    """Saves 100 MB after 100 MB until it is killed."""
    with open_checkpointer(directory, keep_latest=2) as checkpointer:
        step = checkpointer.latest_sound_step or 0
        while True:
            step += 1
            checkpointer.save(step, large_state(step), None)
            print("every step before", step, "is sealed", flush=True)


def large_state(step):
    return {"step": jnp.int32(step), "x": jnp.arange(25_000_000, dtype=jnp.int32) * step}


def process_child(directory, port, index):
    """One of two processes on a shared disk, each with half of every row."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(index), initialization_timeout=60)
    rows = sharded((2,), ("data",), ("data",))

    def rows_of(step):
        return {"x": jax.make_array_from_callback((8,), rows, lambda i: np.arange(8)[i] * step)}

    wanted, states = abstract(rows_of(0)), {step: rows_of(step) for step in (1, 2, 3)}
    with jax.transfer_guard("disallow"), open_checkpointer(directory) as checkpointer:
        assert checkpointer.restore(wanted) is None
        for step in (1, 2):
            checkpointer.save(step, states[step], {"accuracy": 0.5})
    if index == "0":
        flip_a_bit(pathlib.Path(directory) / "2" / "default" / "_METADATA")
    with open_checkpointer(directory) as checkpointer:
        restored = checkpointer.restore(wanted)
        for shard in restored["x"].addressable_shards:
            np.testing.assert_array_equal(shard.data, np.arange(8)[shard.index])
        if index == "0":  # if one fails, both raise an error; neither hangs
            checkpoint.file_digests = lambda _: [][0]
        checkpointer.save(2, states[2], None)
        with pytest.raises(CheckpointError, match="step 2" if index == "0" else "process"):
            checkpointer.save(3, states[3], None)


CHILDREN = {"mesh": mesh_child, "endless": endless_child, "process": process_child}


def start_child(*args, devices=1):
    environment = processes.environment() | {
        "PJRT_NPROC": "16",
        "XLA_FLAGS": processes.xla_flags(devices),
    }
    return processes.Popen(
        [sys.executable, __file__, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*children):
    outputs = []
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * len(children), "\n".join(outputs)


def test_restores_onto_another_mesh(directory):
    finish(start_child("mesh", directory, devices=4))


def test_two_processes_restore_the_same_step(directory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    finish(*(start_child("process", directory, port, index) for index in range(2)))
    assert (directory.parent / "quarantine" / "2-0").is_dir()


def test_kill_at_any_moment_leaves_a_sound_step(directory):
    reached = 0
    for saves in (1, 2, 3):
        child = start_child("endless", directory)
        try:
            for _ in range(saves):
                line = child.stdout.readline()
                while line and not line.startswith("every step before"):  # warnings of Orbax
                    line = child.stdout.readline()
                assert line
            time.sleep(random.uniform(0.0, 1.5))  # into writing, sealing, or the next save
        finally:
            child.kill()
            child.communicate()
        with open_checkpointer(directory, keep_latest=2) as checkpointer:
            state = checkpointer.restore(abstract(large_state(0)))
        step = 0 if state is None else int(state["step"])
        assert step >= reached + saves - 1
        if state is not None:
            np.testing.assert_array_equal(state["x"], large_state(step)["x"])
        reached = step
    seal = json.loads((directory.parent / "seals" / f"{reached}.json").read_text())
    assert sum(file["bytes"] for file in seal["files"].values()) > 1_000_000


if __name__ == "__main__":
    CHILDREN[sys.argv[1]](*sys.argv[2:])
