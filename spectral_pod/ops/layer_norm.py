"""LayerNorm (Ba et al. 2016) with a hand-written gradient.

Differentiated by JAX, it stores several float32 arrays of the size of its input for the backward
pass, and XLA on CPUs materializes the broadcast statistics. Here only each row's mean and
reciprocal standard deviation are stored besides the input, which keeps its own dtype.
"""

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # added to the variance


@jax.custom_vjp
def layer_norm(x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """`(x - mean) / sqrt(variance + 1e-6) * scale + bias` over the last axis.

    Args:
      x_BND: any float dtype.
      scale_D, bias_D: float32.

    Returns:
      float32 [B, N, D].
    """
    return _forward(x_BND, scale_D, bias_D)[0]


def _forward(
    x_BND: jax.Array, scale_D: jax.Array, bias_D: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32_BND = x_BND.astype(jnp.float32)
    mean_BN1 = jnp.mean(x32_BND, -1, keepdims=True)
    variance_BN1 = jnp.mean(jnp.square(x32_BND), -1, keepdims=True) - jnp.square(mean_BN1)
    rate_BN1 = jax.lax.rsqrt(jnp.maximum(variance_BN1, 0.0) + EPSILON)
    mean_BN1, rate_BN1 = jax.lax.optimization_barrier((mean_BN1, rate_BN1))
    y_BND = (x32_BND - mean_BN1) * rate_BN1 * scale_D[None, None] + bias_D[None, None]
    return y_BND, (x_BND, mean_BN1, rate_BN1, scale_D)


def _backward(
    residuals: tuple[jax.Array, ...], dy_BND: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dx = (g - mean(g) - n mean(g n)) / std, with n = (x - mean) / std and g = scale dy."""
    # Without the barrier XLA would merge n with that of the forward pass, and so store it.
    x_BND, mean_BN1, rate_BN1, scale_D = jax.lax.optimization_barrier(residuals)
    n_BND = (x_BND.astype(jnp.float32) - mean_BN1) * rate_BN1
    product_BND = dy_BND * n_BND
    # The means are taken as products with the scale; as sums, their terms would be materialized.
    weights_D = scale_D / scale_D.size
    a_BN1, c_BN1 = (
        jnp.einsum("bnd,d->bn", z, weights_D, precision="highest")[..., None]
        for z in (dy_BND, product_BND)
    )
    a_BN1, c_BN1 = jax.lax.optimization_barrier((a_BN1, c_BN1))
    dx_BND = rate_BN1 * (dy_BND * scale_D[None, None] - a_BN1 - n_BND * c_BN1)
    return dx_BND.astype(x_BND.dtype), jnp.sum(product_BND, (0, 1)), jnp.sum(dy_BND, (0, 1))


layer_norm.defvjp(_forward, _backward)
