"""Long filters: their energy, their reach, and the limits of the original design."""

import jax
import numpy as np
import pytest

from spectral_pod.layers.hyena import HyenaLayer
from spectral_pod.layers.long_convolution import CausalFilter
from spectral_pod.ops.delta_rule import delta_rule
from tests.models.drawn import drawn

TAPS, WIDTH = 2048, 64


def taps(**attributes):
    module = CausalFilter(
        TAPS, **({"parametrization": "explicit", "decay": "learned"} | attributes)
    )
    init = jax.jit(module.init_with_output, static_argnums=1)
    return np.asarray(init(jax.random.key(0), WIDTH)[0], np.float64)


@pytest.mark.parametrize("parametrization", ["explicit", "implicit"])
@pytest.mark.parametrize("decay", ["learned", "fixed"])
def test_filters_have_unit_energy(parametrization, decay):
    """On average over channels, as the shortest have a single tap."""
    energy_D = np.sum(np.square(taps(parametrization=parametrization, decay=decay)), axis=1)
    assert energy_D.mean() == pytest.approx(1, rel=0.35)


def test_the_original_decay_forgets_and_the_default_reaches_the_whole_context():
    """The fixed decay keeps e^-9.2 = 1e-4 of the energy of positions more than 460 back."""
    old = slice(460, None)
    fixed, learned = taps(decay="fixed"), taps()
    assert np.sum(np.square(fixed[:, old])) < 1e-3 * np.sum(np.square(fixed))
    slowest = learned[-1]
    assert np.sum(np.square(slowest[old])) > 0.3 * np.sum(np.square(slowest))
    fastest = learned[0]
    assert np.sum(np.square(fastest[8:])) < 1e-3 * np.sum(np.square(fastest))


def test_the_original_rate_cannot_overwrite():
    """A key that is written twice recalls 0.7 old + 0.3 new if beta is 0.3, and new if it is 1."""
    key, values = np.zeros((2, 1, 3, 1, 4), np.float32)
    key[..., 0] = 1
    values[:] = np.float32([1, 5, 5])[:, None, None]
    for rate, recalled in ((0.3, 0.7 * 1 + 0.3 * 5), (1.0, 5.0)):
        beta = np.float32([1.0, rate, 0.0]).reshape(1, 3, 1)  # the third position only reads
        o = jax.jit(delta_rule)(key, key, values, beta).o_BNHV
        np.testing.assert_allclose(np.asarray(o)[0, 2, 0], recalled, rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_the_published_operator(order):
    """In float64, by the recursion of the paper; the skip is a term of its own there."""
    N, layer = 30, HyenaLayer(8, max_positions=30, order=order)
    x_BND = np.random.default_rng(0).normal(size=(2, N, 8)).astype(np.float32)
    mask_BN = np.ones((2, N), bool)
    params = drawn(jax.eval_shape(layer.init, jax.random.key(0), x_BND, mask_BN)["params"])
    got = jax.jit(layer.apply)({"params": params}, x_BND, mask_BN)

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    parts = np.einsum("bnd,dpe->pbne", x_BND, p["in"]["kernel"]) + p["in"]["bias"][:, None, None]
    taps = p["short"]["short_filter"]
    parts = sum(
        np.pad(parts, [(0, 0), (0, 0), (i, 0), (0, 0)])[:, :, :N] * taps[i][:, None, None]
        for i in range(3)
    )
    *gates, v = parts
    for i, name in enumerate(("long", "long_2")[: max(1, order - 1)]):
        f = p[name]["filter"]
        envelope = np.exp(-np.exp(f["log_decay"])[None] * np.arange(N)[:, None])
        h = f["filter"] * envelope / np.linalg.norm(envelope, axis=0)
        if order > 1:
            v = gates[order - 1 - i] * v
        conv = np.stack([np.einsum("bsd,sd->bd", v[:, t::-1], h[: t + 1]) for t in range(N)], 1)
        v = conv + (f["skip"] * v if order > 1 else 0)
    want = (gates[0] * v) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_a_short_convolution_sees_two_positions_more():
    """If the long filter has one tap, only the short convolution sees earlier positions."""

    def seen(short_conv):
        layer = HyenaLayer(8, max_positions=1, short_conv=short_conv)
        x_BND = np.random.default_rng(0).normal(size=(1, 9, 8)).astype(np.float32)
        others_BND = x_BND + np.float32(np.arange(9) == 4)[:, None]
        mask_BN, apply = np.ones((1, 9), bool), jax.jit(layer.apply)
        params = {"params": jax.jit(layer.init)(jax.random.key(1), x_BND, mask_BN)["params"]}
        moved = np.subtract(*(apply(params, x, mask_BN) for x in (others_BND, x_BND)))
        return np.flatnonzero(np.abs(moved[0]).max(1) > 1e-6).tolist()

    assert seen(1) == [4]
    assert seen(3) == [4, 5, 6]
