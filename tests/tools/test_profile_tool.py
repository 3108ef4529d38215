"""What tools/profile.py measures, on a model that takes no time."""

import json

import pytest

from tests import trainer
from tools import profile

CONFIG = f"--config={trainer.ROOT}/tests/tools/tiny.py"


def test_own_times_of_nested_operations():
    """A loop of 10 with bodies of 3 and 4, one of which has a part of 1; then another operation."""
    events = [(0, 10, "loop"), (1, 3, "a"), (5, 4, "b"), (6, 1, "part"), (10, 2, "after")]
    found = sorted(profile.own_times(reversed(events)))
    assert found == [("a", 3), ("after", 2), ("b", 3), ("loop", 3), ("part", 1)]


def test_lengths_against_attention(tmp_path, capfd):
    # In bfloat16 JAX's attention promotes dtypes when it is differentiated, which tests forbid.
    argv = [CONFIG, "--config.model.dtype=float32", f"--out={tmp_path}", "--lengths=128,64"]
    assert profile.main([*argv, "--against=attention", "--repeats=1"]) == 0
    report = json.loads((tmp_path / "profile.json").read_text())
    steps = {(x["variant"], x["length"]): x for x in report["steps"]}
    assert list(steps) == [(v, n) for n in (64, 128) for v in ("base", "attention")]
    assert steps["base", 64]["rows"] == 2 * steps["base", 128]["rows"]
    for figures in steps.values():
        rate = figures["rows"] * figures["length"] / figures["milliseconds"] * 1e3
        assert figures["bytes_per_second"] == pytest.approx(rate)
        assert figures["memory_gb"] > 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    layers = dict(report["layers"])
    assert any("spectral" in name or "block" in name for name in layers)
    assert all(ms >= 0 for ms in layers.values())
    printed = capfd.readouterr().out
    assert "| bytes | rows | base, ms | kB/s | GB | attention, ms | kB/s | GB | times as" in printed


@pytest.mark.slow
def test_what_takes_too_long_is_left_out(tmp_path, capfd):
    argv = [CONFIG, f"--out={tmp_path}", "--lengths=64,128", "--repeats=1", "--limit_seconds=1e-9"]
    assert profile.main(argv) == 0
    assert "| 128 | — | left out | — | — |" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lengths=64,x", "--lengths is 'x'"),
        ("--lengths=63", "config.data.seq_len is 63"),
        ("--against=hyenas", "--against: a lever is 'hyenas'"),
    ],
)
def test_mistakes_are_named(tmp_path, capfd, flag, message):
    assert profile.main([CONFIG, f"--out={tmp_path}", flag]) == 2
    assert message in capfd.readouterr().err
