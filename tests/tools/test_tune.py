"""Tuning: what is measured, what is chosen, and that it works as a user runs it."""

import json
import sys

import pytest

from spectral_pod.config import default
from spectral_pod.errors import ConfigError
from spectral_pod.ops.choice import Choice
from tests import trainer
from tools import tune


def config(**fields):
    c = default()
    c.data.task, c.data.seq_len = "listops", 128
    c.model.num_layers, c.model.hidden_dim, c.model.embed_dim = 2, 32, 16
    c.train.global_batch_size = 8
    c.model.memory.head_dim = 8
    c.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
    return c


def shapes(calls):
    return {
        call.operation.name: {name: x.shape for name, x in call.arrays.items()} for call in calls
    }


def test_calls_have_the_sizes_of_one_devices_share():
    found = shapes(tune.called(config(train__grad_accumulation=2, model__memory_interval=2)))
    assert set(found) == {"spectral_filter", "delta_rule"}
    assert found["spectral_filter"] == {"x_BND": (4, 32, 32), "w_FD": (33, 32)}
    assert found["delta_rule"]["k_BNHK"] == (4, 32, 1, 8)
    assert found["delta_rule"]["mask_BN"] == (4, 32)


def test_what_layers_share_is_measured_once_and_what_differs_each():
    blocks = ("hyena+delta", "hyena+gated_delta")
    calls = tune.called(
        config(data__task="copy", model__name="spectral_gpt", model__pattern=blocks)
    )
    names = [call.operation.name for call in calls]
    assert sorted(names) == ["causal_conv", "delta_rule", "delta_rule"]
    assert shapes(calls)["causal_conv"] == {"u_BDN": (8, 32, 128), "h_DT": (32, 128)}
    gated = ["log_gate_BNH" in call.arrays for call in calls if call.operation.name == "delta_rule"]
    assert sorted(gated) == [False, True]


def test_what_communicates_is_refused():
    c = config(mesh__sequence=2, mesh__data=1)
    with pytest.raises(ConfigError, match=r"config\.mesh\.sequence"):
        tune.called(c)


def row(call, method, ms):
    return {"operation": "f", "call": call, "method": method, "ms": ms, "why": "it does not fit"}


def test_the_fastest_computes_every_call():
    rows = [
        row("short", "a", 1.0), row("short", "b", 2.0), row("short", "c", 9.0),
        row("long", "a", None), row("long", "b", 5.0), row("long", "c", 4.0),
    ]  # fmt: skip
    assert tune.fastest(rows) == "b"
    *lines, why = tune._table(rows, "b", Choice("c", "by a count"))
    assert "it does not fit" in lines[3]
    assert why.endswith("b: 1.86 times as fast as c; the configuration takes c (by a count)")


def test_tune(tmp_path):
    path = tmp_path / "tuned.json"
    command = [
        sys.executable, "-m", "tools.tune", "--config=tests/tools/tiny.py", "--repeats=2",
        "--config.model.name=spectral_gpt", "--config.train.global_batch_size=2",
        "--config.model.memory.head_dim=8", "--config.data.task=copy", f"--output={path}",
    ]  # fmt: skip
    done = trainer.run(command, 0, timeout=600)
    report = json.loads(path.read_text())
    (flag,) = report["flags"]
    assert flag.startswith("--config.model.long_conv=")
    assert f"To keep the fastest: {flag}" in done.stdout
    assert report["config"][0] == "--config=tests/tools/tiny.py"
    rows = {row["method"]: row for row in report["rows"]}
    assert set(rows) == {"right_angle", "real", "matmul", "toeplitz"}
    assert rows["toeplitz"]["ms"] is None
    assert "a kernel for TPUs" in rows["toeplitz"]["why"]
    assert all(row["ms"] > 0 for name, row in rows.items() if name != "toeplitz")
    assert flag.partition("=")[2] in rows
