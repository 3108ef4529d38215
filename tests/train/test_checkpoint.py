"""What is saved comes back to the bit, and what fails while it is saved loses no earlier step."""

import pickle
import pickletools
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from spectral_pod.errors import CheckpointError, TakenOverError
from spectral_pod.train import checkpoint
from tests.train.states import (
    abstract,
    files_of,
    make_state,
    open_checkpointer,
    restored_step,
    steps_in,
    write,
)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run" / "checkpoints"


def is_pickle(data):
    try:
        return len(list(pickletools.genops(data))) > 0
    except ValueError:
        return False


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
