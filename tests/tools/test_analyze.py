"""The tool: figures of a run and of a config, filters without bands on its data, and errors."""

import json
import sys

import matplotlib.image
import numpy as np
import pytest

from spectral_pod.train.sources import open_sources
from tests import tiny_run
from tools import analyze

CONFIG = "--config=tests/tools/tiny.py"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on examples that are drawn, with drawn parameters."""
    folder = tmp_path_factory.mktemp("analyzed") / "run"
    config = tiny_run.tiny_config(
        **{"data.task": "copy", "data.seq_len": 64, "train.eval_batch_size": 8,
           "train.global_batch_size": 8, "train.eval_records": 16,
           "train.eval_split": "test"}
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "DIGEST", open_sources(config).digest)
        tiny_run.write_run(folder, config)
    return folder


def test_all_of_a_run(workdir, tmp_path, capsys):
    file, picture = tmp_path / "report.json", tmp_path / "report.png"
    flags = ["--compiled", "--monitor", "--remove_bands", f"--json={file}", f"--plot={picture}"]
    assert analyze.main([f"--workdir={workdir}", *flags]) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    assert {"param_ratio", "compute_ratio", "components"} <= set(report)
    assert 0 < report["compute_ratio"] < report["compiled"]["fft_ratio"] + 0.2 < 1
    assert f"spectral are {report['param_ratio']:.1%} of {report['params']:,} parameters" in out
    assert report["layers"]["layer_0/hyena/long"]["spectral"]
    assert "layer_1/delta" in report["monitor"]["mixers"]
    removed = report["removed_bands"]
    assert set(removed["loss"]) == {"all layers", "layer_0", "layer_1", "layer_2"}
    losses = np.array([list(of_band.values()) for of_band in removed["loss"].values()])
    assert losses.shape == (4, 4)
    assert np.isfinite(losses).all()
    assert (abs(losses - removed["loss_with_all"]) > 1e-6).all()
    assert f"accuracy on test: {removed['with_all']:.2%}" in out
    assert matplotlib.image.imread(picture).std() > 0.05


def test_an_untrained_model(capsys):
    assert analyze.main([CONFIG, "--config.data.seq_len=256"]) == 0
    assert "untrained" in capsys.readouterr().out


def error_of(capsys, *arguments):
    assert analyze.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Error: " in line]
    return line


def test_errors(workdir, tmp_path, capsys, monkeypatch):
    assert "give either --workdir=DIR or" in error_of(capsys)
    assert "give either --workdir=DIR or" in error_of(capsys, CONFIG, f"--workdir={workdir}")
    assert "--remove_bands evaluates a trained model" in error_of(capsys, CONFIG, "--remove_bands")
    assert "at least 64" in error_of(capsys, CONFIG)
    tiny_run.write_run(tmp_path / "other", tiny_run.tiny_config(**{"data.task": "copy"}))
    flags = [f"--workdir={tmp_path / 'other'}", "--monitor"]
    assert "was trained on other data" in error_of(capsys, *flags)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = error_of(capsys, CONFIG, f"--plot={tmp_path / 'x.png'}")
    assert line.startswith("ConfigError: plots need matplotlib")
    assert line.endswith("pip install 'spectral-pod[plots]'")


def test_a_format_that_is_none(workdir, tmp_path, capsys):
    line = error_of(capsys, f"--workdir={workdir}", f"--plot={tmp_path / 'x.nothing'}")
    assert "--plot is" in line
    assert "nothing" in line
