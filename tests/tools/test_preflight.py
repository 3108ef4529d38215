"""Preflight as a user runs it, for fake CPUs: exit codes, the report, and what it stores."""

import functools
import importlib.util
import json
import runpy
import sys

import pytest

from spectral_pod.analysis import hardware
from spectral_pod.analysis.hlo import Collective
from spectral_pod.analysis.roofline import roofline
from spectral_pod.data.tasks import TASKS
from spectral_pod.errors import ConfigError
from tests import processes, trainer
from tools import compiled_step, preflight_report
from tools.bench import slices


def preflight(home, *arguments, code=0, config="tests/tools/tiny.py"):
    """Runs preflight to its end, which must be `code`, with what it remembers below `home`."""
    command = [sys.executable, "-m", "tools.preflight", f"--config={config}", *arguments]
    environment = trainer.environment() | {"HOME": str(home)}
    del environment["PJRT_NPROC"]  # preflight sets it by itself
    done = processes.run(
        command, cwd=trainer.ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def fits(home):
    """(the finished process, its JSON) of the tiny model on eight devices."""
    path, hlo = home / "report.json", home / "step.hlo"
    done = preflight(
        home, "--topology=cpu-8", "--config.mesh.fsdp=2", f"--json={path}", f"--hlo={hlo}",
        "--price_per_chip_hour=2",
    )  # fmt: skip
    return done, json.loads(path.read_text()), hlo.read_text()


def test_the_report_holds_what_it_should(fits):
    done, report, text = fits
    assert report["fits"] is True
    assert (report["chips"], report["hosts"]) == (8, 1)
    hbm = report["hbm"]
    assert set(hbm) == {"capacity", "arguments", "temporaries", "headroom"}
    assert hbm["capacity"] > hbm["headroom"] > 0 < hbm["temporaries"]
    assert set(report["flops"]) == {"lowered", "analytic"}
    assert report["flops"]["lowered"] > report["flops"]["analytic"] > 0  # with remat
    bounds = report["roofline"]
    assert set(bounds) == {"compute_s", "memory_s", "network_s", "step_s", "mfu_ceiling"}
    assert bounds["step_s"] == max(bounds[f"{what}_s"] for what in ("compute", "memory", "network"))
    assert 0 < bounds["mfu_ceiling"] < 1
    assert set(report["estimate"].values()) == {None}
    assert "not estimated" in done.stdout  # without libtpu
    assert "1,000 steps take at least" in done.stdout
    assert report["cost"] == pytest.approx(1000 * bounds["step_s"] / 3600 * 8 * 2)
    assert text.startswith("HloModule jit_train_step")
    assert "FITS" in done.stdout.splitlines()[-1]
    assert done.stderr.count("compiled in") == 4  # two steps, two sizes


def test_the_table_of_collectives(fits):
    rows = fits[1]["collectives"]
    keys = {"kind", "count", "bytes", "axes", "link", "what", "scales_with_batch"}
    assert all(set(row) == keys for row in rows)
    assert not any(row["scales_with_batch"] for row in rows)
    gathers = [row for row in rows if row["kind"] == "all-gather"]
    assert all(row["axes"] == ["fsdp"] and row["link"] == "ICI" for row in gathers)
    names = " ".join(row["what"] for row in rows)
    assert "parameter encoder/convolution/kernel" in names
    assert "gradient of" in names
    filters = [r for r in gathers if "spectral/filter" in r["what"] and "again" not in r["what"]]
    assert sum(r["count"] for r in filters) in (2, 4)  # per layer, real and imaginary perhaps apart


def test_the_second_run_compiles_nothing(home, fits):
    again = home / "again.json"
    done = preflight(
        home, "--topology=cpu-8", "--config.mesh.fsdp=2", f"--json={again}",
        "--price_per_chip_hour=2",
    )  # fmt: skip
    assert "compiled in" not in done.stderr
    assert done.stderr.count("compiled before") == 4
    assert json.loads(again.read_text()) == fits[1]


def test_what_does_not_fit(home):
    done = preflight(
        home, "--topology=cpu-1", "--config.model.hidden_dim=65536", "--config.model.remat=none",
        "--config.train.global_batch_size=2", "--config.train.eval_batch_size=1", code=1,
    )  # fmt: skip
    assert "DOES NOT FIT" in done.stdout
    assert "config.mesh.fsdp=2" in done.stdout
    assert "config.model.remat='full'" in done.stdout


@pytest.mark.slow
def test_a_plain_fft_grows(home):
    path = home / "plain.json"
    plain = "--config.model.spectral.method=plain"
    done = preflight(home, "--topology=cpu-8", plain, f"--json={path}", code=2)
    grown = [row for row in json.loads(path.read_text())["collectives"] if row["scales_with_batch"]]
    assert {row["kind"] for row in grown} == {"all-gather"}
    assert all(row["axes"] == ["data"] and "fft" in row["what"] for row in grown)
    assert "scales with the batch" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v4-12"], "TensorCores"),
        (["--topology=v4-128x"], "did you mean v4-128?"),
        (["--topology=v5e-48"], "the nearest: v5e-32 or v5e-64"),
        (["--topology=v3-32"], "TPU v3 is not supported"),
        (["--topology=cpu-8", "--config.mesh.fdsp=2"], "'fdsp'"),
        (["--topology=cpu-8", "--config.mesh.fsdp=3"], "config.mesh"),
        (["--topology=cpu-8", "--config.train.global_batch_size=12"], "train.global_batch_size"),
        (["--topology=cpu-8", "--config.data.task=listop"], "did you mean 'listops'?"),
        (["--topology=cpu-8", "--config=configs/no_such.py"], "no_such.py"),
        (["--topology=cpu-8", "--num_slices=2"], "one slice"),
        (["--topology=h100-16"], "--topology=h100-8 --num_slices=2"),
        ([], "topology"),
    ],
)
def test_what_is_invalid(home, arguments, message):
    done = preflight(home, *arguments, code=3)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ---- without a process


@pytest.mark.parametrize(
    ("name", "chips", "text"),
    [
        ("v4-8", 4, "v4:2x2x1"), ("v4-128", 64, "v4:4x4x4"), ("v4:4x4x4", 64, "v4:4x4x4"),
        ("v4-512", 256, "v4:4x8x8"), ("v5p-4096", 2048, "v5p:8x16x16"),
        ("v5p-12288", 6144, "v5p:16x16x24"), ("v5e-256", 256, "v5e:16x16"),
        ("v5litepod-16", 16, "v5e:4x4"), ("v6e-64", 64, "v6e:8x8"), ("v6e-8", 8, "v6e:2x4"),
        ("cpu-8", 8, "cpu-8"), ("h100-8", 8, "h100-8"), ("H200-1", 1, "h200-1"),
        ("a100-4", 4, "a100-4"), ("tpu7x-128", 64, "tpu7x:4x4x4"), ("v5e-1", 1, "v5e:1x1"),
        ("v4-640", 320, "v4:4x4x20"), ("v5p:2x2x4", 16, "v5p:2x2x4"),
    ],
)  # fmt: skip
def test_names_of_topologies(name, chips, text):
    topology = hardware.parse(name)
    assert (topology.num_chips, str(topology)) == (chips, text)
    if topology.half():
        assert 2 * topology.half().num_chips == chips


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v4-100", "v4-64 or v4-128"), ("v5e-250", "v5e-128 or v5e-256"), ("v6-64", "v6e-64"),
        ("v5-256", "v5p-256"), ("v4:4x4", "v4:2x2x4"), ("v5litepod-17", "v5e-16 or v5e-32"),
        ("slice", "names look like"), ("v4:3x3x3", "v4:2x2x4 or v4:2x4x4"), ("cpu-0", "cpu-1"),
        ("v6e:32x16", "nearest: v6e:16x16"), ("v5e:4x64", "nearest: v5e:16x16"),
        ("v5e-48", "v5e-32 or v5e-64"), ("v4:8x4x4", "nearest: v4:4x4x8"),
        ("v4:2x2x8", "nearest: v4:2x4x4"), ("v5p-13824", "v5p-12288"), ("v4-0", "v4-8"),
        ("v7x-128", "did you mean tpu7x-128"), ("trillium-256", "names look like"),
        ("v2-8", "v2 is not supported.*There are v4"), ("v3:2x2", "v3 is not supported"),
        ("h100-16", "h100-8 --num_slices=2"), ("h100:2x4", "hosts have h100-1 to h100-8"),
        ("h10-8", "did you mean h100-8"),
    ],
)  # fmt: skip
def test_unknown_topologies(name, hint):
    with pytest.raises(ConfigError, match=hint):
        hardware.parse(name)


@pytest.mark.parametrize("family", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_what_is_sold_is_reached_by_halving(family):
    """From the largest slice of powers of two down to a host, by slices that exist."""
    chip = hardware.CHIPS[family]
    topology, seen = hardware.parse(f"{family}-{2**8 * chip.cores}"), [2**8]
    while topology := topology.half():
        again = hardware.parse(f"{family}:{str(topology).partition(':')[2]}")
        assert again == topology
        assert again.double().num_chips == 2 * again.num_chips == seen[-1]
        seen.append(topology.num_chips)
    assert seen[-1] == chip.chips_per_host


def test_a_chip_of_two_devices():
    topology = hardware.parse("tpu7x:2x2x1")
    assert (topology.num_chips, topology.num_devices) == (4, 8)
    assert hardware.parse("v4:2x2x1").num_devices == 4


def test_several_hosts_of_gpus():
    topology = hardware.parse("h100-8", 2)
    assert (topology.num_chips, str(topology)) == (16, "h100-8 x 2 hosts")
    assert str(topology.half()) == "h100-4 x 2 hosts"
    assert topology.double() is None  # there are no larger hosts


def test_a_missing_cuda_plugin(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"without having one: `pip install \"jax\[cuda13\]==\d"):
        hardware.devices(hardware.parse("h100-8"))


def test_a_missing_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"without having one, on Linux: `pip install \"jax\[tpu\]"
    ):
        hardware.devices(hardware.parse("v4-8"))


def test_every_task_knows_its_classes():
    for name, task in TASKS.items():
        assert task().num_classes >= 2, name


def test_the_roofline_by_hand():
    chip = hardware.CHIPS["v5e"]
    gather = functools.partial(Collective, "all-gather", 10**9, (), "", axes=("fsdp",))
    bound = roofline(
        matrix_work=197e12,
        traffic=819e9 / 2,
        collectives=[
            gather(count=3, group_size=4),
            Collective("all-reduce", 10**9, (), "", link="DCN", group_size=2),
            Collective("all-reduce", 10**9, (), "", link="DCN", group_size=8, sharers=4),
        ],
        analytic_flops=98.5e12,
        chip=chip,
    )
    assert (bound.compute_s, bound.memory_s) == (1.0, 0.5)
    # Four chips share a host's network; those that share a reduction send its result once.
    ici, dcn = 3 * 0.75e9 / 200e9, (4 * 2 * 0.5e9 + 2 * 0.875e9) / 12.5e9
    assert bound.network_s == pytest.approx(ici + dcn)
    assert (bound.step_s, bound.mfu_ceiling) == (1.0, 0.5)


MESSAGE = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM"
SIZED = f"{MESSAGE}, the total memory required for HLO temporaries (800.00G) exceeds available HBM."


@pytest.mark.parametrize(("message", "temporaries"), [(MESSAGE, None), (SIZED, 800 * 2**30)])
def test_what_is_unknown_if_compiling_runs_out_of_memory(message, temporaries):
    topology, zeros = hardware.parse("cpu-1"), dict.fromkeys(compiled_step._MEMORY, 0)
    config = runpy.run_path(str(trainer.ROOT / "tests/tools/tiny.py"))["get_config"]()
    setup = compiled_step.set_up(config, topology, ("train",))
    failed = {"train": compiled_step.Compiled("", zeros, message)}
    report = preflight_report.make(setup, failed, {}, (setup, failed), price_per_chip_hour=1.0)
    data = report.data
    assert not data["fits"]
    assert not report.grows
    assert data["collectives"] is None
    assert data["eval"] == {"hbm": None, "collectives": None}
    assert data["hbm"]["temporaries"] == temporaries
    assert (data["hbm"]["headroom"] or -1) < 0
    assert data["flops"]["lowered"] is None
    assert {*data["roofline"].values(), *data["estimate"].values()} == {None}
    assert "cost" not in data
    assert "collectives unknown, as it did not compile" in report.text
    assert "no collectives" not in report.text
    assert ("temporaries unknown" in report.text) == (temporaries is None)
    assert (
        "growth of collectives isn't checked, as the step did not compile for cpu-1" in report.text
    )
    assert message in report.text
    assert "DOES NOT FIT" in report.text
    json.dumps(data)


def test_quick_compiles_one_step(home):
    path = home / "quick.json"
    done = preflight(home, "--topology=cpu-8", "--config.mesh.fsdp=2", "--quick", f"--json={path}")
    found = json.loads(path.read_text())
    assert done.stderr.count("compiled") == 1
    assert found["eval"] == {"hbm": None, "collectives": None}
    assert "--quick: growth of collectives isn't checked" in found["notes"]
    assert "the evaluation step was not compiled" in done.stdout.splitlines()[-1]
    assert "eval step" not in done.stdout


def test_a_row_of_the_table_of_slices():
    report = {
        "chips": 4, "mesh": {"data": 2, "fsdp": 2, "tensor": 1}, "fits": True,
        "hbm": {"capacity": 100, "headroom": 75}, "tokens_per_second": 1e6,
        "roofline": {"step_s": 1.0, "mfu_ceiling": 0.5}, "estimate": {"step_s": 2.0},
    }  # fmt: skip
    # Half a million bytes a second: 100 GB take 55.6 hours of four chips.
    assert slices._row(report, 1.0) == [
        "4", "data=2 fsdp=2", "25%", "1 s", "2 s", "50.0%", "25.0%", "500,000", "$222",
    ]  # fmt: skip
    unknown = report | {
        "fits": False, "hbm": {"capacity": 100, "headroom": None}, "roofline": {"step_s": None},
    }  # fmt: skip
    assert slices._row(unknown, 1.0)[2:] == ["?, does not fit", *["?"] * 6]
