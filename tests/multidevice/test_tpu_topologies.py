"""The real steps, compiled for absent TPU slices, move no more when slice and batch grow.

CPUs and TPUs are partitioned differently, so what `test_collectives.py` finds on fake CPU devices
says little about these. Each test is one run of preflight, which compiles both steps for two sizes
of slice with libtpu.
"""

import importlib.util
import json

import pytest

from tests.tools.test_preflight import preflight

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
ONE_ROW_A_CHIP = ("--config.train.global_batch_size=256", "--config.train.eval_batch_size=256")
MEMORY = (
    "--config.model.memory_interval=2", "--config.model.memory.num_heads=2",
    "--config.model.memory.head_dim=8",
)  # fmt: skip
QUICK = {
    "two slices": ("--topology=v5p-32", "--num_slices=2", "--config.mesh.fsdp=2"),
}
SLOW = {
    "v4:4x4x4": ("--topology=v4:4x4x4", "--config.mesh.fsdp=4"),
    "v5e-256": ("--topology=v5e-256", "--config.mesh.fsdp=4", *ONE_ROW_A_CHIP),
    "v5p-1024": (
        "--topology=v5p-1024", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", *ONE_ROW_A_CHIP,
    ),
    "v6e-16": ("--topology=v6e-16", "--config.mesh.fsdp=2"),
    "tensor": ("--topology=v5p-128", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"),
    "only fsdp": ("--topology=v4-16", "--config.mesh.fsdp=8"),
    "memory": ("--topology=v4:4x4x4", "--config.mesh.fsdp=4", *MEMORY),
    "memory, two slices": (
        "--topology=v5e-16", "--num_slices=2", "--config.mesh.fsdp=4", *MEMORY,
    ),
}  # fmt: skip
CHIPS = {"v4:4x4x4": (64, 16), "v5e-256": (256, 64), "two slices": (32, 8)}


def report(tmp_path, *arguments, **options):
    path = tmp_path / "report.json"
    done = preflight(tmp_path, *arguments, f"--json={path}", **options)
    # Progress, and nothing of what libtpu says to its developers.
    assert all("compiled in" in line for line in done.stderr.splitlines()[1:]), done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_no_collective_grows(name, tmp_path):
    found = report(tmp_path, *(QUICK | SLOW)[name])
    rows = found["collectives"]
    assert found["fits"]
    assert {"all-reduce", "all-gather"} <= {row["kind"] for row in rows}
    assert not any(row["scales_with_batch"] for row in rows + found["eval"]["collectives"])
    assert all(row["axes"] for row in rows if row["count"] * row["bytes"] > 1024)
    if name in CHIPS:
        assert (found["chips"], found["hosts"]) == CHIPS[name]
    estimate, bound = found["estimate"], found["roofline"]
    busy = max(estimate["compiled_s"] + estimate["kernels_s"], estimate["memory_s"])
    assert estimate["step_s"] == pytest.approx(busy + bound["network_s"])
    assert sum(row["share"] for row in estimate["operations"]) <= 1.001
    crossing = [row for row in rows if row["link"] == "DCN"]
    assert bool(crossing) == ("slices" in name)
    assert all(row["axes"][0] == "data" for row in crossing)  # fsdp stays within a slice


@pytest.mark.slow
def test_a_plain_fft_is_seen_to_reduce_the_global_batch(tmp_path):
    plain = "--config.model.spectral.method=plain", "--config.model.num_layers=1"
    found = report(tmp_path, *SLOW["v4:4x4x4"], *plain, code=2)
    grown = [row for row in found["collectives"] if row["scales_with_batch"]]
    assert grown
    for row in grown:
        assert "data" in row["axes"]
        assert "spectral" in row["what"]
        assert "[64," in row["what"]  # every row of the batch, on every chip


@pytest.mark.slow
def test_the_estimate_knows_the_schedules_of_kernels(tmp_path):
    arguments = [
        "--topology=v5e:2x2", "--config.model.num_layers=1", "--config.model.memory_interval=0",
        "--config.data.seq_len=1024", "--price_per_chip_hour=1",
    ]  # fmt: skip
    found = report(tmp_path, *arguments, config="configs/lm_library.py")
    estimate = found["estimate"]
    assert estimate["kernels_s"] > 1e-5
    kernels = {row["what"].partition(": ")[2] for row in estimate["operations"]} - {""}
    assert kernels == {
        "toeplitz_forward", "toeplitz_backward", "short_conv_forward", "short_conv_backward",
    }  # fmt: skip
    assert estimate["step_s"] > found["roofline"]["step_s"]
    hours = 1500 * estimate["step_s"] / 3600
    assert found["cost"] == pytest.approx(hours * 4)
    assert not any("no schedule" in note for note in found["notes"])


SHIPPED = {"v4:4x4x4": 64, "v5e-256": 256, "v5p-1024": 512, "v5p-128 x 2": 128, "cpu-8": 8}
LARGE = ("quickstart.py", "lra_listops.py")
ONE_SLICE = (
    "lm_library.py:gpt", "lm_library.py:llm", "lm_shakespeare.py:gpu", "mqar.py", "memory.py",
    "lra_text.py", "lra_image.py", "lra_pathfinder.py", "lra_retrieval.py",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "topology", "chips"),
    [(config, *item) for config in LARGE for item in SHIPPED.items()]
    + [(config, "v4:4x4x4", 64) for config in ONE_SLICE],
)
def test_no_collective_of_a_shipped_config_grows(config, topology, chips, tmp_path):
    name, _, slices = topology.partition(" x ")
    arguments = [
        f"--topology={name}", f"--num_slices={slices or 1}", "--config.mesh.fsdp=2",
        f"--config.train.global_batch_size={chips}", f"--config.train.eval_batch_size={chips}",
    ]  # fmt: skip
    found = report(tmp_path, *arguments, config=f"configs/{config}")
    assert found["fits"]
    assert not any(
        row["scales_with_batch"] for row in found["collectives"] + found["eval"]["collectives"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("seq_len", "splits"), [(65_536, (4, 64)), (1_048_576, (16, 64))])
def test_long_sequences_fit_and_take_less_of_a_chip_when_split_further(seq_len, splits, tmp_path):
    used = []
    for split in splits:
        rows = 64 // split  # one sequence for each group of chips
        arguments = [
            "--topology=v4-128", f"--config.data.seq_len={seq_len}",
            f"--config.mesh.sequence={split}", f"--config.train.global_batch_size={rows}",
            f"--config.train.eval_batch_size={rows}", "--config.model.remat=full",
            "--config.model.unroll=1",
        ]  # fmt: skip
        found = report(tmp_path, *arguments, config="configs/lra_listops.py")
        assert found["fits"]
        used.append(found["hbm"]["arguments"] + found["hbm"]["temporaries"])
    assert used[1] < used[0] / 2


def test_slices_lie_along_data(tmp_path):
    done = preflight(
        tmp_path, "--topology=v5p-16", "--num_slices=2", "--config.mesh.fsdp=16", code=3
    )
    assert "config.mesh.data is 1, and there are 2 slices" in done.stderr
