"""What tools/ablate.py runs, at a time and of which fields, and its table by hand.

Cells are started by a launcher that stands in for the trainer, but in the last test.
"""

import json
import os
import shlex
import sys

import pytest

from tests import trainer
from tests.tools.stand_in import TRAINER, write_result
from tools import ablate, levers, session

CONFIG = "--config=configs/lra_listops.py:short"

# Notes when it starts and ends, and on which cores.
SLOW_TRAINER = """
import json, os, pathlib, sys, time
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
start = time.monotonic()
time.sleep(1)
workdir.mkdir()
(workdir / "result.json").write_text(json.dumps({
    "step": 7, "eval": {"split": "validation", "accuracy": 0.5},
}))
(workdir / "when").write_text(json.dumps([start, time.monotonic(), *os.sched_getaffinity(0)]))
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "_LOOK_SECONDS", 0.02)
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "plan").write_text("{}")
    return tmp_path


def run(stage, *flags):
    """The exit code, and the cells that were started."""
    launcher = shlex.join([sys.executable, str(stage / "trainer.py")])
    (stage / "started").unlink(missing_ok=True)
    code = ablate.main([CONFIG, f"--out={stage / 'out'}", f"--launcher={launcher}", *flags])
    started = stage / "started"
    return code, started.read_text().split() if started.exists() else []


def test_seeds_first_and_only_what_is_missing(stage, capfd):
    variants = "--variants=base,stride_4,stride_4+noise"
    code, started = run(stage, variants, "--seeds=0,1")
    assert code == 0
    names = ["base", "stride_4", "stride_4+noise"]
    assert started == [f"{name}-{seed}" for seed in (0, 1) for name in names]
    assert capfd.readouterr().out == (stage / "out" / "table.md").read_text()
    for picture in ("accuracy.png", "curves.png"):
        assert (stage / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert run(stage, variants, "--seeds=0,1,2") == (0, [f"{name}-2" for name in names])


def test_the_fields_of_a_variant(stage, capfd):
    flags = [
        "--variants=base,stride_4+wide,wide+no_memory", "--lever=wide:model.hidden_dim=128",
        "--lever=wide:config.model.embed_dim=128", "--set=base:train.total_steps=50",
    ]  # fmt: skip
    assert run(stage, *flags, "--dry_run", "--", "--config.train.eval_split=test") == (0, [])
    lines = capfd.readouterr().out.splitlines()
    of_cell = {}
    for line in lines:
        words = shlex.split(line)[2:]
        of_cell[words[1].rpartition("/")[2]] = words[2:]
    start, wide = (
        ["--config.seed=0", "--config.train.eval_split=validation"],
        ["--config.model.hidden_dim=128", "--config.model.embed_dim=128"],
    )
    end = ["--config.train.eval_split=test"]
    assert of_cell == {
        "base-0": [*start, *end, "--config.train.total_steps=50"],
        "stride_4+wide-0": [*start, *end, "--config.model.patch.stride=4", *wide],
        "wide+no_memory-0": [*start, *end, *wide, "--config.model.memory_interval=0"],
    }


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--variants=bass", "--variants: a lever is 'bass'; "),
        ("--variants=base,stride_4+", "--variants: a lever is ''; "),
        ("--levers=gates", "--levers is 'gates'; "),
        ("--lever=wide", "--lever=wide: write --lever=NAME:FIELD=VALUE"),
        ("--lever=a/b:model.hidden_dim=4", "--lever=a/b:model.hidden_dim=4: a name has letters"),
        ("--set=stride_4:data.threads=3", "--set is 'stride_4'; "),
        ("--seeds=x", "give --variants=base,..., or --levers=GROUP"),
    ],
)
def test_mistakes_are_found_before_anything_runs(stage, capfd, flag, message):
    variants = () if "levers" in flag or "variants" in flag or "seeds" in flag else (
        "--variants=base",
    )  # fmt: skip
    assert run(stage, *variants, flag) == (2, [])
    assert f"ConfigError: {message}" in capfd.readouterr().err


def test_every_lever_is_a_valid_configuration(stage, capfd):
    """Of the configuration that the docstring names; parsed and checked, not run."""
    assert run(stage, f"--levers={','.join(levers.LEVERS)}", "--dry_run") == (0, [])
    printed = capfd.readouterr()
    number = 1 + sum(map(len, levers.LEVERS.values()))
    assert len(printed.out.splitlines()) == number, printed.err


def test_the_table_by_hand(tmp_path, capfd):
    """Differences are taken seed by seed: 1, 3 and 2 points, whose error is 1 / sqrt(3)."""
    log = [
        {"train/accuracy": 0.5, "speed/steps_per_second": 100.0},
        {"validation/accuracy": 0.4, "speed/steps_per_second": 50.0},
        {"train/accuracy": 0.75, "speed/steps_per_second": 50.0},
    ]
    facts = {"num_params": 20_000, "wall_seconds": 90.0}
    for seed, (base, other, third) in enumerate([(40, 41, 45), (44, 47, 35), (42, 44, 46)]):
        write_result(tmp_path, f"base-{seed}", base / 100, log, **facts)
        write_result(tmp_path, f"smooth-{seed}", other / 100, log)
        write_result(tmp_path, f"noise-{seed}", third / 100, [])
    for name, value in (("base-0", 0.1), ("base-1", 0.2), ("base-2", 0.6)):
        file = tmp_path / name / "result.json"
        result = json.loads(file.read_text())
        result["eval"]["accuracy_sm"] = value
        file.write_text(json.dumps(result))
    (tmp_path / "notes").mkdir()
    before = trainer.contents(tmp_path)
    command = [f"--out={tmp_path}", "--report"]
    assert ablate.main([*command, "--variants=base,smooth,noise", "--seeds=0,1,2,3"]) == 0
    assert trainer.contents(tmp_path) == before
    # Of 45, 35, 46: mean 42, deviation 6.08, / sqrt(3) = 3.51; differences 5, -9, 4: 0 +- 4.51.
    assert capfd.readouterr().out == (
        "| variant | accuracy | difference | training | sm | parameters | steps | ms a step "
        "| minutes | peak memory |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
        "| base | 42.00 ± 1.15 (3 of 4) | — | 75.0 | 30.0 | 20,000 | 700 | 20.0 | 1.5 | — |\n"
        "| smooth | 44.00 ± 1.73 (3 of 4) | +2.00 ± 0.58 | 75.0 | — | — | 700 | 20.0 | — | — |\n"
        "| noise | 42.00 ± 3.51 (3 of 4) | +0.00 ± 4.51 (within error) | — | — | — | 700 | — "
        "| — | — |\n"
        "\n"
        "Accuracy in percent on the test split, ± the standard error of the mean over 3 seed(s). "
        "Differences are from base, seed by seed; within error is less than 2 standard errors. "
        "Minutes are those of each run's last start.\n"
        "\n"
        "Cells without a result:\n\n- base-3: not run\n- smooth-3: not run\n- noise-3: not run\n"
    )
    assert ablate.main([*command, "--seeds=2"]) == 0
    assert "| noise | 46.00 | +4.00 (one seed) |" in capfd.readouterr().out


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux has cores to share")
def test_jobs_run_at_a_time_on_cores_of_their_own(stage):
    (stage / "trainer.py").write_text(SLOW_TRAINER)
    cores = sorted(os.sched_getaffinity(0))
    assert run(stage, "--variants=base,noise", "--seeds=0,1", "--jobs=2")[0] == 0
    assert sorted(os.sched_getaffinity(0)) == cores
    notes = {path.parent.name: json.loads(path.read_text()) for path in stage.glob("out/*/when")}
    assert len(notes) == 4
    first, second = notes["base-0"], notes["noise-0"]
    assert first[0] < second[1]  # each started before the other ended
    assert second[0] < first[1]
    assert sum(start < second[0] or end < first[1] for start, end, *_ in notes.values()) <= 2
    if len(cores) > 1:
        assert len(first[2:]) == len(cores) // 2
        assert not set(first[2:]) & set(second[2:])


def test_the_budget_saves_all_that_run(stage, capfd):
    (stage / "plan").write_text(json.dumps({"base-0": "wait", "noise-0": "wait"}))
    flags = ("--variants=base,noise,smooth", "--jobs=2", "--budget_minutes=0.05")
    code, started = run(stage, *flags)
    assert code == 78
    assert sorted(started) == ["base-0", "noise-0"]
    said = capfd.readouterr().err
    assert said.count("the budget ends; saving") == 2
    assert "The budget ended; 3 cell(s) are not done" in said


@pytest.mark.slow
def test_variants_that_are_trained(tmp_path):
    """A model without the mixing of positions is worse at ListOps than one with it, and says so."""
    flags = {
        "train.total_steps": 30, "train.eval_every_steps": 15, "checkpoint.every_steps": 15,
        "optimizer.warmup_steps": 1, "model.num_layers": 1, "model.hidden_dim": 16,
        "model.embed_dim": 8, "train.global_batch_size": 8, "train.eval_batch_size": 16,
        "train.log_every_steps": 1, "train.compilation_cache": False, "data.options.train": 64,
        "data.options.validation": 16, "data.options.test": 16, "data.dir": tmp_path / "data",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "tools.ablate", CONFIG, f"--out={tmp_path / 'out'}", "--jobs=2",
        "--variants=no_memory,no_memory+stride_4", "--seeds=0,1", "--",
        *(f"--config.{name}={value}" for name, value in flags.items()),
    ]  # fmt: skip
    done = trainer.run(command, forked=False)
    assert "| no_memory+stride_4 | " in done.stdout
    assert "Cells without a result" not in done.stdout
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    row = table["variants"]["no_memory"]
    assert (row["seeds"], row["split"], row["steps"]) == (2, "validation", 30)
    assert [step for step, _ in row["curve"]] == [15, 30]
    assert row["milliseconds"] > 0
