"""Metrics on disk: the lines of a resumed run, event files with and without TensorFlow; and
Weights & Biases."""

import contextlib
import errno
import functools
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
import time
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_pod.errors import UserError
from spectral_pod.train import writers
from tests import trainer


@pytest.fixture
def no_events(monkeypatch):
    """Without event files, which need an import of TensorFlow, where only lines matter."""
    monkeypatch.setattr(writers, "_open_events", lambda folder, restart_step: Events())


class Events:
    def write_scalars(self, step, values):
        pass

    write_texts = write_scalars

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
    def full(self, step, values):
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
    (run,) = wandb.runs
    text, *scalars = run.logged
    assert scalars == points(lines(tmp_path))
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


# `python -m spectral_pod.main`, which prints every import of TensorFlow.
WATCH = """
import sys, threading, traceback

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow":
            frames = [frame.filename for frame in traceback.extract_stack()]
            thread, by_clu = threading.current_thread(), any("clu/metric_" in f for f in frames)
            print(f"IMPORT main={thread is threading.main_thread()} clu={by_clu}", flush=True)

sys.meta_path.insert(0, Watch())
from spectral_pod import main
main.run()
"""


@functools.cache
def by_clu():
    """The workdir of a run with TensorFlow, and what it printed of importing that."""
    workdir = trainer.home() / "by-clu"
    python, _, module, *flags = trainer.command(workdir)
    assert module == "spectral_pod.main"
    done = trainer.run([python, "-c", WATCH, *flags], tensorflow=True)
    return workdir, [line for line in done.stdout.splitlines() if line.startswith("IMPORT")]


def test_event_files_by_clu_hold_the_same_points():
    workdir, _ = by_clu()
    found, expected = trainer.event_points(workdir), {}
    for line in map(json.loads, lines(workdir)):
        step, _ = line.pop("step"), line.pop("wall_time")
        for tag, value in line.items():
            expected.setdefault(tag, {})[step] = pytest.approx(value, rel=1e-6)
    assert {"train/loss", "validation/accuracy", "test/loss", "speed/bytes_per_second"} <= set(
        found
    )
    texts = {
        "config": "hidden_dim: 16",
        "parameters": "encoder/embedding",
        "test/details": "recall",
    }
    for text, part in texts.items():
        assert part in found.pop(text).popitem()[1]
    assert found == expected


def test_a_run_without_tensorflow():
    without, by_tensorflow = trainer.uninterrupted(), by_clu()[0]
    names = [[file.suffix for file in run.glob("events.*")] for run in (without, by_tensorflow)]
    assert names == [[".0"], [".v2"]]
    trainer.assert_same_run(without, by_tensorflow)


@pytest.mark.slow
def test_clu_continues_its_own_files(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(by_clu()[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "40")  # so that the last steps are repeated
    (workdir / "seals" / "40.json").unlink()
    trainer.run(trainer.command(workdir), tensorflow=True)
    trainer.assert_same_run(workdir, trainer.uninterrupted())


def test_only_clu_imports_tensorflow_and_on_a_thread_of_its_own():
    assert by_clu()[1] == ["IMPORT main=False clu=True"]


def steps_of_events(workdir, tag):
    """The steps of a curve, in the order in which TensorBoard shows them."""
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    # The one that TensorBoard uses; another, older one does not drop points of this kind.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0})
    events.Reload()
    return [event.step for event in events.Tensors(tag)] if tag in events.Tags()["tensors"] else []


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
    assert steps_of_events(workdir, "train/loss") == [*range(1, last + 1)]
    thirds = [step for step in range(1, last + 1) if step % 3 == 0]
    assert steps_of_events(workdir, "validation/loss") == thirds


@pytest.mark.parametrize("count", range(1, len(STARTS) + 1))
def test_curves_of_a_run_that_was_started_again_do_not_go_back(tmp_path, monkeypatch, count):
    monkeypatch.setattr(writers, "_open_events", writers._TensorBoardWriter)
    write_starts(tmp_path, STARTS[:count])
    assert_curves_do_not_go_back(tmp_path, STARTS[:count])


@pytest.mark.slow
def test_nor_do_those_that_clu_writes(tmp_path):
    program = (
        "import sys, time\n"
        "from tests.train.test_writers import STARTS, write\n"
        "for resume, last in STARTS[:5]:\n"
        "    write(sys.argv[1], resume, range(resume + 1, last + 1))\n"
        "    time.sleep(1.1)"  # as TensorFlow names its files by the second
    )
    trainer.run([sys.executable, "-c", program, tmp_path], tensorflow=True)
    assert len([*tmp_path.glob("events.*.v2")]) == 5
    assert_curves_do_not_go_back(tmp_path, STARTS[:5])


FAULTS = [
    (errno.EIO, "dmesg"), (errno.ESTALE, "mounted"), (errno.EMFILE, "ulimit -n"),
    (errno.ENOSPC, "df -h"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f"),
    (errno.EROFS, "read-only"), (errno.EACCES, "who owns it"),
]  # fmt: skip


@pytest.mark.parametrize("operation", ["open", "write", "flush", "close"])
@pytest.mark.parametrize("file", ["metrics.jsonl", "metrics.jsonl.tmp", "events.out.tfevents"])
def test_a_fault_of_storage_names_file_cause_and_cure(tmp_path, monkeypatch, operation, file):
    """Whatever the fault, and at whichever access of a run it begins."""
    monkeypatch.setattr(writers, "_open_events", writers._TensorBoardWriter)
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
                assert f"{workdir}/{file.removesuffix('.tmp')}" in str(error)
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
