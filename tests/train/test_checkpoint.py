"""Checkpoints under damage, kills, full disks and other meshes; each test compares bytes.

Run as a script, this file is one of its own children: `CHILDREN` lists them.
"""

import json
import pathlib
import pickle
import pickletools
import random
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spectral_pod.errors import CheckpointError, TakenOverError
from spectral_pod.train import checkpoint
from spectral_pod.train.checkpoint import Checkpointer
from tests import processes, trainer


class State(flax.struct.PyTreeNode):
    step: jax.Array
    params: Any
    opt_state: Any


def make_state(step, kilobytes=1):
    """A state whose bytes are determined by the step."""
    rng = np.random.default_rng(step)
    params = {
        "dense": {"kernel": rng.normal(size=(16 * kilobytes, 16)).astype(np.float32)},
        "half": rng.normal(size=(8, 4)).astype(jnp.bfloat16),
        "spectrum": (rng.normal(size=(4, 4)) + 1j * rng.normal(size=(4, 4))).astype(np.complex64),
        "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.adam(1e-3))
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), optimizer.init(params))
    return jax.device_put(State(np.int32(step), params, opt_state), jax.devices()[0])


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        assert got.sharding == want.sharding
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def is_pickle(data):
    try:
        return len(list(pickletools.genops(data))) > 0
    except ValueError:
        return False


def open_checkpointer(directory, keep_latest=3, keep_best=0, **options):
    return Checkpointer(str(directory), keep_latest=keep_latest, keep_best=keep_best, **options)


def write(directory, *steps, run=""):
    with open_checkpointer(directory, run=run) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), None)


def restored_step(directory, run=""):
    """Restores, checks that the content belongs to the restored step, and returns the step."""
    with open_checkpointer(directory, run=run) as checkpointer:
        state = checkpointer.restore(abstract(make_state(0)))
    if state is None:
        return None
    assert_same(state, make_state(int(state.step)))
    return int(state.step)


def files_of(step_directory):
    return sorted(path for path in step_directory.rglob("*") if path.is_file())


def steps_in(directory):
    return {int(path.name) for path in directory.iterdir()}


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run" / "checkpoints"


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    """Reading a pickle would execute code."""
    write(tmp_path / "checkpoints", 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert is_pickle(pickle.dumps(make_state(1).step))
    assert len(files) > 5
    assert [path for path in files if is_pickle(path.read_bytes())] == []


def test_round_trip_is_bit_exact(directory):
    assert restored_step(directory) is None
    write(directory, 1, 2)
    assert restored_step(directory) == 2


def test_steps_of_another_run_or_number_are_moved_aside(directory):
    other = directory.parents[1] / "other" / "checkpoints"
    write(other, 3, run="b")
    write(directory, 1, 2, run="a")
    for name in ("checkpoints", "seals"):
        step = "" if name == "checkpoints" else ".json"
        (other.parent / name / f"3{step}").rename(directory.parent / name / f"3{step}")
        copy = shutil.copytree if name == "checkpoints" else shutil.copy
        copy(directory.parent / name / f"2{step}", directory.parent / name / f"1000{step}")
    assert restored_step(directory, run="a") == 2
    reasons = {
        path.name: path.read_text() for path in (directory.parent / "quarantine").glob("*.txt")
    }
    assert reasons.keys() == {"3-0.txt", "1000-0.txt"}
    assert "is of another run" in reasons["3-0.txt"]
    assert "its seal is of step 2" in reasons["1000-0.txt"]


def test_a_run_whose_record_is_lost_is_not_thrown_away(directory):
    """If no checkpoint is of the run that config.json records, that file is wrong, not they."""
    write(directory, 1, 2, run="a")
    before = trainer.contents(directory.parent)
    with pytest.raises(CheckpointError, match=r"are of another run than .*config\.json records"):
        restored_step(directory, run="b")
    assert trainer.contents(directory.parent) == before
    assert restored_step(directory, run="a") == 2


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def add_beside(path):
    path.with_name(path.name + "x").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (flip_a_bit, "altered"),
        (truncate, "altered"),
        (pathlib.Path.unlink, "missing"),
        (add_beside, "added"),
    ],
)
def test_any_damaged_file_falls_back_to_the_step_before(directory, caplog, damage, word):
    write(directory, 1, 2)
    run = directory.parent
    shutil.copytree(run, run.with_name("pristine"))
    names = [path.relative_to(run) for path in files_of(directory / "2")]
    assert len(names) > 8  # metadata, manifests and data
    with open_checkpointer(directory) as checkpointer:
        for n, name in enumerate(names):
            caplog.clear()
            damage(run / name)
            assert checkpointer.restore(abstract(make_state(0))).step == 1
            quarantined = run / "quarantine" / f"2-{n}"
            assert quarantined.is_dir()
            assert steps_in(directory) == {1}
            for part in (str(name.relative_to("checkpoints/2")), word, str(quarantined)):
                assert part in caplog.text
            shutil.copytree(run.with_name("pristine"), run, dirs_exist_ok=True)
        damage(run / names[0])
        assert checkpointer.restore(abstract(make_state(0))).step == 1
        checkpointer.save(2, make_state(2), None)  # a quarantined step can be saved again
    assert restored_step(directory) == 2


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, pathlib.Path.unlink])
def test_damaged_or_missing_seal_falls_back(directory, damage):
    write(directory, 1, 2)
    damage(directory.parent / "seals" / "2.json")
    assert restored_step(directory) == 1
    assert (directory.parent / "quarantine" / "2-0" / "_CHECKPOINT_METADATA").exists()


def test_empty_and_unfinished_steps_fall_back(directory):
    write(directory, 1)
    shutil.copytree(directory / "1", directory / "4.orbax-checkpoint-tmp")
    (directory / "7").mkdir()
    assert restored_step(directory) == 1
    assert steps_in(directory) == {1}
    assert (directory.parent / "quarantine" / "7-0").is_dir()


def test_everything_damaged_is_a_fresh_start(directory):
    write(directory, 1, 2)
    for step in (1, 2):
        flip_a_bit(directory / str(step) / "default" / "_METADATA")
    assert restored_step(directory) is None
    assert len(list((directory.parent / "quarantine").glob("?-0"))) == 2


def test_saving_a_step_twice_keeps_the_first(directory):
    write(directory, 1)
    before = {path: path.read_bytes() for path in files_of(directory.parent)}
    write(directory, 1, 1)
    assert {path: path.read_bytes() for path in files_of(directory.parent)} == before
    (directory.parent / "seals" / "1.json").unlink()  # its writer was killed before the seal
    write(directory, 1)
    assert restored_step(directory) == 1


def test_another_model_is_one_error_that_names_every_parameter(directory):
    write(directory, 1)
    other = make_state(0)
    del other.params["odd"]
    other.params["new"] = jnp.zeros((2, 3))
    other.params["dense"]["kernel"] = jnp.zeros((5, 16))
    other.params["half"] = jnp.zeros((8, 4), jnp.float32)  # Orbax alone would convert this
    with (
        open_checkpointer(directory) as checkpointer,
        pytest.raises(CheckpointError) as caught,
    ):
        checkpointer.restore(abstract(other))
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "params/dense/kernel: checkpoint float32[16, 16], model float32[5, 16]",
        "params/half: checkpoint bfloat16[8, 4], model float32[8, 4]",
        "params/new: checkpoint absent, model float32[2, 3]",
        "params/odd: checkpoint float32[4], model absent",
    ]
    assert restored_step(directory) == 1


def test_keeps_the_newest_and_the_best(directory):
    accuracies = [0.9, 0.1, None, 0.95, float("nan"), 0.9, 0.2, None, 0.3]
    with open_checkpointer(directory, keep_latest=2, keep_best=2) as checkpointer:
        for step, accuracy in enumerate(accuracies):
            metrics = None if accuracy is None else {"accuracy": accuracy, "loss": 1.0}
            checkpointer.save(step, make_state(step), metrics)
            checkpointer.wait_until_finished()
            rated = {s: a for s, a in enumerate(accuracies[: step + 1]) if a is not None and a == a}
            best = sorted(rated, key=lambda s: (rated[s], s))[-2:]
            assert steps_in(directory) == {*best, step, max(step - 1, 0)}
            assert {int(p.stem) for p in (directory.parent / "seals").iterdir()} == steps_in(
                directory
            )
            assert checkpointer.latest_sound_step == step
        with pytest.raises(CheckpointError, match="ranked by 'accuracy'"):
            checkpointer.save(99, make_state(9), {"loss": 1.0})
    assert steps_in(directory) == {3, 5, 7, 8}


def test_old_steps_outlive_a_kill_before_the_seal(directory, monkeypatch):
    """With one step kept, the old one may be deleted only after the new one is sealed."""
    with open_checkpointer(directory, keep_latest=1) as checkpointer:
        checkpointer.save(1, make_state(1), None)
        checkpointer.wait_until_finished()
        monkeypatch.setattr(
            checkpoint, "file_digests", lambda _: sys.exit()
        )  # as if the process were killed
        checkpointer.save(2, make_state(2), None)
        with pytest.raises(CheckpointError):
            checkpointer.wait_until_finished()
    monkeypatch.undo()
    assert steps_in(directory) == {1, 2}
    assert restored_step(directory) == 1


def full(_):
    raise OSError(28, "No space left on device")


def test_background_failure_surfaces_at_the_next_call(directory, monkeypatch):
    checkpointer = open_checkpointer(directory)
    checkpointer.save(1, make_state(1), None)
    checkpointer.wait_until_finished()
    for surface in (
        lambda: [checkpointer.check() for _ in iter(lambda: time.sleep(0.01), 0)],
        checkpointer.wait_until_finished,
        lambda: checkpointer.save(3, make_state(3), None),
        lambda: checkpointer.restore(abstract(make_state(0))),
        checkpointer.close,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "file_digests", full)
            checkpointer.save(2, make_state(2), None)
            with pytest.raises(CheckpointError, match=r"step 2 .* Step 1 is sound .*No space"):
                surface()
        checkpointer.check()  # raised once
    assert restored_step(directory) == 1


class Lease:
    """Is lost at the given call of `check`."""

    def __init__(self, at):
        self.calls_left = at

    def check(self):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise TakenOverError("the workdir was taken over")


@pytest.mark.parametrize(("lost_at", "sealed"), [(0, {1, 2}), (1, {1, 2, 3})])
def test_nothing_is_sealed_or_deleted_once_another_has_taken_over(directory, lost_at, sealed):
    write(directory, 1, 2)
    checkpointer = open_checkpointer(directory, keep_latest=1, check_lease=Lease(lost_at).check)
    with pytest.raises(TakenOverError, match="the workdir was taken over"), checkpointer:
        checkpointer.save(3, make_state(3), None)
    assert {int(seal.stem) for seal in (directory.parent / "seals").iterdir()} == sealed
    assert steps_in(directory) == {1, 2, 3}


def test_nothing_is_moved_once_another_has_taken_over(directory):
    write(directory, 1)
    (directory.parent / "seals/1.json").unlink()
    with open_checkpointer(directory, check_lease=Lease(0).check) as checkpointer:
        with pytest.raises(TakenOverError):
            checkpointer.restore(abstract(make_state(0)))
        with pytest.raises(TakenOverError):
            checkpointer.save(1, make_state(1), None)
    assert steps_in(directory) == {1}


def test_a_save_that_fails_as_another_has_taken_over_says_so(directory, monkeypatch):
    monkeypatch.setattr(checkpoint, "file_digests", full)  # as if the other had moved the step
    checkpointer = open_checkpointer(directory, check_lease=Lease(0).check)
    with pytest.raises(TakenOverError), checkpointer:
        checkpointer.save(1, make_state(1), None)


def test_the_error_that_ends_a_run_is_not_masked_by_a_failed_save(directory, monkeypatch):
    def diverge():
        with open_checkpointer(directory) as checkpointer:
            checkpointer.save(2, make_state(2), None)
            raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "file_digests", full)
    with pytest.raises(ZeroDivisionError):
        diverge()


def test_nor_by_orbax_that_repeats_the_failure(directory, monkeypatch):
    def diverge():
        with open_checkpointer(directory) as checkpointer:
            monkeypatch.setattr(checkpointer._manager, "close", lambda: full(None))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        diverge()


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# Orbax drops a coroutine when it cannot make a directory.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ballast_kilobytes", [1200, 1990])  # full while writing; from the start
def test_full_disk(small_disk, ballast_kilobytes):
    directory = small_disk / "checkpoints"
    ballast = small_disk / "ballast"
    checkpointer = open_checkpointer(directory)
    checkpointer.save(1, make_state(1), None)
    checkpointer.wait_until_finished()
    used = shutil.disk_usage(small_disk).used
    ballast.write_bytes(bytes(max(ballast_kilobytes * 1024 - used, 0)))
    checkpointer.save(2, make_state(2, kilobytes=1000), None)
    with pytest.raises(CheckpointError) as caught:
        checkpointer.wait_until_finished()
    message = str(caught.value)
    for part in ("step 2", str(directory), "free space there", "MB", "Step 1 is sound and kept"):
        assert part in message
    ballast.unlink()
    checkpointer.close()
    assert restored_step(directory) == 1
    with open_checkpointer(directory) as checkpointer:
        checkpointer.save(2, make_state(2), None)
    assert restored_step(directory) == 2


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
