"""The real steps, compiled for absent GPUs: they fit, are estimated, and do not grow.

They need JAX's CUDA plugin, of 2 GB, but no GPU. In an environment of its own:

    pip install -r requirements.txt "jax[cuda13]==0.10.2"
    python -m pytest -m slow tests/multidevice/test_gpu_topologies.py
"""

import importlib.util
import json

import pytest

from tests.tools.test_preflight import preflight

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason='the CUDA plugin is not installed: pip install "jax[cuda13]"',
    ),
]


def report(tmp_path, *arguments, **options):
    path = tmp_path / "report.json"
    done = preflight(tmp_path, *arguments, f"--json={path}", **options)
    return done, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("topology", "hosts", "arguments"),
    [
        ("h100-8", 2, ("--num_slices=2", "--config.mesh.fsdp=2")),
        ("a100-2", 1, ("--config.mesh.fsdp=2",)),
    ],
)
def test_no_collective_grows(topology, hosts, arguments, tmp_path):
    done, found = report(tmp_path, f"--topology={topology}", *arguments)
    assert found["fits"]
    assert found["hosts"] == hosts
    rows = found["collectives"]
    assert {"all-reduce", "all-gather"} <= {row["kind"] for row in rows}
    assert not any(row["scales_with_batch"] for row in rows)
    crossing = [row for row in rows if row["link"] == "DCN"]
    assert bool(crossing) == (hosts > 1)
    assert all("data" in row["axes"] for row in crossing)  # fsdp alone stays within a host
    estimate = found["estimate"]
    assert estimate["step_s"] > found["roofline"]["step_s"] > 0
    assert f"{estimate['launches']:,} launches" in done.stdout
    assert "what was measured on one H100" in done.stdout


def test_attention_is_cudnns_kernel_which_compiles_without_a_gpu(tmp_path):
    path = tmp_path / "step.hlo"
    fields = {"pattern": "attention", "hidden_dim": 64, "dtype": "bfloat16"}
    flags = [f"--config.model.{name}={value}" for name, value in fields.items()]
    preflight(tmp_path, "--topology=h100-2", *flags, f"--hlo={path}")
    calls = {line.partition('custom_call_target="')[2] for line in path.read_text().splitlines()}
    assert {call.partition('"')[0] for call in calls} >= {
        "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward",
    }  # fmt: skip


FORMER = ("--config.model.unroll=1",)
LISTOPS = (*FORMER, "--config.model.remat=full", "--config.model.spectral.method=real")
BATCHED = "--config.model.memory.method=batched"


@pytest.mark.parametrize(
    ("config", "batch", "arguments", "measured_s"),
    [
        ("lra_listops.py", 256, (*LISTOPS, BATCHED), 0.0712),
        ("lra_listops.py", 256, LISTOPS, 0.0654),
        ("lra_listops.py", 256, (), 0.0309),
        ("lm_shakespeare.py:gpu", 64, (*FORMER, BATCHED, "--config.model.long_conv=real"), 0.0633),
        ("lm_shakespeare.py:gpu", 64, (), 0.0307),
    ],
)  # docs/results.md
def test_steps_that_were_measured_on_one_h100(config, batch, arguments, measured_s, tmp_path):
    rows = f"--config.train.global_batch_size={batch}"
    config = f"configs/{config}"
    _, found = report(tmp_path, "--topology=h100-1", rows, *arguments, config=config)
    assert 1 / 1.3 < found["estimate"]["step_s"] / measured_s < 1.3
