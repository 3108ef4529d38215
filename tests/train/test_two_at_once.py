"""Two runs in one workdir or on one fresh store, and an evaluation beside a run."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from spectral_pod import lease, project_files
from spectral_pod.data import byte_store, store_lease
from spectral_pod.errors import ConfigError, UserError
from spectral_pod.train import loop, starts
from tests import trainer

WRITE = """
import sys
from spectral_pod.data import byte_store, store_lease, tasks
from spectral_pod.train import sources
from tests import trainer
config = trainer.get_config()
config.data.dir = sys.argv[1]
config.data.options.train = 600
print(sources.open_sources(config).digest)
"""

SUSPENDED = """
import sys
from spectral_pod import lease
from spectral_pod.data import byte_store, store_lease, zarr_arrays
zarr_arrays.PART_BYTES = 1 << 15
lease._machine = lambda: "another"  # so that it is known by its renewals alone
lease.EXPIRY_SECONDS = 1.0
def records():
    for _ in range(3):
        yield byte_store.Record(bytes(1 << 15), 0)
        print("a part is written", flush=True)
        input()
with store_lease.hold(sys.argv[1]):
    byte_store.write(sys.argv[1], {"train": records()}, classes=["a"], provenance={})
"""


def wait_for(file, child):
    while not file.exists():
        assert child.poll() is None
        time.sleep(0.005)


def test_a_run_is_alone_in_its_workdir(tmp_path):
    """A second trainer is refused, an evaluation is not, and neither disturbs the first."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    child = trainer.start(trainer.command(workdir), log)
    try:
        wait_for(workdir / "seals/5.json", child)
        child.send_signal(19)  # SIGSTOP, so that it outlives the others
        before = trainer.contents(workdir)
        second = trainer.run(trainer.command(workdir), code=2).stderr.strip().splitlines()[-1]
        assert re.search(rf"workdir {workdir} is in use by process {child.pid} on host", second)
        command = [sys.executable, "-m", "tools.pack", str(workdir), f"--out={tmp_path}/packed"]
        packing = trainer.run(command, code=2).stderr.strip().splitlines()[-1]
        assert re.search(rf"workdir {workdir} is in use by process {child.pid} on host", packing)
        assert not (tmp_path / "packed").exists()
        evaluated = trainer.run([*trainer.command(workdir), "--eval_only"]).stdout
        assert re.search(r"^step \d+ test", evaluated, re.MULTILINE)
        assert trainer.contents(workdir) == before
    finally:
        child.send_signal(18)  # SIGCONT
        child.wait()
    trainer.assert_same_run(workdir, trainer.uninterrupted())
    assert not (workdir / "lease.json").exists()


def test_two_runs_write_one_store(tmp_path):
    """The second waits, and both have the same data."""
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [
        subprocess.Popen(command, env=trainer.environment(), cwd=trainer.ROOT, **pipes)
        for _ in range(2)
    ]
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    digests = {output.splitlines()[-1] for output, _ in outputs}
    assert len(digests) == 1
    said = "".join(output for output, _ in outputs)
    assert said.count("writing the listops data") == 1
    assert not list(tmp_path.rglob("lease.json*"))


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_suspended_writer_of_a_store_stops_if_another_took_it_over(
    tmp_path, monkeypatch, has_ended
):
    path = str(tmp_path / "store")
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 1.0)
    child = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, path], env=trainer.environment(), cwd=trainer.ROOT,
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout.readline() == "a part is written\n"
    child.send_signal(19)  # SIGSTOP
    with store_lease.hold(path):
        new = {"train": [byte_store.Record(b"new", 0)]}
        byte_store.write(path, new, classes=["a"], provenance={})
        error = "" if has_ended else resumed(child)
    error = error or resumed(child)
    by = "another process, which has ended" if has_ended else f"process {os.getpid()} on host .*"
    last = error.strip().splitlines()[-1]
    assert re.search(rf"TakenOverError: the store {path} was taken over by {by}, as", last)
    split = byte_store.ByteStore(path).split("train")
    assert [data.tobytes() for data in split.read([0])] == [b"new"]
    byte_store.verify(path)


def resumed(child):
    child.send_signal(18)  # SIGCONT
    return child.communicate("\n" * 9)[1]


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(trainer.uninterrupted(), tmp_path / "run")


def evaluate(workdir, **fields):
    return loop.run(trainer.config(**fields), str(workdir), eval_only=True)


@pytest.mark.parametrize("fields", [{"model__hidden_dim": 32}, {"data__seq_len": 128}])
def test_an_evaluation_is_of_the_configuration_of_its_run(copied, fields):
    with pytest.raises(ConfigError, match="belongs to a run of another configuration"):
        evaluate(copied, **fields)


def test_an_evaluation_is_of_the_classes_of_its_run(copied):
    run = project_files.RUN.read(copied / "config.json")
    with pytest.raises(ConfigError, match=r"was trained to predict \['0', .*have \['9', '8'"):
        starts.claim_workdir(
            str(copied), trainer.config(), run["data_digest"], run["classes"][::-1], read_only=True
        )


def test_no_workdir_is_made_by_an_evaluation(tmp_path):
    with pytest.raises(UserError, match=r"is no workdir of a run: it has no config\.json"):
        evaluate(tmp_path / "none")
    assert not (tmp_path / "none").exists()
