"""The byte-latent encoder's convolution against XLA's, with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.layers.patching import ByteConvolution, Patches, _windows
from spectral_pod.shapes import VOCAB_SIZE

B, L, E, D = 3, 24, 5, 7


def _ours(patches, params, ids_BL):
    convolution = ByteConvolution(D, params["table"].dtype)
    nothing = jnp.zeros((B, patches.halo * patches.stride), jnp.int32)
    windows = _windows(ids_BL, nothing, patches)
    return convolution.apply({"params": params["convolution"]}, params["table"], windows)


def _by_xla(patches, params, ids_BL):
    table_VE = jnp.pad(params["table"], ((0, 1), (0, 0)))  # id V, no byte, embeds to zero
    kernel_TED, bias_D = (params["convolution"][name] for name in ("kernel", "bias"))
    y_BND = jax.lax.conv_general_dilated(
        table_VE[ids_BL],
        kernel_TED,
        (patches.stride,),
        [(patches.before, 0)],
        dimension_numbers=("NHC", "HIO", "NHC"),
    )
    return y_BND + bias_D[None, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_gradients(fn, patches, params, ids_BL, dy):
    y, pullback = jax.vjp(lambda params: fn(patches, params, ids_BL), params)
    return y, pullback(dy)


@pytest.mark.parametrize("no_byte_from", [L, 13, 0])
@pytest.mark.parametrize(
    "patches", [Patches(), Patches(1), Patches(1, 1), Patches(2, 7), Patches(8, 8)], ids=str
)
def test_equals_a_strided_convolution_of_embeddings(patches, no_byte_from):
    rng = np.random.default_rng(0)
    taps = patches.before + patches.stride
    shapes = {"table": (VOCAB_SIZE, E), "convolution": {"kernel": (taps, E, D), "bias": (D,)}}
    params = jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32),
        shapes,
        is_leaf=lambda s: type(s) is tuple,
    )
    ids_BL = rng.integers(0, VOCAB_SIZE, (B, L), np.int32)
    ids_BL = np.where(np.arange(L) < no_byte_from, ids_BL, np.int32(VOCAB_SIZE))
    dy = rng.normal(size=(B, L // patches.stride, D)).astype(np.float32)
    got, want = (_with_gradients(fn, patches, params, ids_BL, dy) for fn in (_ours, _by_xla))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
