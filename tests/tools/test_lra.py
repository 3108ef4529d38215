"""What tools/lra.py runs, in which order, what ends it, and its tables by hand.

Cells are started by a launcher that stands in for the trainer, but in the last test.
"""

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from spectral_pod import command_line, project_files
from spectral_pod.config import to_dict
from tests import trainer
from tests.tools.stand_in import TRAINER, write_result
from tools import lra, lra_report, session
from tools.lra_report import Cell


class Stage:
    """A folder with the stand-in, and the tool that uses it."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        (folder / "trainer.py").write_text(TRAINER)
        self.plan({})

    def plan(self, plan):
        (self.folder / "plan").write_text(json.dumps(plan))

    def argv(self, *flags, tasks="listops,pathfinder", models="spectral,s5"):
        launcher = shlex.join([sys.executable, str(self.folder / "trainer.py")])
        return [
            f"--out={self.out}", "--size=cpu", f"--tasks={tasks}", f"--models={models}",
            f"--launcher={launcher}", *flags,
        ]  # fmt: skip

    def run(self, *flags, **names):
        """The exit code, and the cells that were started."""
        (self.folder / "started").unlink(missing_ok=True)
        code = lra.main(self.argv(*flags, **names))
        started = self.folder / "started"
        return code, started.read_text().split() if started.exists() else []

    def table(self):
        return (self.out / "table.md").read_text()

    def interrupted(self, name, flags=(), step=3):
        """Writes the workdir of a run of the trainer that has ended at a step."""
        cell, workdir = Cell.parse(name), self.out / name
        matrix = lra.Matrix(out=str(self.out), cells=[cell], size="cpu", flags=tuple(flags))
        config = command_line.parse_trainer(matrix.trainer_flags(cell)).config.value
        workdir.mkdir(parents=True)
        run = {"config": to_dict(config), "data_digest": "", "classes": []}
        project_files.RUN.write(epath.Path(workdir / "config.json"), run)
        lines = [{"step": i, "wall_time": 1.0 + i, "train/loss": 1.0} for i in range(1, step + 1)]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "_LOOK_SECONDS", 0.02)
    return Stage(tmp_path)


def test_rows_first_and_only_what_is_missing(stage, capfd):
    code, started = stage.run("--seeds=0,1")
    assert code == 0
    assert started == [
        "listops-spectral-0", "pathfinder-spectral-0", "listops-s5-0", "pathfinder-s5-0",
        "listops-spectral-1", "pathfinder-spectral-1", "listops-s5-1", "pathfinder-s5-1",
    ]  # fmt: skip
    printed = capfd.readouterr()
    assert printed.out == stage.table()
    assert "| **spectral** | 50.00 ± 0.00 | 50.00 ± 0.00 | 50.00 |" in printed.out
    assert "[8 of 8] pathfinder-s5-1: 50.00%" in printed.err
    (stage.out / "listops-s5-0" / "result.json").unlink()
    assert stage.run("--seeds=0,1") == (0, ["listops-s5-0"])
    assert stage.run("--seeds=0,1") == (0, [])


def test_the_commands(stage, capfd):
    sets = ("--set=path_x:data.threads=3", "--set=s5:model.dropout=0.1")
    code, started = stage.run(*sets, "--dry_run", "--", "--config.seed=5", tasks="listops,path_x")
    assert (code, started) == (0, [])
    commands = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
    (of_spectral,) = [c for c in commands if "spectral" in c[2] and "listops" in c[2]]
    (of_s5,) = [c for c in commands if "s5" in c[2] and "path" in c[2]]
    assert of_spectral[2:] == [
        "--config=configs/lra_listops.py:cpu,spectral",
        f"--workdir={stage.out}/listops-spectral-0", "--config.seed=0", "--config.seed=5",
    ]  # fmt: skip
    assert of_s5[2:] == [
        "--config=configs/lra_pathfinder.py:path_x,cpu,s5", f"--workdir={stage.out}/path_x-s5-0",
        "--config.seed=0", "--config.seed=5", "--config.data.threads=3",
        "--config.model.dropout=0.1",
    ]  # fmt: skip
    assert not stage.out.exists()
    assert lra.main([f"--out={stage.out}", "--tasks=text", "--models=fnet", "--dry_run"]) == 0
    command = shlex.split(capfd.readouterr().out)
    assert command[:3] == [sys.executable, "-m", "spectral_pod.main"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--tasks=lists", "--tasks is 'lists'; known are"),
        ("--models=s4", "--models is 's4'; known are"),
        ("--seeds=0,-1", "--seeds is -1; it must be 0 or more"),
        ("--set=listops=3", "--set=listops=3: write --set=NAME:FIELD=VALUE"),
        ("--set=lists:data.threads=3", "--set is 'lists'; "),
        ("--set=listops:data.treads=3", "listops-spectral-0: --config.data.treads=3: the configur"),
        ("--set=s5:model.s5.blocks=7", "listops-s5-0: config.model.s5.state_dim"),
        ("--launcher=nothing-here x", "--launcher: there is no command 'nothing-here' here"),
        ("--launcher='", "--launcher=': No closing quotation"),
    ],
)
def test_mistakes_are_found_before_anything_runs(stage, capfd, flag, message):
    assert stage.run(flag) == (2, [])
    assert f"ConfigError: {message}" in capfd.readouterr().err


def test_a_cell_of_another_configuration(stage, capfd):
    stage.interrupted("listops-s5-0")
    assert stage.run("--", "--config.train.total_steps=5") == (2, [])
    said = capfd.readouterr().err
    assert "listops-s5-0 belongs to a run of another configuration" in said
    assert "config.train.total_steps: 700 there, 5 now" in said
    code, started = stage.run()
    assert code == 0
    assert "listops-s5-0" in started


def test_failed_cells_do_not_stop_the_others(stage, capfd):
    stage.interrupted("pathfinder-s5-0")
    stage.plan({"listops-spectral-0": "fail 1", "pathfinder-s5-0": "fail 137"})
    code, started = stage.run("--seeds=0,1", tasks="listops,pathfinder")
    assert code == 1  # 137 can be restarted, and 1 cannot
    assert len(started) == 8
    said = capfd.readouterr().err
    assert "listops-spectral-0 failed with exit code 1 (a bug: see the traceback)" in said
    assert "    a line before\n    ConfigError: it is broken\n" in said
    assert "- listops-spectral-0: failed (1)\n" in stage.table()
    assert "- pathfinder-s5-0: failed (137, step 3 of 2,000)\n" in stage.table()
    assert "| **spectral** | 50.00 (1 of 2 seeds) |" in stage.table()
    stage.plan({})
    assert stage.run("--seeds=0,1") == (0, ["listops-spectral-0", "pathfinder-s5-0"])


def test_a_task_without_data_is_tried_once(stage, capfd):
    stage.plan({name: "no_data" for name in ("text-spectral-0", "text-s5-0")})
    code, started = stage.run(tasks="text,listops")
    assert (code, started) == (2, ["text-spectral-0", "listops-spectral-0", "listops-s5-0"])
    assert "text has no data: DataError: /files: there is no such file\n" in capfd.readouterr().err
    assert "| **s5** | 50.00 | no data | — |" in stage.table()  # columns are in the usual order
    assert "- text-s5-0: no data\n" in stage.table()


def test_the_end_of_a_run_that_has_data_is_its_own(stage):
    stage.interrupted("text-spectral-0")
    stage.plan({"text-spectral-0": "no_data"})
    code, started = stage.run(tasks="text")
    assert (code, started) == (2, ["text-spectral-0", "text-s5-0"])


def test_a_launcher_that_does_not_wait(stage, capfd):
    stage.plan({"listops-s5-0": "leave"})
    code, started = stage.run(tasks="listops")
    assert (code, started) == (0, ["listops-spectral-0", "listops-s5-0"])
    assert "listops-s5-0: the launcher has ended, and there is no" in capfd.readouterr().err
    assert "- listops-s5-0: not run\n" in stage.table()


def test_the_budget(stage, capfd):
    stage.interrupted("pathfinder-spectral-0")
    stage.plan({"pathfinder-spectral-0": "wait"})
    code, started = stage.run("--budget_minutes=0.05")
    assert (code, started) == (78, ["listops-spectral-0", "pathfinder-spectral-0"])
    assert (stage.folder / "saved").read_text() == "pathfinder-spectral-0"
    assert "The budget ended; 3 cell(s) are not done\n" in capfd.readouterr().err
    table = stage.table()
    assert "| **spectral** | 50.00 | step 3 of 2,000 | — |" in table
    assert "| **s5** | not run | not run | — |" in table
    assert table.endswith(
        "Cells without a result:\n\n- pathfinder-spectral-0: step 3 of 2,000\n"
        "- listops-s5-0: not run\n- pathfinder-s5-0: not run\n"
    )
    stage.plan({})
    code, started = stage.run("--budget_minutes=5")
    assert (code, started) == (0, ["pathfinder-spectral-0", "listops-s5-0", "pathfinder-s5-0"])


def test_a_cell_whose_own_time_is_up_has_not_failed(stage, capfd):
    """By `-- --stop_after_minutes=`; the others go on."""
    stage.interrupted("listops-spectral-0")
    stage.plan({"listops-spectral-0": "fail 78"})
    code, started = stage.run(tasks="listops")
    assert (code, started) == (78, ["listops-spectral-0", "listops-s5-0"])
    assert "| **spectral** | step 3 of 700 | — |" in stage.table()
    assert "its time is up, state saved\n" in capfd.readouterr().err


def test_a_cell_that_does_not_end_is_killed(stage, monkeypatch):
    monkeypatch.setattr(session, "_SAVE_SECONDS", 0.5)
    stage.plan({"listops-s5-0": "wait stubborn"})
    stage.out.mkdir()
    cell = Cell("listops", "s5", seed=0)

    class Stubborn(lra.Matrix):
        def command(self, cell):
            script = [sys.executable, str(stage.folder / "trainer.py")]
            return [*script, f"--workdir={self.workdir(cell)}"]

    matrix = Stubborn(out=str(stage.out), cells=[cell])
    assert session.Session(matrix, budget_minutes=0.05).run() == 78
    assert cell.state == "not run"


def test_the_time_that_is_left(stage):
    """10 s a step: 6,970 s for 697 steps, 7,000 s in all. Of the cells to come one was seen to take
    100 s, and one is taken to take as long as these on average."""
    stage.interrupted("listops-spectral-0")
    file, now = stage.out / "listops-spectral-0" / "metrics.jsonl", time.time()
    lines = [{"step": i, "wall_time": now - 10 * (3 - i), "train/loss": 1.0} for i in (1, 2, 3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = Cell("listops", "s5", seed=0, state="done", facts={"seconds": 100.0})
    names = [("listops", "spectral", 0), ("listops", "s5", 1), ("text", "fnet", 0)]
    first, *rest = [Cell(task, model, seed=seed) for task, model, seed in names]
    matrix = lra.Matrix(out=str(stage.out), cells=[done, first, *rest])
    one = session.Session(matrix, budget_minutes=1.0)
    one._waiting = rest
    said = "step 3 of 700, done in 1:56 h; all cells in about "
    assert one._progress(first, [first]) == f"{said}2:57 h"
    assert one._progress(first, [first, first]) == f"{said}2:26 h"  # (2 x 6,970 + 3,650) / 2
    assert one._progress(rest[0], rest[:1]) == "no metrics yet"


def wait_for(file, process):
    for _ in range(1200):
        if file.exists():
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError(f"{file} does not appear")


def test_ctrl_c_lets_the_cell_save_and_prints_the_tables(stage):
    """The cell hears of it by SIGTERM, which makes it save, even if the terminal signals all."""
    stage.interrupted("pathfinder-spectral-0")
    stage.plan({"pathfinder-spectral-0": "wait"})
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.lra", *stage.argv()], cwd=trainer.ROOT, text=True,
        env=trainer.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    wait_for(stage.folder / "waits", process)
    subprocess.run(["kill", "-s", "INT", "--", f"-{process.pid}"], check=True)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (stage.folder / "saved").read_text() == "pathfinder-spectral-0"
    assert not (stage.folder / "interrupted").exists()
    assert "| **spectral** | 50.00 | step 3 of 2,000 | — |" in out
    assert "- listops-s5-0: not run\n" in out
    assert err.endswith("Interrupted\n")


# ---- tables


def test_tables_by_hand(tmp_path, capfd):
    ladder = {"0": 0.35, "1": 0.6125, "2": 0.74}
    host = [{"system/host_memory_gb": 0.5}, {"system/host_memory_gb": 1.25}, {"train/loss": 1.0}]
    device = [{"system/host_memory_gb": 9.0, "system/device_memory_peak_gb": x} for x in (3, 2)]
    facts = {"num_params": 20_000, "wall_seconds": 1800.0, "ladder": ladder}
    write_result(tmp_path, "listops-spectral-0", 0.60, host, bytes_per_second=1000.0, **facts)
    write_result(tmp_path, "listops-spectral-1", 0.64, [], bytes_per_second=3000.0, **facts)
    facts = {"num_params": 5, "bytes_per_second": 4e6, "wall_seconds": 36.0}
    write_result(tmp_path, "path_x-spectral-0", 0.80, device, **facts)
    write_result(tmp_path, "path_x-spectral-1", 0.92, device, **facts)
    write_result(tmp_path, "path_x-spectral-2", 0.86, device, **facts)
    write_result(tmp_path, "listops-s5-0", 0.30, [], ladder=ladder)
    (tmp_path / "notes").mkdir()
    before = trainer.contents(tmp_path)
    assert lra.main([f"--out={tmp_path}", "--report"]) == 0
    assert trainer.contents(tmp_path) == before
    # 60 and 64: standard deviation 2.83, / sqrt(2) = 2. 80, 86, 92: 6 / sqrt(3) = 3.46.
    assert capfd.readouterr().out == (
        "| model | ListOps | Path-X | mean |\n"
        "|---|---|---|---|\n"
        "| **s5** | 30.00 (below rung 0, 1 of 3 seeds) | not run | — |\n"
        "| s5, published | 62.15 | 98.58 | 80.36 |\n"
        "| **spectral** | 62.00 ± 2.00 (rung 1, 2 of 3 seeds) | 86.00 ± 3.46 | 74.00 |\n"
        "| transformer, published | 36.37 | — | 43.19 |\n"
        "| linformer, published | 35.70 | — | 42.85 |\n"
        "| linear_transformer, published | 16.13 | — | 33.06 |\n"
        "| fnet, published | 35.33 | — | 42.66 |\n"
        "| s4, published | 59.60 | 96.35 | 77.97 |\n"
        "| mega, published | 63.14 | 97.98 | 80.56 |\n"
        "\n"
        "Accuracy in percent on the test split, ± the standard error of the mean over seeds. "
        "Published figures are of full sizes and their data (configs/lra_*.py say what cpu presets "
        "change); their means count 50 where a model is not above chance. "
        "Sources: `tools/lra_report.py`.\n"
        "\n"
        "ListOps: rung k is what evaluating the top k levels of each expression exactly earns "
        "(0: 35.0, 1: 61.3, 2: 74.0).\n"
        "\n"
        "| model | task | parameters | steps | bytes/s | peak memory | hours |\n"
        "|---|---|---|---|---|---|---|\n"
        "| s5 | ListOps | — | 700 | — | — | — |\n"
        "| spectral | ListOps | 20,000 | 700 | 2,000 | 1.25 GB (host) | 0.50 |\n"
        "| spectral | Path-X | 5 | 700 | 4,000,000 | 3.00 GB (device) | 0.01 |\n"
        "\n"
        "Hours are those of each run's last start.\n"
        "\n"
        "Cells without a result:\n"
        "\n"
        "- path_x-s5-0: not run\n"
        "- listops-s5-1: not run\n"
        "- path_x-s5-1: not run\n"
        "- listops-s5-2: not run\n"
        "- path_x-s5-2: not run\n"
        "- listops-spectral-2: not run\n"
    )
    assert lra.main([f"--out={tmp_path}", "--report", "--models=spectral", "--seeds=0,1"]) == 0
    assert "| **spectral** | 62.00 ± 2.00 (rung 1) | 86.00 ± 6.00 | 74.00 |" in (
        capfd.readouterr().out
    )


def test_what_is_not_comparable_says_so(stage, capfd):
    """A model that learns from the values of subtrees, and pairs that are not of papers.

    Answers alone are comparable, wherever their labels stand.
    """
    write_result(stage.out, "listops-s5-0", 0.9, [], supervision="subtrees")
    write_result(stage.out, "listops-fnet-0", 0.8, [], supervision="answers")
    for name, flags in (
        ("retrieval-s5-0", ()), ("retrieval-fnet-0", ("--config.data.options.source=/papers",)),
    ):  # fmt: skip
        stage.interrupted(name, flags)
        (stage.out / name / "result.json").write_text(
            json.dumps({"step": 1, "eval": {"split": "test", "accuracy": 0.5}})
        )
    assert lra.main([f"--out={stage.out}", "--report"]) == 0
    table = capfd.readouterr().out
    assert "| **s5** | 90.00 (process-supervised) | 50.00 (substitute for AAN) |" in table
    assert "| **fnet** | 80.00 | 50.00 | 65.00 |" in table


def test_published_means_are_those_of_the_papers():
    """Which count 50% where a model is not above chance; two are known without Path-X only."""
    means = {"transformer": 53.66, "fnet": 54.42, "s4": 86.09, "s5": 87.46, "mega": 88.21}
    means |= {"linformer": (5 * 51.36 + 50) / 6, "linear_transformer": (5 * 50.55 + 50) / 6}
    cells = [Cell(task, "spectral", seed=0) for task in lra_report.TASKS]
    found = lra_report.summary(cells)["published"]
    assert {name: row["mean"] for name, row in found.items()} == pytest.approx(means, abs=0.011)


def test_what_is_no_cell():
    for name in ("logs", "table.json", "listops-s5", "listops-s5-x", "x-s5-0", "listops--0"):
        assert Cell.parse(name) is None


def test_a_damaged_result_is_named(stage, capfd):
    stage.run(tasks="listops", models="s5")
    (stage.out / "listops-s5-0" / "result.json").write_text("{")
    assert lra.main([f"--out={stage.out}", "--report"]) == 2
    assert "listops-s5-0/result.json cannot be used" in capfd.readouterr().err


# ---- with the trainer itself

QUICK = {
    "train.total_steps": 40, "train.eval_every_steps": 20, "checkpoint.every_steps": 4,
    "optimizer.warmup_steps": 1, "model.num_layers": 1, "model.hidden_dim": 16,
    "model.embed_dim": 8, "model.memory.head_dim": 8, "train.global_batch_size": 8,
    "train.eval_batch_size": 16, "train.log_every_steps": 1, "train.compilation_cache": False,
    "data.options.train": 64, "data.options.validation": 16, "data.options.test": 16,
}  # fmt: skip


@pytest.mark.slow
def test_cells_that_are_trained_interrupted_and_continued(tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "tools.lra", f"--out={out}", "--size=cpu",
        "--tasks=listops,pathfinder", "--models=spectral,s5", "--",
        f"--config.data.dir={tmp_path / 'data'}",
        *(f"--config.{name}={value}" for name, value in QUICK.items()),
    ]  # fmt: skip
    process = trainer.start(command, tmp_path / "log", forked=False)
    second = out / "pathfinder-spectral-0"
    wait_for(second / "seals", process)  # its first checkpoint
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130, (tmp_path / "log").read_text()
    first = (out / "listops-spectral-0" / "result.json").read_bytes()
    table = (out / "table.md").read_text()
    assert "- listops-s5-0: not run\n- pathfinder-s5-0: not run\n" in table
    assert "- pathfinder-spectral-0: step " in table
    done = trainer.run(command, forked=False)
    assert (out / "listops-spectral-0" / "result.json").read_bytes() == first
    starts = (second / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] > 0 for line in starts] == [False, True]
    results = [
        cell for cell in lra_report.found(str(out)) if (cell.read(str(out)), cell.is_done)[1]
    ]
    assert len(results) == 4
    assert all(cell.facts["steps"] == 40 for cell in results)
    assert all(cell.facts["memory"] > 0 for cell in results)
    assert "| **spectral** | " in done.stdout
    assert "Cells without a result" not in done.stdout
    # The continued cell is the run that an uninterrupted one would have been.
    flags = [flag for flag in command if flag.startswith("--config.")]
    alone = tmp_path / "alone"
    config = "--config=configs/lra_pathfinder.py:cpu,spectral"
    trainer.run(
        [sys.executable, "-m", "spectral_pod.main", config, f"--workdir={alone}", *flags],
        forked=False,
    )
    assert trainer.result(alone)["params_digest"] == trainer.result(second)["params_digest"]
