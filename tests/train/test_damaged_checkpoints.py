"""A step that is damaged, unfinished or of another run is moved aside; the one before is used."""

import pathlib
import shutil

import pytest

from spectral_pod.errors import CheckpointError
from tests import trainer
from tests.train.states import (
    abstract,
    files_of,
    flip_a_bit,
    make_state,
    open_checkpointer,
    restored_step,
    steps_in,
    truncate,
    write,
)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run" / "checkpoints"


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
