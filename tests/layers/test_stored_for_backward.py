"""What hand-written gradients store: their inputs in their own dtype, and no intermediate value.

XLA merges a value that the backward pass computes again with that of the forward pass, and then
keeps it in float32 from the one to the other, unless a barrier prevents that.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.layers.delta_memory import unit
from spectral_pod.layers.spectral import rms_gated
from spectral_pod.ops import right_angle
from spectral_pod.ops.gelu import gelu
from spectral_pod.ops.layer_norm import layer_norm

B, N, D = 4, 256, 64


@pytest.mark.parametrize(
    ("operation", "most"),
    [  # bytes an element; a GELU's output is stored too, for the gradient of what follows it
        (gelu, 4.5),
        (lambda x: layer_norm(x, jnp.ones(D), jnp.zeros(D)), 2.5),
        (lambda x: rms_gated(x, jnp.ones(D), jnp.zeros(D)), 2.5),
    ],
    ids=["gelu", "layer_norm", "rms_gated"],
)
def test_only_inputs_are_stored(operation, most):
    def loss(x_BND, w_TDD):
        for w_DD in w_TDD:
            x_BND = jnp.tanh(operation(x_BND).astype(jnp.bfloat16) @ w_DD)
        return jnp.sum(x_BND.astype(jnp.float32))

    def temporaries(times):
        x_BND = jax.ShapeDtypeStruct((B, N, D), jnp.bfloat16)
        w_TDD = jax.ShapeDtypeStruct((times, D, D), jnp.bfloat16)
        compiled = jax.jit(jax.grad(loss)).lower(x_BND, w_TDD).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert (temporaries(8) - temporaries(2)) / 6 <= most * B * N * D


def test_filters_of_bfloat16_make_no_copies_in_float32():
    B, D, N = 4, 128, 4096

    def loss(x_BDN, s_DM):
        return jnp.sum(right_angle.convolve(x_BDN, s_DM) * x_BDN, dtype=jnp.float32)

    x_BDN = jax.ShapeDtypeStruct((B, D, N), jnp.bfloat16)
    s_DM = jax.ShapeDtypeStruct((D, N), jnp.complex64)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x_BDN, s_DM).compile()
    # Two arrays of two bytes an element, and groups of channels and the spectrum's cotangent.
    assert compiled.memory_analysis().temp_size_in_bytes <= 6 * B * D * N


def test_gradient_of_unit_vectors():
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(2, 5, 3, 8)), jnp.float32) for _ in range(2))
    x = x.at[0, 0].set(0.0)

    def plain(x):
        return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)

    expected, plain_gradient = jax.vjp(plain, x)
    found, gradient = jax.vjp(unit, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient(dy)[0], plain_gradient(dy)[0], rtol=1e-5, atol=1e-6)
