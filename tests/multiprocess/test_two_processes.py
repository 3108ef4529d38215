"""Two processes on loopback are equivalent to one: equal training, each record evaluated once."""

import contextlib
import functools
import re
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

from tests import processes, tiny_run, trainer

STEPS, RECORDS, BATCH = 10, 19, 8
# The last evaluation batch has five rows of padding: one of the processes gets padding only.
OPTIONS = (
    "data.options.validation=17",
    f"data.options.test={RECORDS}",
    f"train.eval_batch_size={BATCH}",
    f"train.total_steps={STEPS}",
    "checkpoint.every_steps=5",
)
NUM_DEVICES = 2  # of each process
SECONDS = 240  # that a run may take


def command(workdir, num_devices, *options):
    flags = processes.xla_flags(num_devices)
    return ["env", f"XLA_FLAGS={flags}", *trainer.command(workdir, *OPTIONS, *options)]


@functools.cache
def one_process():
    workdir = trainer.home() / "one-process"
    trainer.run(command(workdir, 1))
    return workdir


@functools.cache
def two_processes(*options):
    """The workdir of a run of two processes, and what each of them printed."""
    folder = trainer.home() / f"two-processes-{len(list(trainer.home().iterdir()))}"
    folder.mkdir()
    arguments = command(folder / "run", NUM_DEVICES, *options)
    return folder / "run", outputs_of_two(arguments, folder)


def outputs_of_two(arguments, folder):
    """What each of two processes that run together prints; both must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    distributed = [f"--coordinator_address={address}", "--num_processes=2"]
    logs = [folder / f"{i}.log" for i in range(2)]
    with contextlib.ExitStack() as stack:
        children = []
        for i, log in enumerate(logs):
            children.append(trainer.start([*arguments, *distributed, f"--process_id={i}"], log))
            stack.callback(children[i].wait)
            stack.callback(children[i].kill)
        deadline = time.monotonic() + SECONDS
        codes = []
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0, deadline - time.monotonic()))
            codes.append(child.returncode)
    printed = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n\n".join(text[-5000:] for text in printed)
    return printed


def parameters(workdir):
    return tiny_run.parameters(workdir, trainer.get_config(), STEPS)


def assert_same_results(run, reference):
    """Parameters agree to 1e-5 of each one's norm, and evaluation counts exactly."""
    expected = parameters(reference)
    for name, value in parameters(run).items():
        difference = np.linalg.norm(value - expected[name])
        assert difference <= 1e-5 * np.linalg.norm(expected[name]), name
    ours, theirs = (trainer.result(workdir)["eval"] for workdir in (run, reference))
    assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-5)
    assert ours == theirs


@pytest.mark.parametrize(
    "split", ["mesh.fsdp=4", pytest.param("mesh.data=4", marks=pytest.mark.slow)]
)
def test_two_processes_train_and_evaluate_as_one(split):
    workdir, _ = two_processes(split)
    assert_same_results(workdir, one_process())
    evaluation = trainer.result(workdir)["eval"]
    assert evaluation["records"] == np.sum(evaluation["confusion"]) == RECORDS


def test_both_save_and_only_the_first_reports():
    workdir, printed = two_processes("mesh.fsdp=4")
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "5"]
    writers = (workdir / "checkpoints/10/default").glob("ocdbt.process_*")
    assert sorted(path.name for path in writers) == ["ocdbt.process_0", "ocdbt.process_1"]
    reports = [
        [line for line in text.splitlines() if line.startswith(("mesh {", "writing", "step "))]
        for text in printed
    ]
    assert reports[0][1].startswith("writing the listops data")
    assert f"on {RECORDS} records" in reports[0][-1]
    assert reports[1] == []
    assert len(list(workdir.glob("train/events.*"))) == 1
    points = [(point["step"], *point) for point in trainer.curves(workdir)]
    assert len(points) == len(set(points))  # each written once


@pytest.mark.slow
def test_two_processes_evaluate_a_run_and_write_nothing(tmp_path):
    options = "mesh.fsdp=4"
    workdir, _ = two_processes(options)
    before = trainer.contents(workdir)
    arguments = [*command(workdir, NUM_DEVICES, options), "--eval_only"]
    first, second = outputs_of_two(arguments, tmp_path)
    trained = trainer.result(workdir)["eval"]
    assert re.search(rf"^step {STEPS} test: .*accuracy {trained['accuracy']:.2%}", first, re.M), (
        first
    )
    assert not re.search("^step ", second, re.M)
    assert trainer.contents(workdir) == before


@pytest.mark.slow
def test_one_process_continues_what_two_began(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_processes("mesh.fsdp=4")[0], workdir)
    shutil.rmtree(workdir / "checkpoints/10")
    (workdir / "seals/10.json").unlink()
    assert "starting at step 5" in trainer.run(command(workdir, 1)).stdout
    assert_same_results(workdir, one_process())
