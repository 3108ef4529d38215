"""Metrics on disk: the lines of a resumed run, and event files with and without TensorFlow."""

import json
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_pod.errors import UserError
from spectral_pod.train import writers
from tests import trainer


@pytest.fixture
def no_events(monkeypatch):
    """Event files cost an import of TensorFlow; where only lines matter there are none."""
    monkeypatch.setattr(writers, "_open_events", lambda workdir: Events())


class Events:
    def write_scalars(self, step, values):
        pass

    write_texts = write_scalars

    def flush(self):
        pass

    close = flush


def write(workdir, resume_step, steps):
    writer = writers.MetricWriter(str(workdir), is_leader=True, resume_step=resume_step)
    for step in steps:
        writer.scalars(step, values_of(step))
        if step % 3 == 0:
            writer.scalars(step, {"validation/loss": 1 / step})
    writer.close()


def values_of(step):
    return {"train/loss": 1 / (7 * step), "speed/steps_per_second": 3.0 * step}


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.mark.usefixtures("no_events")
def test_lines_continue_after_the_resumed_step(tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    write(whole, 0, range(1, 10))
    expected = lines(whole)
    assert len(expected) == 12
    text = "".join(expected)

    ends = [match.start() for match in re.finditer("\n", text)]

    @given(cut=st.integers(0, len(text)) | st.sampled_from(ends), resume=st.integers(0, 9))
    @settings(max_examples=150, deadline=None)
    def killed_and_resumed(cut, resume):
        workdir = tmp_path_factory.mktemp("cut")
        (workdir / "metrics.jsonl").write_text(text[:cut])
        write(workdir, resume, range(resume + 1, 10))
        complete = text[:cut].count("\n")
        before = [line for line in expected[:complete] if json.loads(line)["step"] <= resume]
        after = [line for line in expected if json.loads(line)["step"] > resume]
        assert lines(workdir) == before + after

    killed_and_resumed()


@pytest.mark.usefixtures("no_events")
def test_a_point_that_is_there_is_not_written_again(tmp_path):
    write(tmp_path, 0, range(1, 10))
    before = lines(tmp_path)
    write(tmp_path, 9, [9])  # what a finished run that is started again reports
    assert lines(tmp_path) == before


def test_only_the_leader_writes(tmp_path):
    writer = writers.MetricWriter(str(tmp_path), is_leader=False, resume_step=0)
    writer.scalars(1, {"loss": 1.0})
    writer.texts(1, {"config": "x"})
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_events")
def test_a_failure_to_write_events_surfaces(tmp_path, monkeypatch):
    def full(self, step, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Events, "write_scalars", full)
    with pytest.raises(UserError, match=f"{tmp_path}.*No space left"):
        write(tmp_path, 0, range(1, 10))


# `python -m spectral_pod.main`, told of every import of TensorFlow; "hide" as its first argument
# makes them fail.
WATCH = """
import sys, threading, traceback

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow":
            frames = [frame.filename for frame in traceback.extract_stack()]
            thread, by_clu = threading.current_thread(), any("clu/metric_" in f for f in frames)
            print(f"IMPORT main={thread is threading.main_thread()} clu={by_clu}", flush=True)
        if hidden and name.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

hidden = sys.argv.pop(1) == "hide"
sys.meta_path.insert(0, Watch())
from spectral_pod import main
main.run()
"""


def watched(mode, command):
    """The command of a run, less the interpreter and module, under `WATCH`."""
    assert command[1:3] == ["-m", "spectral_pod.main"]
    return [command[0], "-c", WATCH, mode, *command[3:]]


def test_event_files_by_clu_hold_the_same_points():
    found, expected = trainer.event_points(trainer.uninterrupted()), {}
    for line in map(json.loads, lines(trainer.uninterrupted())):
        step = line.pop("step")
        for tag, value in line.items():
            expected.setdefault(tag, {})[step] = pytest.approx(value, rel=1e-6)
    assert {"train/loss", "validation/accuracy", "test/loss", "speed/bytes_per_second"} <= set(
        found
    )
    for text, part in (("config", "hidden_dim: 16"), ("parameters", "encoder/embedding")):
        assert part in found.pop(text)[0]
    assert found == expected


def test_a_run_without_tensorflow(tmp_path):
    workdir = trainer.with_compiled(tmp_path / "run")
    done = trainer.run(watched("hide", trainer.command(workdir)))
    assert "IMPORT" in done.stdout
    trainer.assert_same_run(workdir, trainer.uninterrupted())


def test_only_clu_imports_tensorflow_and_on_a_thread_of_its_own(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trainer.uninterrupted(), workdir)
    shutil.rmtree(workdir / "checkpoints" / "40")  # to have the last steps taken again
    (workdir / "seals" / "40.json").unlink()
    done = trainer.run(watched("see", trainer.command(workdir)))
    imports = [line for line in done.stdout.splitlines() if line.startswith("IMPORT")]
    assert imports == ["IMPORT main=False clu=True"]
    trainer.assert_same_run(workdir, trainer.uninterrupted())
