"""GELU by its tanh approximation (Hendrycks and Gimpel 2016), computed in float32."""

import math

import jax
import jax.numpy as jnp

_SCALE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """`x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2` in the dtype of x.

    bfloat16 is rounded once instead of after every operation, and the backward pass recomputes
    intermediate values from x instead of storing them.
    """
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + _tanh(x32))).astype(x.dtype)


def _tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(_SCALE * x * (1 + _CUBIC * x * x))


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    # Without the barrier XLA would merge what follows with the forward pass, and so store it.
    x32 = jax.lax.optimization_barrier(x).astype(jnp.float32)
    tanh = _tanh(x32)
    slope = _SCALE * (1 + 3 * _CUBIC * x32 * x32)
    derivative = 0.5 * (1 + tanh) * (1 + x32 * (1 - tanh) * slope)
    return ((dy.astype(jnp.float32) * derivative).astype(x.dtype),)


gelu.defvjp(_forward, _backward)
