"""An interrupted run ends with bit-identical parameters and the same curves."""

import copy
import random
import shutil
import time

import pytest

from spectral_pod.errors import Preempted
from spectral_pod.train import loop
from spectral_pod.train.trainer import Trainer
from tests import trainer


def unsealed(workdir):
    """The checkpoints that are being written."""
    steps = {path.name for path in (workdir / "checkpoints").glob("*")}
    return steps - {path.stem for path in (workdir / "seals").glob("*.json")}


def phase(workdir, log):
    """The phase of a run, as far as its files and output show it."""
    lines = log.read_text().splitlines()
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    if unsealed(workdir):
        return f"writing checkpoint {', '.join(unsealed(workdir))}"
    if steps:
        return f"step {steps[-1]}"
    if any("starting at step" in line for line in lines):
        return "compiling"
    return "starting up"


def wait_until(child, log, condition):
    while not condition():
        assert child.poll() is None, f"ended before it was killed:\n{log.read_text()}"
        time.sleep(0.002)


def kill(child, workdir, log, moment, rng):
    """Kills a run at a random moment of the given kind; returns the phase it was in."""
    if moment == "any":
        time.sleep(rng.uniform(0, 4))
    elif moment == "compile":
        wait_until(child, log, lambda: "starting at step" in log.read_text())
        time.sleep(rng.uniform(0, 4))
    elif moment == "step":
        windows = rng.randint(8, 14)  # the first checkpoint is sealed before step 10
        wait_until(child, log, lambda: log.read_text().count("accuracy") >= windows)
        time.sleep(rng.uniform(0, 0.1))
    elif moment == "save":
        for _ in range(rng.randint(0, 3)):
            wait_until(child, log, lambda: unsealed(workdir))
            wait_until(child, log, lambda: not unsealed(workdir))
        wait_until(child, log, lambda: unsealed(workdir))
        time.sleep(rng.uniform(0, 0.02))
        wait_until(child, log, lambda: unsealed(workdir))
    child.kill()
    child.wait()
    return phase(workdir, log)


def run_with_kills(workdir, moments, *overrides):
    """Kills and starts a run again by the same command until it ends; returns the phases."""
    command, log = trainer.command(workdir, *overrides), workdir.with_suffix(".log")
    rng = random.Random(len(moments))
    phases = []
    for moment in moments:
        child = trainer.start(command, log)
        try:
            phases.append(kill(child, workdir, log, moment, rng))
        finally:
            child.kill()
        print(f"kill {len(phases)} ({moment}): {phases[-1]}", flush=True)
    done = trainer.run(command)
    resumed = next(line for line in done.stdout.splitlines() if "starting at" in line)
    print(f"started for the last time: {resumed}")
    assert not resumed.endswith("step 0")
    return phases


def test_the_same_command_twice_gives_the_same_run(tmp_path):
    """Also where JAX would make floats float64 by default."""
    workdir = tmp_path / "run"
    trainer.run(["env", "JAX_ENABLE_X64=1", *trainer.command(workdir)], forked=False)
    trainer.assert_same_run(workdir, trainer.uninterrupted())
    steps = [line["step"] for line in trainer.curves(workdir) if "train/loss" in line]
    assert steps == sorted({1, *range(2, 41, 2), *range(5, 41, 5)})


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    workdir = tmp_path / "run"
    run_with_kills(workdir, ["step", "save"])
    trainer.assert_same_run(workdir, trainer.uninterrupted())


@pytest.mark.slow
def test_ten_kills(tmp_path):
    """With a delta memory and a compilation cache of its own, so that some kills fall into
    compilation."""
    moments = ["any", "compile", "step", "save", "any", "step", "save", "compile", "save", "step"]
    own = ("train.total_steps=160", "train.compilation_cache=True", "model.memory_interval=1")
    phases = run_with_kills(tmp_path / "run", moments, *own)
    assert sum(phase.startswith("writing") for phase in phases) >= 3
    trainer.assert_same_run(tmp_path / "run", trainer.uninterrupted(*own))


@pytest.mark.slow
def test_lines_do_not_depend_on_where_sigterm_came(tmp_path, monkeypatch):
    """Between two lines, whose means are of more steps than the run that continues takes."""
    check, signals = Trainer.check_for_shutdown, []

    def terminated(self, **options):
        if self.step in signals:
            signals.remove(self.step)
            raise Preempted  # as after the signal, which cannot be sent to a step
        check(self, **options)

    monkeypatch.setattr(Trainer, "check_for_shutdown", terminated)
    config = trainer.get_config()
    config.data.dir = str(trainer.home() / "data")
    config.train.total_steps, config.train.log_every_steps = 12, 6
    config.checkpoint.every_steps = 100
    loop.run(copy.deepcopy(config), str(tmp_path / "whole"))
    signals.append(9)
    with pytest.raises(Preempted, match="step 9 is saved"):
        loop.run(copy.deepcopy(config), str(tmp_path / "parts"))
    loop.run(copy.deepcopy(config), str(tmp_path / "parts"))
    trainer.assert_same_run(tmp_path / "parts", tmp_path / "whole")
    lines = [line["step"] for line in trainer.metrics(tmp_path / "parts") if "train/loss" in line]
    assert lines == [1, 6, 12]


def test_a_damaged_checkpoint_is_reported_and_left_out(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trainer.uninterrupted(), workdir)
    (workdir / "result.json").unlink()
    files = [path for path in (workdir / "checkpoints" / "40").rglob("*") if path.is_file()]
    damaged = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)

    done = trainer.run(trainer.command(workdir))
    name = damaged.relative_to(workdir / "checkpoints" / "40")
    quarantine = workdir / "quarantine" / "40-0"
    report = f"checkpoint step 40 is not sound: {name} is altered; moved to {quarantine}"
    assert report in done.stderr
    assert (quarantine / name).read_bytes() == data
    assert "starting at step 35" in done.stdout
    trainer.assert_same_run(workdir, trainer.uninterrupted())


def test_a_finished_run_started_again_only_reports(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trainer.uninterrupted(), workdir)
    before = {path: path.read_bytes() for path in workdir.glob("[cms]*/**/*") if path.is_file()}
    (workdir / "result.json").unlink()
    done = trainer.run(trainer.command(workdir))
    assert "starting at step 40" in done.stdout
    assert "step 41" not in done.stdout
    assert "40/40" not in done.stdout
    after = {path: path.read_bytes() for path in workdir.glob("[cms]*/**/*") if path.is_file()}
    assert after == before
    trainer.assert_same_run(workdir, trainer.uninterrupted())
