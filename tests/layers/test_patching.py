"""The byte-latent encoder's convolution against XLA's, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.layers.patching import KERNEL, STRIDE, ByteConvolution, _windows
from spectral_pod.shapes import VOCAB_SIZE

B, L, E, D = 3, 24, 5, 7


def _ours(params, ids_BL):
    convolution = ByteConvolution(D, params["table"].dtype)
    return convolution.apply({"params": params["convolution"]}, params["table"], _windows(ids_BL))


def _by_xla(params, ids_BL):
    table_VE = jnp.pad(params["table"], ((0, 1), (0, 0)))  # id V, no byte, embeds to zero
    kernel_TED, bias_D = (params["convolution"][name] for name in ("kernel", "bias"))
    before = KERNEL - STRIDE
    y_BND = jax.lax.conv_general_dilated(
        table_VE[ids_BL],
        kernel_TED,
        (STRIDE,),
        [(before, 0)],
        dimension_numbers=("NHC", "HIO", "NHC"),
    )
    return y_BND + bias_D[None, None]


@pytest.mark.parametrize("no_byte_from", [L, 13, 0])
def test_equals_a_strided_convolution_of_embeddings(no_byte_from):
    rng = np.random.default_rng(0)
    shapes = {"table": (VOCAB_SIZE, E), "convolution": {"kernel": (KERNEL, E, D), "bias": (D,)}}
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
        shapes,
        is_leaf=lambda s: type(s) is tuple,
    )
    ids_BL = jnp.asarray(rng.integers(0, VOCAB_SIZE, (B, L)), jnp.int32)
    ids_BL = jnp.where(jnp.arange(L)[None] < no_byte_from, ids_BL, VOCAB_SIZE)
    y, pullback = jax.vjp(lambda p: _ours(p, ids_BL), params)
    want, pullback_want = jax.vjp(lambda p: _by_xla(p, ids_BL), params)
    dy = jnp.asarray(rng.normal(size=want.shape), jnp.float32)
    got = jax.tree.leaves((y, pullback(dy)))
    for a, b in zip(got, jax.tree.leaves((want, pullback_want(dy)))):
        np.testing.assert_allclose(a, b, atol=1e-5)
