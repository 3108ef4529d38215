"""SpectralAnalyzer against figures by hand, and what it says of activations and filters."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

import spectral_pod
from spectral_pod import models
from spectral_pod.analysis import analyzer_bands
from spectral_pod.analysis.analyzer import SpectralAnalyzer
from spectral_pod.analysis.analyzer_shares import shares
from spectral_pod.analysis.flops import train_flops
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.generate.restore import Trained, one_device
from spectral_pod.models.model import abstract_params
from spectral_pod.shapes import PAD, VOCAB_SIZE
from tests.models.drawn import drawn_params
from tests.tiny_run import tiny_config

B, N, D = 4, 96, 16


def analyzer_of(name="spectral_gpt", **overrides):
    """Of a small model with drawn parameters."""
    small = {"train.global_batch_size": B, "model.name": name, "model.dtype": "float32"}
    config = tiny_config(**small | overrides)
    sizes = {"num_classes": 10, "vocab_size": VOCAB_SIZE}
    module = models.build(config, **sizes, decoding=True)
    params = jax.tree.map(jnp.asarray, drawn_params(module))
    return SpectralAnalyzer(
        Trained(config, one_device(), module, params, 0, *sizes.values(), "", [])
    )


@functools.cache
def gpt():
    return analyzer_of()


@functools.cache
def classifier():
    pattern = ("spectral+delta", "selective", "s5")
    return analyzer_of(
        "spectral_model",
        **{"model.pattern": pattern, "model.s5.state_dim": 4, "model.s5.blocks": 2},
    )


def tokens(seed=0):
    drawn = np.random.default_rng(seed).integers(0, 256, (3, N))
    drawn[1, 60:] = PAD
    return drawn


# ---- Shares


def test_spectral_gpt_by_hand():
    found = gpt().analyze_architecture()
    components, fft = found["components"], 2.5 * 2 * N * np.log2(2 * N)
    hyena = components["layer_0/hyena"]
    # Taps, decays and skips; projections to three and from one, and short convolutions are not.
    assert hyena["spectral_params"] == N * D + D + D
    assert hyena["params"] - hyena["spectral_params"] == 4 * D * D + 4 * D + 3 * 3 * D
    # A transform of the sequences and back, and one of the filters; four projections.
    assert hyena["spectral_flops"] == pytest.approx((2 * B + 1) * D * fft)
    assert hyena["flops"] - hyena["spectral_flops"] == pytest.approx(2 * B * N * 4 * D * D)
    for name in ("layer_1/delta", "layer_0/feed_forward", "head", "embedding", "norm"):
        assert components[name]["spectral_params"] == components[name]["spectral_flops"] == 0
    # A third layer beyond the repeated pattern counts as well.
    assert found["param_ratio"] == pytest.approx(3 * (N * D + 2 * D) / found["params"])
    assert found["compute_ratio"] == pytest.approx(3 * (2 * B + 1) * D * fft / found["flops"])


def test_a_classifier_by_hand():
    components = classifier().analyze_architecture()["components"]
    positions = N // 4
    F, fft = positions + 1, 2.5 * 2 * positions * np.log2(2 * positions)
    spectral = components["layer_0/spectral"]
    # A real and an imaginary part per frequency; the energy gate is a factor in time.
    assert spectral["spectral_params"] == 2 * F * D
    assert spectral["params"] == 2 * F * D + 2 * D
    assert spectral["flops"] == spectral["spectral_flops"] == pytest.approx(2 * B * D * fft)
    selective = components["layer_1/selective"]
    assert selective["spectral_params"] == 2 * F * D * 9
    assert selective["spectral_flops"] == pytest.approx(9 * 2 * B * D * fft)
    assert selective["flops"] > selective["spectral_flops"]
    s5 = components["layer_2/s5"]
    # Eigenvalues, steps, and B, which their exponentials scale; not C and D.
    assert s5["spectral_params"] == 2 * 4 + 4 + D * 2 * 4
    assert s5["spectral_flops"] == 0
    assert s5["flops"] > 0


def test_harmonics_and_wavelet_attention():
    analyzer = analyzer_of("spectral_llm", **{"model.hyena.filter": "implicit",
                                           "model.channel_mixer": "frequency"})  # fmt: skip
    components = analyzer.analyze_architecture()["components"]
    embedding = components["embedding"]
    assert embedding["params"] == embedding["spectral_params"] > 0  # of sines
    wavelet, fft = components["layer_0/wavelet"], 2.5 * 2 * N * np.log2(2 * N)
    assert wavelet["spectral_params"] == 0
    assert wavelet["spectral_flops"] == pytest.approx(3 * B * D * fft)  # of q, of k and back
    mixed = components["layer_0/feed_forward"]
    implicit = 33 * 64 + 64 * 64 + 64 * D + D  # an MLP of the lag, and decays
    assert mixed["spectral_params"] == implicit
    making = 2 * N * (33 * 64 + 64 * 64 + 64 * D)
    assert mixed["spectral_flops"] == pytest.approx((2 * B + 1) * D * fft + making)


@pytest.mark.parametrize("make", [gpt, classifier])
def test_the_components_are_the_model(make):
    trained, found = make().trained, make().analyze_architecture()
    assert found["params"] == sum(x.size for x in jax.tree.leaves(trained.params))
    model = models.build(
        trained.config, num_classes=trained.num_classes, vocab_size=trained.vocab_size
    )
    params = nn.unbox(abstract_params(model, one_device()))
    forward = train_flops(trained.config, params, trained.num_classes, trained.vocab_size) / 3
    assert found["flops"] == pytest.approx(forward)
    json.dumps(found)


def test_the_compiled_program_has_the_same_transforms():
    """In the defining form, with XLA's own count of its operations."""
    plain = {"model.long_conv": "real", "model.memory.method": "recurrent"}
    analyzer = analyzer_of(**plain)
    found, compiled = analyzer.analyze_architecture(), analyzer.analyze_compiled()
    assert compiled["flops"]["fft"] == pytest.approx(found["spectral_flops"])
    assert compiled["fft_ratio"] == pytest.approx(found["compute_ratio"], rel=0.02)


def test_a_program_by_its_flow_alone():
    """Names play no part: a filter called 'kernel', a kernel called 'filter', in a loop."""

    def program(params, x):
        def turn(carry, _):
            spectrum = jnp.fft.rfft(carry) * jnp.fft.rfft(params["kernel"] * params["factor"])[None]
            return jnp.fft.irfft(spectrum, 8) @ params["filter"], None

        y, _ = jax.lax.scan(turn, x, length=3)
        waves = params["amplitude"] * jnp.sin(params["angle"])
        return jnp.tanh(y * params["gain"][None]) + waves[None]

    vectors = ("kernel", "factor", "gain", "amplitude", "angle")
    params = {name: np.ones(8, np.float32) for name in vectors}
    params["filter"] = np.ones((8, 8), np.float32)
    found = shares(program, params, np.ones((2, 8), np.float32))
    spectral = {name for name, share in found.items() if share.spectral_params}
    assert spectral == {"kernel", "factor", "amplitude", "angle"}
    fft = 2.5 * 8 * 3
    assert found["model"].spectral_flops == 3 * (2 + 1 + 2) * fft
    assert found["model"].flops - found["model"].spectral_flops == 3 * 2 * 2 * 8 * 8


# ---- Verdicts of a model's layers


def test_layers_of_a_model():
    found = gpt().verify()
    assert {name for name, layer in found.items() if layer["spectral"]} == {
        f"layer_{i}/hyena/long" for i in range(3)
    }
    assert all(bool(layer["reasons"]) != layer["spectral"] for layer in found.values())
    json.dumps(found)


def test_sequences_too_short_to_verify():
    with pytest.raises(ConfigError, match=r"24 positions; .* at least 64: raise config\.data"):
        classifier().verify()


def test_what_is_no_model():
    with pytest.raises(ConfigError, match="takes a model of spectral_pod, not int"):
        spectral_pod.SpectralAnalyzer(3)


# ---- Activations


def test_band_energies_of_tones():
    t, mask = np.arange(120)[None, :, None], np.ones((1, 120), bool)

    def of(x):
        x = np.broadcast_to(np.float32(x), (1, 120, 2))
        return {k: float(v) for k, v in analyzer_bands.band_energies(x, mask).items()}

    low, middle, high = (np.cos(2 * np.pi * f * t) for f in (0.1, 0.25, 0.45))
    mixed = of(low + 2 * middle + 3 * high + 4)
    total = 0.5 * (1 + 4 + 9) + 16
    assert mixed["rms"] == pytest.approx(total**0.5, rel=1e-4)
    assert mixed["middle"] == pytest.approx(2 / total, rel=1e-4)
    assert mixed["high"] == pytest.approx(4.5 / total, rel=1e-4)
    assert mixed["constant"] == pytest.approx(16 / total, rel=1e-4)
    assert mixed["low"] == pytest.approx((16 + 0.5) / total, rel=1e-4)
    # Alternating signs are the highest frequency, which has no negative.
    assert of((-1.0) ** t + low)["high"] == pytest.approx(1 / 1.5, rel=1e-4)
    assert of(0 * t)["rms"] == 0


def test_levels_are_those_of_pywavelets():
    x = np.random.default_rng(0).normal(size=(2, 128, 3)).astype(np.float32)
    mask = np.arange(128) < np.array([[128], [70]])
    found = analyzer_bands.level_energies(x, mask)
    want = pywt.wavedec(np.where(mask[..., None], x, 0), "db4", "periodization", axis=1)
    energies = np.array([np.square(c).sum() for c in want])
    np.testing.assert_allclose(found, energies / energies.sum(), rtol=1e-4)


def test_monitor():
    found = classifier().monitor(tokens())
    mixers = ["spectral", "delta", "selective", "s5"]
    assert {name.partition("/")[2] for name in found} == {*mixers, "feed_forward"}
    spectral, delta = found["layer_0/spectral"], found["layer_0/delta"]
    for side in ("input", "output"):
        bands = [spectral[side][band] for band in analyzer_bands.BANDS]
        assert sum(bands) == pytest.approx(1, abs=1e-5)
        assert sum(spectral[side]["levels"]) == pytest.approx(1, abs=1e-5)
    assert spectral["input"]["rms"] == pytest.approx(1, abs=0.1)  # after a norm
    assert 0 < spectral["energy_gate_mean"]["min"] <= spectral["energy_gate_mean"]["max"] < 1
    assert delta["memory_norm"]["mean"] > 0
    assert 0 < delta["stream_share"] < 1
    json.dumps(found)


def test_padding_changes_nothing_that_is_monitored():
    row = tokens()[1:2]
    short, padded = (classifier().monitor(x)["layer_0/spectral"] for x in (row[:, :60], row))
    assert short["input"]["rms"] == pytest.approx(padded["input"]["rms"], rel=1e-4)
    assert short["output"]["rms"] == pytest.approx(padded["output"]["rms"], rel=1e-4)


@pytest.mark.parametrize("batch", [[[1.5] * 8], [1, 2], [[1, 2, 3]], [[1] * 2 * N], [[]]])
def test_what_is_no_batch(batch):
    with pytest.raises(DataError, match=r"integers \[B, L\], L a multiple of 4 up to 96"):
        classifier().monitor(batch)


def test_monitor_shows_the_weights_of_wavelet_levels():
    analyzer = analyzer_of("spectral_llm")
    layer = analyzer.trained.params["layer_1"]["wavelet"]
    layer["level_weight"] = jnp.asarray([[1.0, 3.0], [2.0, 2.0], [0.0, 0.5]])
    found = analyzer.monitor(tokens())
    assert found["layer_1/wavelet"]["level_weights"] == [2.0, 2.0, 0.25]
    assert sum(found["layer_0/wavelet"]["band_share"]) == pytest.approx(1, abs=1e-4)


# ---- Filters


def applied(analyzer, filters, seed=0):
    trained, x = analyzer.trained, jnp.asarray(tokens(seed), jnp.int32)

    @jax.jit
    def apply(filters):
        with analyzer_bands.with_filters(trained.params, filters) as params:
            return trained.module.apply({"params": params}, x, x != PAD)

    return np.asarray(apply(filters))


@pytest.mark.parametrize("make", [gpt, classifier])
def test_a_models_own_filters_change_nothing_and_others_do(make):
    analyzer = make()
    filters = analyzer.filters()
    wanted = {
        gpt: {f"layer_{i}/hyena/long/filter" for i in range(3)},
        classifier: {"layer_0/spectral", "layer_1/selective"},
    }
    assert set(filters) == wanted[make]
    x = jnp.asarray(tokens(), jnp.int32)
    trained = analyzer.trained
    plain = np.asarray(trained.module.apply({"params": trained.params}, x, x != PAD))
    np.testing.assert_allclose(applied(analyzer, filters), plain, rtol=1e-4, atol=1e-4)
    for path in filters:
        changed = {**filters, path: 0 * filters[path]}
        assert np.abs(applied(analyzer, changed) - plain).max() > 1e-5


@pytest.mark.parametrize("band", analyzer_bands.BANDS)
def test_a_transfer_function_without_a_band_stops_its_tones(band):
    w = np.ones((65, 2), np.complex64)
    kernel = np.fft.irfft(analyzer_bands.without_band(w, band), axis=0)
    for name, (low, high) in analyzer_bands.BANDS.items():
        tone = np.cos(2 * np.pi * round(128 * (low + high) / 2) / 128 * np.arange(128))
        heard = np.fft.irfft(np.fft.rfft(tone) * np.fft.rfft(kernel[:, 0]))
        expected = 0 if name == band else 1
        assert np.linalg.norm(heard) / np.linalg.norm(tone) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("band", analyzer_bands.BANDS)
def test_causal_taps_without_a_band(band):
    h = np.random.default_rng(0).normal(size=(5, 128)).astype(np.float32)
    removed = analyzer_bands.without_band(h, band)
    assert removed.shape == h.shape
    power = np.abs(np.fft.rfft([h, removed], 4096, axis=2)) ** 2  # between the taps' frequencies
    frequency = np.fft.rfftfreq(4096)
    low, high = analyzer_bands.BANDS[band]
    inside = (frequency >= low) & (frequency <= high)
    assert power[1][:, inside].sum() < 1e-3 * power[0][:, inside].sum()
    # What else was there stays, up to the width of a transition.
    outside = (frequency < low - 0.02) | (frequency > high + 0.02)
    assert power[1][:, outside].sum() > 0.9 * power[0][:, outside].sum()


def test_filters_given_by_taps_lose_a_band():
    analyzer = analyzer_of(
        "spectral_model",
        **{"model.pattern": ("spectral",), "model.spectral.parametrization": "time",
           "model.num_layers": 1},
    )  # fmt: skip
    filters = analyzer.filters()
    changed = {path: analyzer_bands.without_band(w, "low") for path, w in filters.items()}
    assert np.abs(applied(analyzer, changed) - applied(analyzer, filters)).max() > 1e-4
