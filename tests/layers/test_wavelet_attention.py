"""Wavelet attention against its definition in float64, and its causality, padding and decoding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from spectral_pod.layers.wavelet_attention import WaveletAttention
from spectral_pod.ops import reference
from spectral_pod.ops.long_conv import METHODS, causal_product, circular_product
from spectral_pod.ops.online_conv import BLOCK, product_advance, product_prefill

WIDTH, HEADS = 8, 2


def layer(dtype="float32", padding="linear"):
    return WaveletAttention(WIDTH, dtype=jnp.dtype(dtype), num_heads=HEADS, padding=padding)


@functools.cache
def parameters():
    """Perturbed, as the initial biases are all equal, and so are the weights of bands."""
    with jax.ensure_compile_time_eval():
        x_BND = jnp.zeros((1, 9, WIDTH))
        init = jax.jit(layer().init)
        params = nn.unbox(init(jax.random.key(0), x_BND, everything(x_BND))["params"])
        rng = np.random.default_rng(0)
        return jax.tree.map(
            lambda x: jnp.asarray(x + np.float32(0.3 * rng.normal(size=x.shape))),
            jax.device_get(params),
        )


@functools.partial(jax.jit, static_argnums=2)
def apply(x_BND, mask_BN, module):
    return module.apply({"params": parameters()}, x_BND, mask_BN)


@functools.partial(jax.jit, static_argnums=2)
def prefill(x_BND, mask_BN, module):
    return module.apply({"params": parameters()}, x_BND, mask_BN, method="prefill")


@functools.partial(jax.jit, static_argnums=1)
def begin(state, length):
    """The partial sums after a prompt, and the state for steps up to `length`."""
    _, sums, block = product_prefill(*(x[None] for x in state.product), length)
    return sums, state._replace(product=of_layer(block))


def of_layer(block):
    return jax.tree.map(lambda x: x[0], block)


@jax.jit
def step(state, x_B1D, position):
    return layer().apply({"params": parameters()}, x_B1D, state, position, method="advance")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def everything(x_BND):
    return np.ones(x_BND.shape[:2], bool)


def definition(x_BND):
    """The definition, with q, k and v of each band separately and direct sums, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters())
    low = np.asarray(pywt.Wavelet("db4").rec_lo)
    low /= low.sum()

    def project(name):
        y = np.einsum("bnd,dhk->bnhk", np.float64(x_BND), p[name]["kernel"]) + p[name]["bias"]
        if name != "value":
            y /= np.sqrt(np.mean(y**2, -1, keepdims=True))
        return reference.causal_wavedec(y.reshape(x_BND.shape), low, 3)

    total = 0
    root = np.sqrt(np.arange(1, x_BND.shape[1] + 1))[:, None]
    bands = zip(project("query"), project("key"), project("value"), p["level_weight"])
    for q_BND, k_BND, v_BND, weight_H in bands:
        c_BND = reference.causal_convolution(q_BND, k_BND) / root
        total += np.repeat(weight_H, WIDTH // HEADS) * c_BND * v_BND
    return total @ p["out"]["kernel"].reshape(WIDTH, WIDTH) + p["out"]["bias"]


@pytest.mark.parametrize("length", [1, 7, 131])
def test_equals_its_definition(length):
    x_BND = random(2, length, WIDTH)
    got, want = apply(x_BND, everything(x_BND), layer()), definition(x_BND)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


def future_share(module, length, i):
    """The largest gradient of output i by later inputs, relative to that by other inputs."""
    gradient_ND = np.abs(gradient_of_output(random(length, WIDTH), i, module))
    return gradient_ND[i + 1 :].max() / gradient_ND[: i + 1].max()


@functools.partial(jax.jit, static_argnums=2)
def gradient_of_output(x_ND, i, module):
    def output(x_ND):
        return jnp.sum(apply(x_ND[None], jnp.ones((1, len(x_ND)), bool), module)[0, i])

    return jax.grad(output)(x_ND)


@pytest.mark.parametrize(("length", "i"), [(101, 0), (101, 63), (257, 100)])
def test_nothing_comes_from_the_future(length, i):
    """Up to the rounding errors of FFTs."""
    assert future_share(layer(), length, i) <= 1e-5


def test_the_circular_product_leaks():
    assert future_share(layer(padding="circular"), 101, 63) > 0.01


def test_positions_after_a_sequence_change_nothing():
    x_BND = random(2, 101, WIDTH)
    mask_BN = np.broadcast_to(np.arange(101) < 77, x_BND.shape[:2])
    alone = apply(x_BND[:, :77], everything(x_BND[:, :77]), layer())
    got = np.asarray(apply(x_BND, mask_BN, layer()))[:, :77]
    np.testing.assert_allclose(got, alone, atol=1e-5)


def test_positions_before_a_prompt_change_nothing():
    """Positions after it do not either, as above, so that the prompts can begin at once."""
    x_BND, starts = random(3, 77, WIDTH), (0, 12, 60)
    mask_BN = np.arange(77) >= np.reshape(starts, (3, 1))
    got = np.asarray(apply(x_BND, mask_BN, layer()))
    begun = [
        np.stack([np.roll(a, -start, axis=0) for a, start in zip(rows, starts)])
        for rows in (x_BND, mask_BN)
    ]
    for row, (start, want) in enumerate(zip(starts, np.asarray(apply(*begun, layer())))):
        np.testing.assert_allclose(got[row, start:], want[: 77 - start], atol=1e-5)


def decode(x_BND, mask_BN, prompt):
    """The outputs of a prompt in one pass, then of the positions after it one by one."""
    length = x_BND.shape[1]
    y_BND, state = prefill(x_BND[:, :prompt], mask_BN[:, :prompt], layer())
    sums, state = begin(state, length)
    outputs = [y_BND]
    for t in range(prompt, length):
        y_B1D, state = step(state, x_BND[:, t : t + 1], t)
        outputs.append(y_B1D)
        if (t + 1) % BLOCK == 0 and t + 1 < length:
            block = jax.tree.map(lambda x: x[None], jax.device_get(state.product))
            sums, block = product_advance(sums, block, t + 1)
            state = state._replace(product=of_layer(jax.device_get(block)))
    return np.concatenate(outputs, 1)


@pytest.mark.parametrize(("length", "prompt"), [(40, 1), (131, 64), (200, 50)])
def test_a_step_equals_the_whole(length, prompt):
    """That is 200 long here: what comes later changes nothing, as above."""
    x_BND = random(3, 200, WIDTH)
    want = np.asarray(apply(x_BND, everything(x_BND), layer()))[:, :length]
    got = decode(x_BND[:, :length], everything(x_BND)[:, :length], prompt)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_steps_after_prompts_of_different_lengths():
    x_BND, starts = random(3, 131, WIDTH), (0, 12, 60)
    mask_BN = np.arange(131) >= np.reshape(starts, (3, 1))
    got, want = decode(x_BND, mask_BN, 64), np.asarray(apply(x_BND, mask_BN, layer()))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(got[row, start:], want[row, start:], atol=1e-4)


def test_what_leaks_cannot_decode():
    x_BND = random(1, 9, WIDTH)
    with pytest.raises(ValueError, match="padding 'circular' sees later positions"):
        prefill(x_BND, everything(x_BND), layer(padding="circular"))


def test_heads_must_divide_the_width():
    x_BND = random(1, 9, 9)
    with pytest.raises(ValueError, match="9 cannot be split into 2 heads"):
        jax.eval_shape(layer().clone(width=9).init, jax.random.key(0), x_BND, everything(x_BND))


def test_bfloat16_is_near_float32_and_has_finite_gradients():
    x_BND = random(2, 300, WIDTH)
    want = apply(x_BND, everything(x_BND), layer())
    got = apply(x_BND.astype(jnp.bfloat16), everything(x_BND), layer("bfloat16"))
    assert got.dtype == jnp.bfloat16
    error = np.asarray(got).astype(np.float32) - want
    assert np.linalg.norm(error) <= 0.03 * np.linalg.norm(want)

    @jax.jit
    @jax.grad
    def gradient(x_BND):
        return jnp.sum(apply(x_BND, everything(x_BND), layer("bfloat16")).astype(jnp.float32))

    for x in (x_BND, np.zeros_like(x_BND), 1e4 * x_BND):
        assert np.isfinite(np.asarray(gradient(x.astype(jnp.bfloat16)))).all()


def test_a_long_coherent_sequence_stays_within_bounds():
    """Equal positions are the worst case: c grows as the square root of the length."""
    x_BND = np.ones((1, 4096, WIDTH), np.float32)
    y_BND = apply(x_BND, everything(x_BND), layer())
    assert np.isfinite(y_BND).all()
    assert np.abs(y_BND).max() <= 64 * 50


# ---- The product of two sequences


@pytest.mark.parametrize("length", [1, 7, 333, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_product_equals_direct_sums_and_their_gradients(length, method):
    q, k, dy = np.random.default_rng(length).normal(size=(3, 2, 3, length))

    @jax.jit
    def run(q, k, dy):
        start_B = jnp.zeros(len(q), jnp.int32)
        y, pullback = jax.vjp(lambda q, k: causal_product(q, k, start_B, method), q, k)
        return y, *pullback(dy)

    def direct(a, b):
        return np.swapaxes(
            reference.causal_convolution(np.swapaxes(a, 1, 2), np.swapaxes(b, 1, 2)), 1, 2
        )

    wants = (
        direct(q, k),
        direct(dy[..., ::-1], k)[..., ::-1],
        direct(dy[..., ::-1], q)[..., ::-1],
    )
    for got, want in zip(run(*(np.float32(a) for a in (q, k, dy))), wants):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_product_of_sequences_that_begin_later():
    q, k = random(2, 2, 3, 55)
    starts, product = np.int32([20, 54]), jax.jit(causal_product)
    begun = np.arange(55) >= starts[:, None, None]
    got = np.asarray(product(q * begun, k * begun, starts))
    for b, start in enumerate(starts):
        alone = product(q[b : b + 1, :, start:], k[b : b + 1, :, start:], np.int32([0]))
        np.testing.assert_allclose(got[b, :, start:], alone[0], atol=1e-5)


def test_the_circular_product_is_the_full_length_one():
    q, k = np.random.default_rng(0).normal(size=(2, 2, 3, 55))
    want = np.fft.irfft(np.fft.rfft(q) * np.fft.rfft(k), 55)
    got = jax.jit(circular_product)(np.float32(q), np.float32(k))
    np.testing.assert_allclose(got, want, atol=1e-4)
