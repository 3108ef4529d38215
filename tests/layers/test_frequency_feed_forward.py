"""The frequency feed-forward against its definition, and its causality, padding and decoding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.layers.feed_forward import FrequencyFeedForward, GatedFeedForward
from spectral_pod.layers.long_convolution import CausalFilter, FilterCache
from spectral_pod.ops import reference
from spectral_pod.ops.online_conv import BLOCK, filter_advance, filter_prefill, plan_filter

WIDTH, CONTEXT = 8, 160


def layer(padding="linear"):
    return FrequencyFeedForward(WIDTH, CONTEXT, expansion=2.0, padding=padding)


@functools.cache
def parameters():
    with jax.ensure_compile_time_eval():
        x_BND = jnp.zeros((1, 9, WIDTH))
        init = jax.jit(layer().init)
        params = nn.unbox(init(jax.random.key(0), x_BND, everything(x_BND))["params"])
        return params | {"mix": jnp.float32(0.7)}


@functools.partial(jax.jit, static_argnums=2)
def apply(x_BND, mask_BN, module):
    return module.apply({"params": parameters()}, x_BND, mask_BN)


@jax.jit
def step(state, x_B1D, position):
    return layer().apply({"params": parameters()}, x_B1D, state, position, method="advance")


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def everything(x_BND):
    return np.ones(x_BND.shape[:2], bool)


def test_equals_its_definition():
    x_BND, params = random(2, 131, WIDTH), parameters()
    filters = CausalFilter(CONTEXT, "explicit", "learned")
    h_DT = jax.jit(filters.apply, static_argnums=1)({"params": params["long"]["filter"]}, WIDTH)
    mlp = GatedFeedForward(WIDTH, expansion=2.0)
    mlp_BND = jax.jit(mlp.apply)({"params": params["mlp"]}, x_BND)
    long_BND = reference.causal_convolution(x_BND, np.asarray(h_DT).T[None, :131])
    alpha = 1 / (1 + np.exp(-0.7))
    want = (1 - alpha) * np.asarray(mlp_BND) + alpha * long_BND
    np.testing.assert_allclose(apply(x_BND, everything(x_BND), layer()), want, atol=1e-5)


def future_share(module, length, i):
    @jax.jit
    @jax.grad
    def gradient(x_ND):
        return jnp.sum(apply(x_ND[None], jnp.ones((1, length), bool), module)[0, i])

    gradient_ND = np.abs(gradient(random(length, WIDTH)))
    return gradient_ND[i + 1 :].max() / gradient_ND[: i + 1].max()


@pytest.mark.parametrize(("length", "i"), [(37, 20), (101, 63)])
def test_nothing_comes_from_the_future(length, i):
    """Up to the rounding errors of FFTs."""
    assert future_share(layer(), length, i) <= 1e-6


def test_the_circular_convolution_leaks():
    assert future_share(layer(padding="circular"), 101, 63) > 0.01


def test_invalid_positions_change_nothing():
    x_BND = random(2, 101, WIDTH)
    index_BN = np.broadcast_to(np.arange(101), (2, 101))
    mask_BN = (index_BN >= 13) & (index_BN < 77)
    got = np.asarray(apply(x_BND, mask_BN, layer()))[:, 13:77]
    alone = x_BND[:, 13:77]
    np.testing.assert_allclose(got, apply(alone, everything(alone), layer()), atol=1e-5)


@pytest.mark.parametrize(("length", "prompt"), [(40, 1), (131, 50)])
def test_a_step_equals_the_whole(length, prompt):
    x_BND = random(2, length, WIDTH)

    @jax.jit
    def begin(x_BPD):
        params, mask_BP = {"params": parameters()}, jnp.ones(x_BPD.shape[:2], bool)
        y_BPD, read = layer().apply(params, x_BPD, mask_BP, method="prefill")
        plan = plan_filter(read.taps_DT.T[None], length)
        return y_BPD, plan, *filter_prefill(plan, read.x_BPD[None])[1:]

    def of_layer(block):
        return jax.tree.map(lambda x: x[0], jax.device_get(block))

    y_BND, plan, sums, block = begin(x_BND[:, :prompt])
    state = FilterCache(of_layer(plan.h_JTD), of_layer(block))
    outputs = [y_BND]
    for t in range(prompt, length):
        y_B1D, state = step(state, x_BND[:, t : t + 1], t)
        outputs.append(y_B1D)
        if (t + 1) % BLOCK == 0 and t + 1 < length:
            block = jax.tree.map(lambda x: x[None], jax.device_get(state.block))
            sums, block = filter_advance(plan, sums, block, t + 1)
            state = state._replace(block=of_layer(block))
    want = apply(x_BND, everything(x_BND), layer())
    np.testing.assert_allclose(np.concatenate(outputs, 1), want, atol=1e-5)


def test_what_leaks_cannot_decode():
    x_BND, mask_BN = jnp.zeros((1, 9, WIDTH)), jnp.ones((1, 9), bool)
    params = {"params": parameters()}
    with pytest.raises(ValueError, match="padding 'circular' sees later positions"):
        layer(padding="circular").apply(params, x_BND, mask_BN, method="prefill")
