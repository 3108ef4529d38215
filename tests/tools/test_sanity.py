"""tools.sanity: sound models pass, and each one broken on purpose fails for its own reason."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.data import pipeline
from spectral_pod.layers import spectral
from spectral_pod.layers.hyena import HyenaLayer
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.spectral import SpectralLayer
from spectral_pod.parallel import backend
from spectral_pod.train import optim
from tests import trainer
from tools import sanity

PLOTS = {"activations", "gradients", "updates"}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Runs the tool; returns the exit code, the names of unsound checks, and all checks by name."""
    monkeypatch.setattr(backend, "enable_compilation_cache", lambda _: None)  # the tests have one

    def run(model, *flags):
        out = tmp_path / "out"
        arguments = f"--config=tests/tools/sound.py:{model}", f"--out={out}", "--quick"
        code = sanity.main([*arguments, f"--config.data.dir={trainer.home() / 'data'}", *flags])
        printed = capsys.readouterr().out
        report = json.loads((out / "sanity.json").read_text())
        found = {one["name"]: one for one in report["checks"]}
        unsound = {name for name, one in found.items() if not one["sound"]}
        assert report["sound"] == (code == 0) == (not unsound)
        for name in unsound:
            assert f"UNSOUND  {name}: {found[name]['found']}" in printed
            assert f"{name} needs {found[name]['why']}" in printed
        return code, unsound, found

    return run


# The others are slow: each trains a model of its own twice.
@pytest.mark.parametrize(
    ("model", "probe", "plots"),
    [
        ("spectral_model", "padding", {"responses", "gates", "frequencies", "memory"}),
        pytest.param(
            "spectral_gpt", "causality", {"responses", "decays", "gates", "memory"},
            marks=pytest.mark.slow,
        ),
        pytest.param("spectral_llm", "causality", {"gates", "memory"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_sound_model_passes(check, tmp_path, model, probe, plots):
    code, _, found = check(model)
    assert code == 0
    assert {probe, "gradients", "labels follow from inputs"} <= found.keys()
    out = tmp_path / "out"
    assert {file.stem for file in out.glob("*.png")} == PLOTS | plots
    events = trainer.event_accumulators(out / "memorise")["train"]
    shown = {tag.removeprefix("pictures/probes/") for tag in events.Tags()["tensors"]}
    assert PLOTS | plots <= shown
    lines = trainer.metrics(out / "memorise")
    probed = [line["step"] for line in lines if "probes/layer_0/rms" in line]
    assert probed == list(range(0, 100, 10))
    assert lines[-3]["goodput/probe_seconds"] > 0


@pytest.mark.slow
def test_a_leak_into_a_causal_model(check, monkeypatch):
    class Leaky(HyenaLayer):
        def __call__(self, x_BND, mask_BN):
            return super().__call__(x_BND, mask_BN) + 0.1 * jnp.roll(x_BND, -1, axis=1)

    monkeypatch.setitem(MIXERS, "hyena", Leaky)
    code, unsound, found = check("spectral_gpt")
    assert (code, unsound) == (1, {"causality"})
    assert "other later bytes change earlier logits" in found["causality"]["found"]


@pytest.mark.slow
def test_a_dead_layer(check, monkeypatch):
    class Dead(SpectralLayer):
        def __call__(self, x_BND, mask_BN):
            return 0 * super().__call__(x_BND, mask_BN)

    monkeypatch.setitem(MIXERS, "dead", Dead)
    code, unsound, found = check("spectral_model", "--config.model.pattern=('spectral','dead')")
    assert (code, unsound) == (1, {"every layer takes part", "every group is trained"})
    text = found["every layer takes part"]["found"]
    assert "layer_1/dead adds 0.0e+00 of the residual stream" in text
    assert "layer_1 has no gradient for its dynamics parameters" in text
    assert "layer_0" not in text


@pytest.mark.slow
def test_an_exploding_gate(check, monkeypatch):
    def exploding(log_rms_BN1, slope_D, bias_D):
        return jnp.exp(slope_D[None, None] * log_rms_BN1 + bias_D[None, None] + 1)

    monkeypatch.setattr(spectral, "_gate", exploding)
    code, unsound, found = check("spectral_model")
    assert code == 1
    # Its gradient is still that of a sigmoid.
    assert {"gates and decays", "gradients"} <= unsound
    assert "layer_0/spectral/energy_gate_mean is from" in found["gates and decays"]["found"]


@pytest.mark.slow
def test_shuffled_labels(check, monkeypatch):
    rows = pipeline.Batches.rows

    def shuffled(self, step, which):
        batch, records = rows(self, step, which), self.records(step, which)
        order = np.random.default_rng(0).permutation(self.num_records)
        valid = batch["valid"]
        batch["labels"][valid] = self._split.labels[order[records[valid]]]
        return batch

    monkeypatch.setattr(pipeline.Batches, "rows", shuffled)
    code, unsound, _ = check("spectral_model")
    assert (code, unsound) == (1, {"labels follow from inputs"})


@pytest.mark.slow
def test_a_frozen_group(check, monkeypatch):
    schedules = optim.schedules

    def frozen(config):
        return schedules(config) | {"dynamics": lambda step: jnp.float32(0)}

    monkeypatch.setattr(optim, "schedules", frozen)
    code, unsound, found = check("spectral_model")
    assert (code, unsound) == (1, {"every group is trained"})
    text = found["every group is trained"]["found"]
    assert "the dynamics parameters of layer_0 move by 0.0e+00 of their size" in text
    assert "decayed" not in text
