"""The matrix product of a dense layer, in a form that CPUs with matrix units (AMX) run on them.

XLA on CPUs multiplies bfloat16 on that unit only where both operands are row-major and the result
is asked for in float32; the transposed operands of the backward pass silently become float32
products, three to five times slower. So there the transposes are written out.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from spectral_pod.parallel.sharding import platform


def product(x_RI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """`x @ w` in the dtype of both, rows in R; summed in float32 or better."""
    single = jax.sharding.get_abstract_mesh().size <= 1  # layouts are not partitioned
    if x_RI.dtype == jnp.bfloat16 and platform() == "cpu" and single:
        return _row_major_product(x_RI, w_IO)
    return x_RI @ w_IO


@jax.custom_vjp
def _row_major_product(x_RI: jax.Array, w_IO: jax.Array) -> jax.Array:
    return jnp.matmul(x_RI, w_IO, preferred_element_type=jnp.float32).astype(x_RI.dtype)


def _forward(x_RI: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _row_major_product(x_RI, w_IO), (x_RI, w_IO)


def _backward(
    operands: tuple[jax.Array, jax.Array], dy_RO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_RI, w_IO = operands
    return _row_major_product(dy_RO, _transposed(w_IO)), _row_major_product(
        _transposed(x_RI), dy_RO
    )


_row_major_product.defvjp(_forward, _backward)


def _transposed(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x.T, Layout((0, 1)))
