"""What layers show of themselves, against what is computed from outside; and that it costs nothing
where nobody asks."""

import functools
import sys

import jax
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.generate.restore import one_device
from spectral_pod.layers.block import Block
from spectral_pod.layers.delta_memory import DeltaMemoryLayer
from spectral_pod.layers.long_convolution import LongConvolution
from spectral_pod.layers.probes import BANDS, PROBES
from spectral_pod.layers.spectral import SpectralLayer
from spectral_pod.models.model import probed
from spectral_pod.objectives import Classification, NextByte
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import abstract_state
from spectral_pod.train.step import abstract_batch, jit_train_step
from tests.models.drawn import drawn, drawn_params
from tests.tiny_run import tiny_config

B, N, D = 2, 40, 6
# Together they have every mixer and channel mixer that shows something.
SHOWING = {
    "gpt": {"model.memory.gated": True, "model.channel_mixer": "frequency"},
    "llm": {"model.name": "spectral_llm", "model.remat": "full"},
    "classifier": {
        "model.name": "spectral_model",
        "model.pattern": ("spectral", "selective", "s5"),
        "model.selective.energy_gate": "rms",
        "model.channel_mixer": "half_glu1",
    },
}
KINDS = {
    "gpt": {"decay", "response", "beta_mean", "clip_share", "memory_norm", "gate_rms",
            "convolution_share"},
    "llm": {"band_share", "beta_mean"},
    "classifier": {"energy_gate_mean", "gate_mean", "decay", "response", "frequency_share"},
}  # fmt: skip


def config_of(name):
    return tiny_config(**{"train.global_batch_size": B, "model.dtype": "float32"} | SHOWING[name])


def inputs(seed=0):
    """x [B, N, D] with values of every size in invalid positions, and the mask."""
    x = np.random.default_rng(seed).normal(size=(B, N, D)).astype(np.float32)
    mask = np.arange(N)[None] < np.array([[N], [N // 2]])
    return np.where(mask[..., None], x, 1e3 * x), mask


def shown(module, *arguments, change=lambda params: params):
    """(the probes that a module sows itself, its output, its parameters)."""
    key = jax.random.key(0)
    params = change(drawn(jax.eval_shape(module.init, key, *arguments)["params"]))
    apply = jax.jit(functools.partial(module.apply, mutable=[PROBES]))
    output, sown = apply({"params": params}, *arguments)
    return sown[PROBES], np.asarray(output), params


@pytest.mark.parametrize("name", SHOWING)
def test_a_program_without_probes_has_no_trace_of_them(name, monkeypatch):
    def text():
        config, mesh = config_of(name), one_device()
        model = models.build(config, num_classes=257)
        optimizer = make_optimizer(config, model, mesh)
        abstract = abstract_state(model, optimizer.tx, mesh)
        objective = NextByte if model.causal else Classification
        batch = abstract_batch(B, config.data.seq_len, mesh, by_position=objective.by_position)
        with on_mesh(mesh):
            step = jit_train_step(model, optimizer, objective, config, mesh, abstract)
            return step.lower(abstract, batch).as_text()

    with_probes = text()
    probing = [m for m in list(sys.modules.values()) if hasattr(m, "probe") and "spectral_pod" in
               getattr(m, "__name__", "")]  # fmt: skip
    assert len(probing) > 8
    for module in probing:
        if module.__name__ != "spectral_pod.layers.probes":
            monkeypatch.setattr(module, "probe", lambda *_: None)
    assert with_probes == text()


@pytest.mark.parametrize("name", SHOWING)
def test_padding_does_not_show_and_layers_are_named_as_apart(name):
    config = config_of(name)
    model = models.build(config, num_classes=10)
    params = drawn_params(model)
    rng = np.random.default_rng(0)
    mask = np.arange(config.data.seq_len)[None] < np.array([[config.data.seq_len], [48]])
    first, second = (np.where(mask, 7, rng.integers(0, 256, mask.shape)) for _ in range(2))
    show = jax.jit(functools.partial(probed, model))
    one, other = (show({"params": params}, tokens, mask) for tokens in (first, second))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert np.isfinite(value).all(), key
        np.testing.assert_allclose(value, other[key], rtol=1e-4, atol=1e-5, err_msg=key)
    expected = {f"layer_{i}/rms" for i in range(config.model.num_layers)}
    assert expected <= one.keys()
    assert KINDS[name] <= {key.rpartition("/")[2] for key in one}


def test_the_energy_gate_shows_its_mean():
    bias = np.linspace(-3, 3, D).astype(np.float32)

    def constant(params):
        return params | {"energy_slope": np.zeros(D, np.float32), "energy_bias": bias}

    layer = SpectralLayer(D, max_positions=N, causal=False)
    probes, _, _ = shown(layer, *inputs(), change=constant)
    np.testing.assert_allclose(probes["energy_gate_mean"], 1 / (1 + np.exp(-bias)), rtol=1e-5)


def test_a_filter_shows_the_share_of_frequencies_that_it_uses():
    """Those at which a single part of a single channel is not zero are among them."""

    def some(params):
        filter_2FD = np.zeros((2, N + 1, D), np.float32)
        filter_2FD[1, [3, 17], 2] = filter_2FD[0, 40, :] = 1e-30
        return params | {"filter": filter_2FD}

    layer = SpectralLayer(D, max_positions=N, causal=False)
    probes, _, _ = shown(layer, *inputs(), change=some)
    assert probes["frequency_share"] == np.float32(3 / (N + 1))


def test_the_response_is_that_of_an_impulse():
    module = LongConvolution(D, 2 * BANDS, "explicit", "learned", skip=True)
    impulse = np.zeros((1, 2 * BANDS, D), np.float32)
    impulse[:, 0] = 1
    probes, y_BND, params = shown(module, impulse)
    gain_FD = np.abs(np.fft.rfft(np.float64(y_BND[0]), 4 * BANDS, axis=0)) ** 2
    # 2 * BANDS + 1 frequencies: the last is of half a cycle, alone between two bands.
    index = np.arange(len(gain_FD)) * BANDS // len(gain_FD)
    expected = [np.sqrt(gain_FD[index == band].mean(axis=0)) for band in range(BANDS)]
    np.testing.assert_allclose(probes["filter"]["response"], np.array(expected).T, rtol=1e-3)
    alpha = np.exp(np.float64(params["filter"]["log_decay"]))
    np.testing.assert_allclose(probes["filter"]["decay"], np.exp(-alpha), rtol=1e-5)


def test_the_memory_shows_what_it_holds_and_clips():
    # A limit that some writes exceed.
    memory = DeltaMemoryLayer(D, num_heads=2, head_dim=4, clip=0.8, method="recurrent")
    x, mask = inputs()
    params = drawn(jax.eval_shape(memory.init, jax.random.key(0), x, mask)["params"])

    def read(module, x, mask):
        return module.prefill(x, mask)[1]

    apply = functools.partial(memory.apply, mutable=[PROBES, "metrics"], method=read)
    state, sown = jax.jit(apply)({"params": params}, x, mask)
    probes, (share,) = sown[PROBES], sown["metrics"]["clipped_writes"]
    assert 0.1 < float(share) < 0.9
    np.testing.assert_allclose(np.mean(probes["clip_share"]), share, rtol=1e-5)
    norms = np.linalg.norm(np.asarray(state.memory_BHVK).reshape(B, 2, -1), axis=-1).mean(axis=0)
    np.testing.assert_allclose(probes["memory_norm"], norms, rtol=1e-5)
    logits = x[mask] @ params["beta"]["kernel"] + params["beta"]["bias"]
    beta = (1 / (1 + np.exp(-logits))).mean(axis=0)
    np.testing.assert_allclose(probes["beta_mean"], beta, rtol=1e-3)


def test_a_block_shows_the_size_of_the_stream_and_of_what_each_mixer_adds():
    config = config_of("classifier")
    architecture = models.architecture(config)
    x = np.random.default_rng(1).normal(size=(B, 24, architecture.hidden_dim)).astype(np.float32)
    mask = np.arange(24)[None] < np.array([[24], [9]])

    class First(Block):
        def __call__(self, x_BND, mask_BN):
            return super().__call__(x_BND, mask_BN)[0]

    probes, y, _ = shown(First(architecture, "spectral", True), x, mask)
    np.testing.assert_allclose(probes["rms"], np.sqrt(np.mean(y[mask] ** 2)), rtol=1e-4)
    # One mixer, its gate within the branch: all that the block adds.
    added = np.sqrt(np.mean((y - x)[mask] ** 2))
    np.testing.assert_allclose(probes["spectral_rms"], added, rtol=1e-4)
