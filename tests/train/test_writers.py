"""Metrics on disk, the lines and the event files of a resumed run, and Weights & Biases."""

import contextlib
import errno
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_pod.errors import UserError
from spectral_pod.train import writers


@pytest.fixture
def no_events(monkeypatch):
    """Without event files, where only lines matter."""
    monkeypatch.setattr(writers, "EventFiles", Events)


class Events:
    def __init__(self, *_):
        pass

    def write_scalars(self, *_):
        pass

    write_texts = write_images = write_scalars

    def flush(self):
        pass

    close = flush


def write(workdir, resume_step, steps, **options):
    writer = writers.MetricWriter(str(workdir), is_leader=True, resume_step=resume_step, **options)
    for step in steps:
        writer.scalars(step, values_of(step))
        if step % 3 == 0:
            writer.scalars(step, {"validation/loss": 1 / step})
    writer.close()


def values_of(step):
    return {"train/loss": 1 / (7 * step), "speed/steps_per_second": 3.0 * step}


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)


def points(lines):
    """The lines without their times."""
    return [{k: v for k, v in json.loads(line).items() if k != "wall_time"} for line in lines]


@pytest.mark.usefixtures("no_events")
def test_every_line_has_its_time(tmp_path):
    before = time.time()
    write(tmp_path, 0, range(1, 4))
    times = [json.loads(line)["wall_time"] for line in lines(tmp_path)]
    assert times == sorted(times)
    assert before - 0.001 <= times[0] <= times[-1] <= time.time() + 0.001
    assert all(round(at, 3) == at for at in times)


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
        now = lines(workdir)
        assert now[: len(before)] == before  # including the times
        assert points(now) == points(before + after)

    killed_and_resumed()


@pytest.mark.usefixtures("no_events")
def test_the_last_window_is_kept(tmp_path):
    write(tmp_path, 0, range(1, 10))
    for resume, last in ((0, None), (4, 4), (6, 6), (9, 9)):  # 6 and 9 are evaluated, too
        writer = writers.MetricWriter(str(tmp_path), is_leader=False, resume_step=resume)
        assert writer.last_line == {}
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "metrics.jsonl", tmp_path / "copy")
        writer = writers.MetricWriter(str(tmp_path / "copy"), is_leader=True, resume_step=resume)
        writer.close()
        expected = {"step": last} | values_of(last) if last else {}
        assert {k: v for k, v in writer.last_line.items() if k != "wall_time"} == expected


@pytest.mark.usefixtures("no_events")
def test_a_point_that_is_there_is_not_written_again(tmp_path, monkeypatch):
    write(tmp_path, 0, range(1, 10))
    before = lines(tmp_path)
    monkeypatch.setattr(writers.time, "time", lambda: 2e9)
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
    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Events, "write_scalars", full)
    with pytest.raises(UserError, match=f"{tmp_path}.*No space left"):
        write(tmp_path, 0, range(1, 10))


# A stand-in for the part of the package wandb that is used; its runs record all calls.
WANDB = """
class errors:
    class UsageError(Exception): pass
    class CommError(Exception): pass
    class AuthenticationError(CommError): pass

class Settings(dict):
    def __init__(self, **settings):
        super().__init__(settings)

class Html(str): pass
class Image(list): pass

class Run:
    def __init__(self, **settings):
        self.settings, self.logged, self.metrics, self.finished = settings, [], {}, False

    def log(self, values):
        self.logged.append(values)

    def define_metric(self, name, *, step_metric):
        self.metrics[name] = step_metric

    def finish(self):
        self.finished = True
        used.remove(self.settings["id"])

runs, failures = [], {}  # failures: errors of the service, by mode

used = []  # run ids that wandb's service has in use

def teardown():
    used.clear()

def init(*, mode=None, id, **settings):
    settings["id"] = id
    if id in used:
        raise errors.UsageError(f"run ID {id} is in use")
    used.append(id)
    if mode in failures:
        raise failures[mode]
    runs.append(Run(mode=mode, **settings))
    return runs[-1]
"""


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("packages")
    (folder / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("wandb")
    del sys.modules["wandb"]


@pytest.mark.usefixtures("no_events")
def test_weights_and_biases_get_what_the_lines_hold(tmp_path, wandb):
    config = {"seed": 3, "train": {"total_steps": 9}}
    with contextlib.closing(
        writers.MetricWriter(
            str(tmp_path), is_leader=True, resume_step=0, wandb_project="p", run_config=config
        )
    ) as writer:
        writer.texts(0, {"config": "a < b"})
        writer.scalars(1, values_of(1))
        writer.scalars(1, {"validation/loss": 0.5})
        writer.images(1, {"validation/examples": np.zeros((1, 2, 3), np.uint8)})
    (run,) = wandb.runs
    text, *scalars, images = run.logged
    assert scalars == points(lines(tmp_path))
    assert images["step"] == 1
    np.testing.assert_array_equal(images["validation/examples"], np.zeros((1, 2, 3)))
    assert text == {"step": 0, "config": wandb.Html("<pre>a &lt; b</pre>")}
    assert run.metrics == {"*": "step"}
    assert run.settings["config"] == config
    assert run.settings["project"] == "p"
    assert run.finished


@pytest.mark.usefixtures("no_events")
def test_a_restart_continues_the_run_of_weights_and_biases(tmp_path, wandb):
    for workdir, resume in (("a", 0), ("a", 3), ("b", 0)):
        (tmp_path / workdir).mkdir(exist_ok=True)
        write(tmp_path / workdir, resume, [resume + 1], wandb_project="p")
    first, again, other = (run.settings for run in wandb.runs)
    assert first["id"] == again["id"] != other["id"]
    assert [run["resume"] for run in (first, again, other)] == ["allow"] * 3
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", 0, [1], wandb_project="p")  # another run at the same place
    assert wandb.runs[-1].settings["id"] != first["id"]


@pytest.mark.usefixtures("no_events")
def test_no_secret_reaches_weights_and_biases_or_the_workdir(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    write(tmp_path, 0, [1, 2], wandb_project="p", run_config={"seed": 1})
    (run,) = wandb.runs
    assert "secret-key" not in f"{run.settings}{run.logged}"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(b"secret-key" in path.read_bytes() for path in files)


@pytest.mark.usefixtures("no_events")
def test_a_refusal_of_weights_and_biases_says_what_to_do(tmp_path, wandb):
    wandb.failures[None] = wandb.errors.AuthenticationError("no key")
    with pytest.raises(UserError, match=r"train\.wandb_project.*no key.*wandb login"):
        write(tmp_path, 0, [1], wandb_project="p")


@pytest.mark.usefixtures("no_events")
def test_a_run_goes_on_where_weights_and_biases_cannot_be_reached(tmp_path, wandb, caplog):
    wandb.failures[None] = wandb.errors.CommError("no such host")
    write(tmp_path, 0, [1, 2], wandb_project="p")
    (run,) = wandb.runs
    assert run.settings["mode"] == "offline"
    assert run.logged == points(lines(tmp_path))
    assert "wandb sync" in caplog.text


@pytest.mark.usefixtures("no_events")
def test_weights_and_biases_is_asked_for(tmp_path, monkeypatch):
    write(tmp_path, 0, [1])
    assert "wandb" not in sys.modules
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"train\.wandb_project.*pip install wandb"):
        write(tmp_path, 0, [1], wandb_project="p")


FAULTS = [
    (errno.EIO, "dmesg"), (errno.ESTALE, "mounted"), (errno.EMFILE, "ulimit -n"),
    (errno.ENOSPC, "df -h"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f"),
    (errno.EROFS, "read-only"), (errno.EACCES, "who owns it"),
]  # fmt: skip


@pytest.mark.parametrize("operation", ["open", "write", "flush", "close"])
@pytest.mark.parametrize("file", ["metrics.jsonl", "metrics.jsonl.tmp", "events.out.tfevents"])
def test_a_fault_of_storage_names_file_cause_and_cure(tmp_path, monkeypatch, operation, file):
    """Whatever the fault, and at whichever access of a run it begins."""
    folder = "(train|validation)/" if file.startswith("events") else ""
    reached = 0
    for i, (number, cure) in enumerate(FAULTS):
        for start in (0, 1, 3):
            workdir = tmp_path / f"{i}-{start}"
            workdir.mkdir()
            with monkeypatch.context() as patch:
                faults = Faults(patch, file, operation, number, start)
                error = failure(lambda workdir=workdir: write(workdir, 0, range(1, 5)))
            assert faults.hit == (error is not None)
            if error is not None:
                reached += 1
                name = re.escape(file.removesuffix(".tmp"))
                assert re.search(f"{re.escape(str(workdir))}/{folder}{name}", str(error))
                assert os.strerror(number) in str(error)
                assert cure in str(error)
                assert error.exit_code == 2
    assert reached >= len(FAULTS)


def failure(action):
    """The `UserError` that an action raises, or None."""
    try:
        action()
    except UserError as error:
        return error
    return None


class Faults:
    """Makes an operation on files of a name fail from its nth time on."""

    def __init__(self, patch, name, operation, number, start):
        self.hit, self._left = False, start
        self._name, self._operation, self._number = name, operation, number
        self._open = open
        patch.setattr("builtins.open", self.open)
        patch.setattr(io, "open", self.open)

    def check(self, operation, path):
        if operation == self._operation and pathlib.Path(os.fspath(path)).name.startswith(
            self._name
        ):
            self._left -= 1
            if self._left < 0:
                self.hit = True
                args = (path,) if operation == "open" else ()
                raise OSError(self._number, os.strerror(self._number), *args)

    def open(self, path, mode="r", *args, **options):
        if not set(mode) & set("wa+"):
            return self._open(path, mode, *args, **options)
        self.check("open", path)
        file = self._open(path, mode, *args, **options)
        return Wrapped(file, path, self.check)


class Wrapped:
    def __init__(self, file, path, check):
        self._file, self._path, self._check = file, path, check

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        self._check("write", self._path)
        return self._file.write(data)

    def flush(self):
        self._check("flush", self._path)
        self._file.flush()

    def close(self):
        self._file.close()
        self._check("close", self._path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.mark.usefixtures("no_events")
def test_a_fault_at_the_end_does_not_hide_the_error_that_ended_the_run(tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Events, "close", full)
    with (
        pytest.raises(KeyError, match="first"),
        writers.MetricWriter(str(tmp_path), is_leader=True, resume_step=0),
    ):
        raise KeyError("first")
    with (
        pytest.raises(UserError, match="No space left"),
        writers.MetricWriter(str(tmp_path), is_leader=True, resume_step=0),
    ):
        pass
