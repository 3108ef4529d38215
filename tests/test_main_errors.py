"""Mistakes of users and failures of machines: one message each, and nothing is destroyed."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from spectral_pod import models
from spectral_pod.data import byte_store
from spectral_pod.errors import UserError
from spectral_pod.parallel.mesh import make_mesh
from spectral_pod.train import loop, starts
from spectral_pod.train.checkpoint import Checkpointer
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import abstract_state
from tests import processes, trainer


@pytest.fixture
def raising_config(tmp_path):
    file = tmp_path / "raising.py"
    file.write_text("def get_config():\n    return [][1]\n")
    return file


def fails(arguments, *, workdir, **options):
    """Runs a command that must fail without creating a workdir; returns its one line on stderr."""
    done = trainer.run(arguments, code=2, **options)
    (message,) = done.stderr.strip().splitlines()
    assert not workdir.exists()
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.totl_steps=5", r"config.train.totl_steps=5: .* did you mean 'total_steps'\?"),
        ("train.total_steps=abc", "flag --config.train.total_steps=abc: invalid literal for int"),
    ],
)
def test_impossible_overrides(tmp_path, override, message):
    workdir = tmp_path / "run"
    assert re.search(message, fails(trainer.command(workdir, override), workdir=workdir))


def test_unknown_flag(tmp_path):
    command = [*trainer.command(tmp_path / "run"), "--wrokdir=x"]
    message = fails(command, workdir=tmp_path / "run", forked=False)
    assert message == "ConfigError: Unknown command line flag 'wrokdir'. Did you mean: workdir ?"


def test_config_files_that_cannot_be_used(tmp_path, raising_config):
    for config, message in (
        ("missing.py", "the config file cannot be read: .* 'missing.py'"),
        (raising_config, f"{raising_config}:2: IndexError: list index out of range"),
        ("configs/lra_listops.py:tiny", r"configs/lra_listops.py:\d+: .*'tiny'; there are .*'cpu'"),
    ):
        command = trainer.command(tmp_path / "run", config=config)
        assert re.search(f"ConfigError: {message}", fails(command, workdir=tmp_path / "run"))


def test_a_workdir_below_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    done = trainer.run(trainer.command(file / "run"), code=2)
    message = done.stderr.strip().splitlines()[-1]
    assert re.match(f"UserError: {file}/run: {file} is a file, and must be a folder", message)
    assert "Traceback" not in done.stderr
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__task": "lsitops"}, "config.data.task is 'lsitops'.*did you mean 'listops'"),
        ({"mesh__data": 99}, "config.mesh asks for data=99 .* there are"),
        ({"train__global_batch_size": 9}, "global_batch_size is 9, not divisible by mesh.data x"),
        ({"data__truncate": False}, r"record \d+ of split 'train' has \d+ bytes, .*data.truncate"),
    ],
)
def test_impossible_configurations_leave_no_workdir(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        loop.run(trainer.config(**fields), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_unknown_fields_and_options_are_named(tmp_path):
    c = trainer.config()
    c.train.totl_steps = 5
    with pytest.raises(UserError, match=r"config.train.totl_steps .*mean config.train.total_steps"):
        loop.run(c, str(tmp_path / "run"))
    c = trainer.config()
    c.data.options = ConfigDict({"trian": 64})
    with pytest.raises(
        UserError, match=r"config.data.options.trian is unknown to listops.*'train'"
    ):
        loop.run(c, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_record_of_a_later_split_is_measured_before_training(tmp_path, monkeypatch):
    """All records of the training split fit, and one of the validation split does not."""
    lengths = {"train": 100, "validation": 300, "test": 100}
    monkeypatch.setattr(
        byte_store.Split, "lengths", property(lambda s: np.full(len(s), lengths[s.name]))
    )
    with pytest.raises(UserError, match="split 'validation' has 300 bytes"):
        loop.run(trainer.config(data__truncate=False), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_configuration(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trainer.uninterrupted(), workdir)
    before = trainer.contents(workdir)
    with pytest.raises(UserError, match=f"{workdir} .*model.hidden_dim: 16 there, 32 now"):
        loop.run(trainer.config(model__hidden_dim=32), str(workdir))
    assert trainer.contents(workdir) == before
    recorded = json.loads((workdir / "config.json").read_text())
    free = {"mesh__fsdp": 2, "checkpoint__every_steps": 7, "train__log_every_steps": 3}
    data = recorded["data_digest"], recorded["classes"]
    starts.claim_workdir(str(workdir), trainer.config(**free), *data)
    assert trainer.contents(workdir) == before


def test_data_that_changed_under_a_workdir(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trainer.uninterrupted(), workdir)
    shutil.copytree(trainer.home() / "data", tmp_path / "data")

    def hold_other_records(manifest):
        manifest["splits"]["train"]["parts"][0]["sha256"]["bytes"] = "0" * 64

    for file in (tmp_path / "data").glob("*/manifest.json"):
        trainer.edit(file, hold_other_records)
    before = trainer.contents(workdir)
    with pytest.raises(UserError, match=f"{workdir} was trained on another version of the data"):
        loop.run(trainer.config(data__dir=str(tmp_path / "data")), str(workdir))
    assert trainer.contents(workdir) == before


def test_a_loss_that_is_no_number(tmp_path):
    workdir = tmp_path / "run"
    fields = {"optimizer.learning_rate": 1e30, "model.num_layers": 1, "model.memory_interval": 0}
    overrides = [f"{field}={value}" for field, value in fields.items()]
    done = trainer.run(trainer.command(workdir, *overrides, "checkpoint.every_steps=1"), code=3)
    message = done.stderr.strip().splitlines()[-1]
    match = re.match(r"NonFiniteError: step (\d+): the loss is .* non-finite \w+ in \['", message)
    assert match, message
    assert "Traceback" not in done.stderr

    c = trainer.config()
    c.update_from_flattened_dict(fields)
    mesh = make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}, jax.devices()[:1])
    model = models.build(c, seq_len=c.data.seq_len, num_classes=10)
    abstract = abstract_state(model, make_optimizer(c, model, mesh).tx, mesh)
    with Checkpointer(str(workdir / "checkpoints"), keep_latest=2, keep_best=1) as checkpointer:
        state = checkpointer.restore(abstract)
    assert int(state.step) == int(match[1]) - 1
    # Being finite is not enough: the step that made them diverge had a finite loss and gradients.
    assert all(np.abs(leaf).max() < 1e3 for leaf in jax.tree.leaves(state.params))
    assert not (workdir / "quarantine").exists()


def test_interrupted_from_the_keyboard(tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    child = trainer.start(trainer.command(workdir), log, forked=False)
    try:
        while log.read_text().count("accuracy") < 8:
            assert child.poll() is None, log.read_text()
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 130, log.read_text()
    finally:
        child.kill()
    message = "Interrupted; the same command continues from the newest checkpoint\n"
    assert message in log.read_text()
    assert "Traceback" not in log.read_text()
    done = trainer.run(trainer.command(workdir))
    assert "starting at step 0" not in done.stdout
    trainer.assert_same_run(workdir, trainer.uninterrupted())


def test_a_run_outlasts_the_readers_of_its_output(tmp_path):
    """As in `python -m spectral_pod.main ... 2>&1 | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    child = processes.Popen(
        trainer.command(tmp_path / "run"), cwd=trainer.ROOT, env=trainer.environment(),
        stdout=writer, stderr=writer,
    )  # fmt: skip
    os.close(writer)
    assert child.wait(timeout=300) == 0
    trainer.assert_same_run(tmp_path / "run", trainer.uninterrupted())


@pytest.mark.parametrize(
    ("place", "errors"),
    [
        ("data", "Storage"),  # written by tensorstore, which raises ValueError
        ("run", "Checkpoint|Storage"),
    ],
)
def test_files_that_may_not_grow(tmp_path, place, errors):
    """The system's limit on their size, as a full disk needs the right to mount one."""
    program = (
        "import resource, runpy, sys; sys.argv.pop(0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "runpy.run_module('spectral_pod.main', run_name='__main__')"
    )
    python, _, _, *flags = trainer.command(tmp_path / "run")
    if place == "data":
        flags.append(f"--config.data.dir={tmp_path / 'data'}")
    done = trainer.run([python, "-c", program, "main", *flags], code=2)
    message = done.stderr.strip().splitlines()[-1]
    assert re.match(f"({errors})Error: ", message)
    for part in (str(tmp_path / place), "File too large", "ulimit -f"):
        assert part in message
    assert "Traceback" not in done.stderr


@contextlib.contextmanager
def small_disk(mount):
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk(tmp_path):
    mount = tmp_path / "disk"
    workdir = mount / "run"
    uninterrupted = trainer.uninterrupted()
    with small_disk(mount):
        command = trainer.command(workdir, "checkpoint.every_steps=4", "checkpoint.keep_latest=99")
        done = trainer.run(command, code=2)
        (message,) = re.findall("^(?:Checkpoint|Storage)Error: .*", done.stderr, re.MULTILINE)
        assert str(workdir) in message
        assert "No space left on device" in message
        assert "spectral_pod/main.py" not in done.stderr  # no traceback of ours
        sound = max(int(path.stem) for path in (workdir / "seals").glob("*.json"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        done = trainer.run(command)
        assert f"starting at step {sound}\n" in done.stdout
        assert (
            trainer.result(workdir)["params_digest"]
            == (trainer.result(uninterrupted)["params_digest"])
        )
