"""TensorBoard event files: runs, tags and descriptions, read by TensorBoard itself."""

import io
import json
import shlex
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.util import tensor_util

from spectral_pod.data.tasks.listops import ListOps
from spectral_pod.errors import UserError
from spectral_pod.train import event_files, writers
from tests import trainer
from tests.train.test_writers import lines, write


def test_event_files_hold_the_points_of_the_lines():
    """In a run for each split, with the same tags, at the same times, and explained."""
    runs = trainer.event_accumulators(trainer.uninterrupted())
    assert list(runs) == ["test", "train", "validation"]
    expected = {run: {} for run in runs}
    for line in trainer.metrics(trainer.uninterrupted()):
        step, seconds = line.pop("step"), line.pop("wall_time")
        for name, value in line.items():
            run, tag, description = event_files.tag_of(name, ListOps.objective.descriptions)
            assert description, name
            assert run == (name.split("/")[0] if name.split("/")[0] in runs else "train")
            expected[run].setdefault((tag, description), []).append(
                (seconds, step, pytest.approx(value, rel=1e-6))
            )
    for run, events in runs.items():
        scalars = events.PluginTagToContent("scalars")
        found = {
            (tag, events.SummaryMetadata(tag).summary_description): [
                (event.wall_time, event.step, tensor_util.make_ndarray(event.tensor_proto).item())
                for event in events.Tensors(tag)
            ]
            for tag in scalars
        }
        assert found == expected[run]
    tags = {run: {tag for tag, _ in expected[run]} for run in runs}
    for run in ("validation", "test"):  # beside the accuracies by root operator
        shared = {tag for tag in tags[run] if not tag.startswith("metrics/accuracy_")}
        assert shared == {"metrics/loss", "metrics/accuracy"} < tags["train"]
    groups = sorted({tag.split("/")[0] for tag in tags["train"]})  # as TensorBoard orders them
    order = ["metrics", "optimizer", "speed", "system", "time", "time_of_hosts", "time_share"]
    assert groups == order


def test_texts_are_those_of_their_split():
    points = trainer.event_points(trainer.uninterrupted())
    assert "hidden_dim: 16" in points["train", "config"][0]
    assert "encoder/embedding" in points["train", "parameters"][0]
    assert "recall" in points["test", "details"][40]


def test_sets_of_a_split_are_runs_with_the_same_tags(tmp_path):
    with writers.MetricWriter(str(tmp_path), is_leader=True, resume_step=0) as writer:
        writer.scalars(
            3, {"validation/loss": 2.0, "validation/a/loss": 1.0, "validation/b/loss": 3}
        )
    points = trainer.event_points(tmp_path)
    curves = {run: curve for (run, tag), curve in points.items() if tag == "metrics/loss"}
    assert curves == {"validation": {3: 2.0}, "validation/a": {3: 1.0}, "validation/b": {3: 3.0}}


def test_no_event_file_is_outside_of_the_workdir(tmp_path):
    workdir = tmp_path / "a" / "b" / "run"
    workdir.mkdir(parents=True)
    point = {"step": 1, "validation/../../../loss": 1.0, "wall_time": 0.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(point) + "\n")
    with pytest.raises(UserError, match=r"validation/\.\./\.\./\.\.' is no name of a set"):
        write(workdir, 1, [2])
    assert not [*tmp_path.glob("events.*"), *tmp_path.glob("a/events.*")]


def test_a_picture_is_stored_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with writers.MetricWriter(str(tmp_path), is_leader=True, resume_step=0) as writer:
        writer.images(4, {"validation/examples": pixels})
    events = trainer.event_accumulators(tmp_path)["validation"]
    (event,) = events.Tensors("pictures/examples")
    assert (event.step, list(events.PluginTagToContent("images"))) == (4, ["pictures/examples"])
    width, height, png = tensor_util.make_ndarray(event.tensor_proto).tolist()
    assert (width, height) == (b"7", b"5")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)


@pytest.mark.parametrize("has_script", [True, False])
def test_the_closing_hint_opens_training_and_validation_overlaid(tmp_path, monkeypatch, has_script):
    """In TensorBoard's server, with the reader that it uses by default."""
    if not has_script:  # as where packages are installed for one user
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(python))
    workdir = tmp_path / "a run"
    shutil.copytree(trainer.uninterrupted(), workdir, ignore=shutil.ignore_patterns("checkpoints"))
    command = shlex.split(event_files.how_to_view(str(workdir)).splitlines()[0])
    assert ("-m" in command) != has_script
    runs = {"train", "validation", "test"}
    tags = trainer.tensorboard_tags(command, runs, env=trainer.environment())  # no TensorFlow
    assert tags.keys() == runs
    for run in ("validation", "test"):
        of_roots = {tag for tag in tags[run] if tag.startswith("metrics/accuracy_")}
        assert tags[run].keys() - of_roots == {"metrics/loss", "metrics/accuracy"}
        assert all(tags[run][tag] == tags["train"][tag] for tag in tags[run].keys() - of_roots)
    assert "nats" in tags["train"]["metrics/loss"]["description"]


def test_the_closing_hint_of_a_container_outlasts_it(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    here, elsewhere = event_files.how_to_view("gs://bucket/run").splitlines()
    flags = " --logdir=gs://bucket/run --load_fast=false"
    assert here.endswith("/tensorboard" + flags)
    assert elsewhere.endswith(" tensorboard" + flags)


# `python -m spectral_pod.main`, which ends with an error where TensorFlow is imported.
WITHOUT = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        assert name != "tensorflow"

sys.meta_path.insert(0, Watch())
from spectral_pod import main
main.run()
"""


def test_a_run_does_not_import_tensorflow_where_it_is_installed(tmp_path):
    python, _, module, *flags = trainer.command(tmp_path / "run", "train.total_steps=2")
    assert module == "spectral_pod.main"
    trainer.run([python, "-c", WITHOUT, *flags], tensorflow=True)
    assert trainer.event_points(tmp_path / "run")


def test_curves_of_an_older_workdir_are_drawn_again(tmp_path):
    """Where there are lines and no event files of this kind, as those had one for all splits."""
    write(tmp_path, 0, range(1, 10))
    for folder in ("train", "validation"):
        shutil.rmtree(tmp_path / folder)
    (tmp_path / "events.out.tfevents.1.older").write_bytes(b"")
    write(tmp_path, 6, range(7, 10))
    assert_curves_do_not_go_back(tmp_path, [(6, 9)])
    first, *_ = trainer.event_accumulators(tmp_path)["train"].Tensors("metrics/loss")
    assert first.wall_time == json.loads(lines(tmp_path)[0])["wall_time"]


def steps_of_events(workdir, run):
    """The steps of the curve of the loss, in the order in which TensorBoard shows them."""
    events = trainer.event_accumulators(workdir).get(run)
    return [event.step for event in events.Tensors("metrics/loss")] if events else []


# The step that a start continues from, and its last: they repeat some steps, all of them, or none.
STARTS = [(0, 8), (4, 7), (4, 12), (11, 11), (11, 15), (0, 2)]


def write_starts(workdir, starts):
    for second, (resume, last) in enumerate(starts):
        # The names of event files hold the second, by which TensorBoard orders them.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writers.time, "time", lambda second=second: 1_700_000_000.0 + second)
            write(workdir, resume, range(resume + 1, last + 1))


def assert_curves_do_not_go_back(workdir, starts):
    last = max(starts[-1])
    assert steps_of_events(workdir, "train") == [*range(1, last + 1)]
    thirds = [step for step in range(1, last + 1) if step % 3 == 0]
    assert steps_of_events(workdir, "validation") == thirds


@pytest.mark.parametrize("count", range(1, len(STARTS) + 1))
def test_curves_of_a_run_that_was_started_again_do_not_go_back(tmp_path, count):
    write_starts(tmp_path, STARTS[:count])
    assert_curves_do_not_go_back(tmp_path, STARTS[:count])
