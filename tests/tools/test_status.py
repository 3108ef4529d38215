"""What tools/status.py says of runs whose state is known."""

import json
import os
import sys
import time

import jax.numpy as jnp
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_pod import project_files
from spectral_pod.train.checkpoint import Checkpointer
from tests import trainer
from tests.storage.conftest import bucket, server  # noqa: F401
from tools import status

START = 1.7e9  # seconds since 1970
STEPS = 50


def line(step, **values):
    """A window of 10 s at each step; the loss falls from 2 to 1."""
    loss = 2 - step / STEPS
    return {
        "step": step,
        "train/loss": loss,
        "speed/bytes_per_second": 1000.0 + step,
        "speed/steps_per_second": 0.1,
        "wall_time": START + 10 * step,
    } | values


def start_line(wall_time, step):
    devices = {"processes": 2, "devices": "8 TPU v5e", "mesh": {"data": 8}}
    return {"wall_time": wall_time, "step": step, "code": "1", "jax": "2"} | devices


def at(file, seconds):
    os.utime(file, (seconds, seconds))


@pytest.fixture
def workdir(tmp_path):
    config = {"data": {"task": "listops"}, "model": {"name": "m"}, "train": {"total_steps": 100}}
    recorded = {"config": config, "data_digest": ""}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    at(tmp_path / "config.json", START)
    return tmp_path


def write_lines(workdir, *lines):
    """metrics.jsonl, as old as its newest line."""
    file = workdir / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    at(file, lines[-1]["wall_time"])


def facts_at(workdir, now):
    metrics = project_files.Log(epath.Path(workdir) / "metrics.jsonl", project_files.METRICS)
    return status.facts(str(workdir), metrics, now)


@pytest.mark.parametrize(
    ("last", "age", "state"),
    [
        ({}, 1, "running"),
        ({}, 119, "running"),
        ({}, 121, "stalled"),
        ({}, 1199, "stalled"),
        ({}, 1201, "stopped"),
        ({"wall_time": START + 10 * STEPS + 300}, 600, "running"),  # pauses this long are known
        ({"wall_time": START + 10 * STEPS + 300}, 700, "stalled"),
    ],
)
def test_the_state_is_by_the_age_of_the_metrics(workdir, last, age, state):
    lines = [*map(line, range(1, STEPS)), line(STEPS, **last)]
    write_lines(workdir, *lines)
    assert facts_at(workdir, lines[-1]["wall_time"] + age)["state"] == state


def test_a_run_without_metrics(workdir):
    assert facts_at(workdir, START + 60)["state"] == "starting"
    assert facts_at(workdir, START + 86_400)["state"] == "stopped"


def test_a_restart_is_neither_a_pause_nor_slow(workdir):
    later = START + 1e6
    write_lines(workdir, *map(line, range(1, STEPS)))
    starts = [start_line(at, step) for at, step in ((START, 0), (later, STEPS - 1))]
    (workdir / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    found = facts_at(workdir, later + 60)
    assert found["state"] == "starting"
    assert "starts      2, the last at step 49; 8 TPU v5e of 2 process(es)" in status.report(found)
    assert facts_at(workdir, later + 3600)["state"] == "stopped"
    with open(workdir / "metrics.jsonl", "a") as file:
        for step in range(STEPS, STEPS + 3):
            file.write(json.dumps(line(step, wall_time=later + 20 * (step - STEPS + 1))) + "\n")
    found = facts_at(workdir, later + 61)
    assert found["state"] == "running"
    assert found["eta_seconds"] == pytest.approx(20 * (100 - STEPS - 2))
    assert facts_at(workdir, later + 60 + 201)["state"] == "stalled"


def test_a_finished_run(workdir):
    write_lines(workdir, line(100))
    (workdir / "result.json").write_text(
        json.dumps({"step": 100, "eval": {"split": "test", "loss": 1.0}})
    )
    assert facts_at(workdir, START + 1e6)["state"] == "finished"


def test_a_stall_is_told(workdir):
    write_lines(workdir, *map(line, range(1, STEPS)))
    (workdir / "stalls").mkdir()
    report = workdir / "stalls" / "0.txt"
    report.write_text("stacks")
    at(report, START + 10 * STEPS)
    found = facts_at(workdir, START + 10 * STEPS + 1)
    assert found["state"] == "stalled"
    assert str(report) in found["why"]
    assert [fault for fault in found["faults"] if str(report) in fault]
    write_lines(workdir, *map(line, range(1, STEPS + 20)))  # restarted since
    assert facts_at(workdir, START + 10 * STEPS + 200)["state"] == "running"


def test_figures_of_a_healthy_run(workdir):
    lines = [line(step) for step in range(1, STEPS + 1)]
    more = {
        "goodput/fraction": 0.9,
        "goodput/compile_seconds": 30.0,
        "goodput/data_preparation_seconds": 12.0,
        "host/slowest": 1.0,
    }
    more |= {"host/1/p50_seconds": 0.25, "host/1/p99_seconds": 0.75, "system/host_memory_gb": 2.0}
    evaluations = [
        {"step": step, "wall_time": START + 10 * step, "validation/loss": loss}
        for step, loss in ((20, 0.5), (40, 0.75))
    ]
    write_lines(workdir, *lines[:-1], *evaluations, lines[-1] | more)
    found = facts_at(workdir, START + 10 * STEPS)
    assert (found["step"], found["total_steps"]) == (STEPS, 100)
    assert found["eta_seconds"] == pytest.approx(10 * (100 - STEPS))
    assert found["speed"]["bytes_per_second"] == {"now": 1050.0, "median": 1025.5}
    validation = found["metrics"]["validation"]
    assert validation == {"step": 40, "loss": 0.75, "best_step": 20, "best_loss": 0.5}
    assert found["metrics"]["test"] is None
    assert found["faults"] == []
    assert found["metrics"]["train"] == {
        "step": STEPS, "loss": 1.0, "best_step": STEPS, "best_loss": 1.0
    }  # fmt: skip
    text = "\n".join(status.report(found))
    for part in (
        "m on listops", "running", "50 of 100 (50.0%); done in 8:20 min", "1.05 kB/s",
        "90.0%; compile 30 s; data preparation 12 s", "memory 2 GB", "none yet", "no fault seen",
        "process 1; p50 0.25 s a step; p99 0.75 s",
        "train       loss 1.0000 at step 50; lowest loss 1.0000 at step 50",
        "validation  loss 0.7500 at step 40; lowest loss 0.5000 at step 20",
    ):  # fmt: skip
        assert part in text


def test_faults_are_told(workdir):
    lines = [line(step) for step in range(1, STEPS + 1)]
    lines[30]["train/loss"] = 5.0
    lines[40]["grad_norm/head"] = float("nan")
    bad = [{"step": step, "bad_steps": 1.0, "wall_time": START} for step in (7, 8)]
    back = [{"step": 8, "rollback_to": 5.0, "wall_time": START}]
    write_lines(workdir, *lines[:8], *bad, *back, *lines[8:])
    (workdir / "quarantine").mkdir()
    (workdir / "quarantine" / "20-0.txt").write_text("d/1 is altered\nmore\n")
    faults = facts_at(workdir, START + 1e6)["faults"]
    for part in (
        "2 bad step(s) were skipped, the last is 8", "1 time(s), last from step 8 to 5",
        "1 line(s) of metrics are not finite, the last of step 41",
        "jumped 1 time(s): 5 at step 31", "20-0 is in quarantine: d/1 is altered",
        "no checkpoint",
    ):  # fmt: skip
        assert len([fault for fault in faults if part in fault]) == 1, (part, faults)
    assert len(faults) == 6


def test_noise_is_no_spike():
    noisy = [(step, 1 + 2 * (step * 7919 % 13 / 13)) for step in range(500)]
    assert status._spikes(noisy) == []
    assert status._spikes([*noisy, (500, 9.0)]) == [(500, 9.0)]
    flat = [(step, 1.0) for step in range(500)]
    assert status._spikes([*flat, (500, 1.1)]) == []


def test_checkpoints_are_those_of_the_trainer(workdir):
    write_lines(workdir, line(9))
    state = {"x": jnp.ones(1000)}
    scores = {3: 0.5, 6: 0.75, 9: 0.25}
    folder = workdir / "checkpoints"
    with Checkpointer(str(folder), keep_latest=3, keep_best=1, best_metric="score") as checkpointer:
        for step, score in scores.items():
            checkpointer.save(step, state, {"score": score, "loss": 1.0})
    at(workdir / "seals" / "9.json", START + 90)
    checkpoint = facts_at(workdir, START + 100)["checkpoint"]
    assert checkpoint["step"] == 9
    assert checkpoint["age_seconds"] == pytest.approx(10)
    assert checkpoint["best"] == {"step": 6, "score": 0.75, "loss": 1.0}
    assert checkpoint["unsealed"] == []
    files = [file for file in (folder / "9").rglob("*") if file.is_file()]
    assert checkpoint["bytes"] == sum(file.stat().st_size for file in files)
    (workdir / "seals" / "9.json").rename(workdir / "seals" / "12.json")  # a seal of nothing
    found = facts_at(workdir, START + 1e6)
    assert (found["checkpoint"]["step"], found["checkpoint"]["unsealed"]) == (6, [9])
    assert [fault for fault in found["faults"] if "[9] have no seal" in fault]


@settings(deadline=None)  # the first call imports plotext
@given(cut=st.integers(0, 400), width=st.integers(40, 200))
def test_a_run_that_is_being_written(tmp_path_factory, cut, width):
    workdir = tmp_path_factory.mktemp("run")
    text = "".join(json.dumps(line(step)) + "\n" for step in range(1, 5))
    (workdir / "metrics.jsonl").write_text(text[:cut])
    file = epath.Path(workdir / "metrics.jsonl")
    lines = project_files.Log(file, project_files.METRICS).lines
    complete = [json.loads(part) for part in text[: cut + 1].splitlines()[: text[:cut].count("\n")]]
    assert lines[: len(complete)] == complete
    assert len(lines) <= len(complete) + 1  # one that lacks no more than its end of line
    shown = status.picture(lines, width, colour=False)
    assert bool(shown) == (len(lines) > 1)
    assert "\x1b" not in shown
    assert all(len(row) <= width for row in shown.splitlines())


def test_a_terminal_gets_colours():
    lines = [line(step) for step in range(1, 9)]
    assert "\x1b[" in status.picture(lines, 80, colour=True)


def test_training_and_validation_share_a_panel():
    lines = [line(step) | {"validation/loss": 3.0 + step} for step in range(1, 9)]
    title, *_ = shown = status.picture(lines, 80, colour=False).splitlines()
    assert title.split() == ["loss", "kB", "a", "second"]
    assert [name for name in ("train", "validation") if name in "\n".join(shown)] == [
        "train", "validation",
    ]  # fmt: skip
    assert any("11.0" in row for row in shown)  # the range is that of both


def everything(folder):
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def test_it_reads_only_and_loads_neither_jax_nor_tensorflow(workdir):
    write_lines(workdir, *(line(step) for step in range(1, 9)))
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train/loss": NaN}\n{"step": 10, "tr')
    before = everything(workdir)
    program = (
        "import sys; from tools import status; status.main(sys.argv[1:]); "
        "print(sorted({'jax', 'tensorflow'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = trainer.run([sys.executable, "-c", program, str(workdir)], forked=False)
    assert "step        9 of 100" in done.stdout
    assert "loss" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == "[]\n"
    assert everything(workdir) == before


def test_json_has_the_same_facts(workdir, capsys):
    write_lines(workdir, line(1), {"step": 2, "validation/loss": float("nan"), "wall_time": START})
    assert status.main([str(workdir), "--json"]) == 0

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=no_constant)
    assert found["step"] == 2
    assert found["metrics"]["validation"]["loss"] is None


def test_a_folder_that_is_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        assert status.main([str(folder)]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert "ConfigError" in message
        assert str(folder) in message
        assert "--workdir" in message


def test_a_run_in_storage(workdir, server, bucket):  # noqa: F811
    write_lines(workdir, *(line(step, wall_time=time.time()) for step in range(1, 9)))
    for file in workdir.iterdir():
        bucket.write(f"runs/a/{file.name}", file.read_bytes())
    bucket.write("runs/a/checkpoints/5/x", b"1")
    seal = {"step": 5, "metrics": None, "files": {"x": {"bytes": 1, "sha256": "0" * 64}}}
    bucket.write("runs/a/seals/5.json", json.dumps(seal).encode())
    before = bucket.names()
    command = [sys.executable, "-m", "tools.status", f"{bucket.url}/runs/a", "--json"]
    found = json.loads(trainer.run(server.used_by(command)).stdout)
    assert (found["state"], found["step"]) == ("running", 8)
    assert found["checkpoint"]["step"] == 5
    assert 0 <= found["checkpoint"]["age_seconds"] < 600
    assert bucket.names() == before
    missing = [sys.executable, "-m", "tools.status", f"{bucket.url}/runs/none"]
    assert "is no workdir" in trainer.run(server.used_by(missing), code=2).stderr
