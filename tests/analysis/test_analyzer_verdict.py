"""Which layers are spectral, by what they do: filters of known form, then every mixer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.analysis.analyzer_verdict import verdict
from spectral_pod.config import default
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.long_convolution import LongConvolution
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.ops.wavelet import causal_wavedec
from tests.models.drawn import drawn

N, D = 256, 32
RNG = np.random.default_rng(0)
TAPS = RNG.normal(size=(40, D)) * np.exp(-np.arange(40) / 10)[:, None]
MATRIX = RNG.normal(size=(D, D)) / D**0.5


def convolved(x):
    """Causal, with zeros before the sequence."""
    shifted = [np.pad(x, ((0, 0), (i, 0), (0, 0)))[:, :N] * tap for i, tap in enumerate(TAPS)]
    return np.sum(shifted, axis=0)


def circular(x):
    return np.fft.irfft(np.fft.rfft(x, axis=1) * np.fft.rfft(TAPS, N, axis=0), axis=1)


def chosen(x):
    """Two filters, weighted by how alike neighbouring positions of the sequence are."""
    varying = x - x.mean(axis=1, keepdims=True)
    alike = (varying * np.roll(varying, 1, axis=1)).sum((1, 2), keepdims=True)
    alike = alike / np.maximum(np.square(varying).sum((1, 2), keepdims=True), 1e-6)
    return circular(varying) + 2 * alike * np.roll(circular(varying[..., ::-1]), 5, axis=1)


FIXED = {
    "convolution": (convolved, True),
    "circular convolution": (circular, True),
    "convolution, then channels mixed": (lambda x: convolved(x) @ MATRIX, True),
    "a weak filter beside a skip": (lambda x: x + 0.01 * convolved(x), True),
    "wavelet band": (lambda x: causal_wavedec(jnp.asarray(x), "db4", 2)[1], True),
    "nothing": (lambda x: x, False),
    "gain per channel": (lambda x: x * TAPS[0], False),
    "channels mixed": (lambda x: x @ MATRIX, False),
    "zero": (lambda x: 0 * x, False),
    "square": (np.square, False),
    "modulated": (lambda x: x * np.cos(0.7 * np.arange(N))[:, None], False),
    "convolution squared": (lambda x: convolved(x) ** 2, False),
    "gain that grows": (lambda x: convolved(x) * np.linspace(0, 2, N)[:, None], False),
    "a filter that the other tone changes": (chosen, False),
    "reversed": (lambda x: x[:, ::-1], False),
}


@pytest.mark.parametrize("name", FIXED)
def test_layers_of_known_form(name):
    layer, spectral = FIXED[name]
    found = verdict(layer, N, D)
    assert found.spectral == spectral, found
    assert bool(found.reasons) != spectral


def test_figures_of_a_linear_time_invariant_layer():
    found = verdict(circular, N, D)
    assert found.kept > 0.999
    assert found.shift_error < 1e-5
    assert found.interference < 0.01


def test_white_noise_has_the_share_that_is_covered():
    noise = verdict(lambda x: np.random.default_rng(1).normal(size=x.shape), N, D)
    assert noise.kept == pytest.approx(noise.covered, abs=0.03)


def test_too_few_positions():
    with pytest.raises(ValueError, match="32 positions are too few"):
        verdict(circular, 32, D)


@functools.cache
def initial(cls, causal, overrides):
    model = default().model
    small = {"dtype": "float32", "memory.num_heads": 2, "memory.head_dim": 16}
    model.update_from_flattened_dict(small | dict(overrides))
    config = Architecture.of(model.to_dict(), hidden_dim=D, max_positions=N, causal=causal)
    module = cls.from_config(config, deterministic=True, name="mixer")
    x, mask = jnp.zeros((1, N, D)), jnp.ones((1, N), bool)
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(0), x, mask)).get("params", {})


# The low-rank selective filter is a filter that its input chooses. The 'broadcast' one, the
# original design, is a gain per channel, which an FFT and its inverse around it do not change.
# Hyena's long convolutions are filters, but its gates multiply signals, as wavelet attention does.
# FNet is a transform: a tone becomes a pulse. S5 is a filter by a recurrence, at first a small one
# beside its skip. Delta memories and attention relate positions by their content. Multi-scale
# patches begin at fixed positions, so that shifts change them.
MIXER_VERDICTS = {
    "spectral": ("spectral", False, (), True),
    "spectral, circular": ("spectral", False, (("spectral.padding", "circular"),), True),
    "selective": ("selective", False, (), True),
    "selective, causal": ("selective", True, (), True),
    "selective, broadcast": ("selective", False, (("selective.form", "broadcast"),), False),
    "selective, broadcast, causal": (
        "selective", True, (("selective.form", "broadcast"),), False,
    ),
    "s5": ("s5", True, (), True),
    "s5, both directions": ("s5", False, (), True),
    "hyena": ("hyena", True, (), False),
    "hyena, order 1": ("hyena", True, (("hyena.order", 1),), False),
    "wavelet": ("wavelet", True, (), False),
    "fnet": ("fnet", False, (), False),
    "delta": ("delta", True, (), False),
    "gated_delta": ("gated_delta", True, (), False),
    "attention": ("attention", False, (), False),
    "attention, causal": ("attention", True, (), False),
    "local_attention": ("local_attention", False, (("attention.window", 16),), False),
    "linear_attention": ("linear_attention", False, (), False),
    "linformer": ("linformer", False, (), False),
    "multi_scale": ("multi_scale", False, (), False),
    "gated": ("gated", True, (), False),
    "frequency": ("frequency", True, (), False),
}  # fmt: skip


def test_every_mixer_has_a_verdict():
    assert {case[0] for case in MIXER_VERDICTS.values()} >= set(MIXERS)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MIXER_VERDICTS)
def test_mixers(name, seed):
    mixer, causal, overrides, spectral = MIXER_VERDICTS[name]
    module, params = initial((MIXERS | CHANNEL_MIXERS)[mixer], causal, overrides)
    apply = jax.jit(lambda x: module.apply({"params": params}, x, jnp.ones(x.shape[:2], bool)))
    found = verdict(apply, N, D, seed)
    assert found.spectral == spectral, (found, found.reasons)


@pytest.mark.parametrize("parametrization", ["explicit", "implicit"])
@pytest.mark.parametrize("skip", [False, True])
def test_long_convolutions_are_filters(parametrization, skip):
    """With parameters that are not initial ones."""
    module = LongConvolution(D, N, parametrization, "learned", skip=skip)
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, N, D)))["params"]
    params = jax.tree.map(jnp.asarray, drawn(boxed))
    found = verdict(jax.jit(functools.partial(module.apply, {"params": params})), N, D)
    assert found.spectral, found
