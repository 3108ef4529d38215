"""The affine map of a dense layer, arranged so that XLA uses matrix units for all of it.

The bias gradient is a product with ones: a sum over rows takes six times as long on TPUs, and eight
times on CPUs.

XLA on CPUs multiplies bfloat16 on a matrix unit (AMX) only if both operands are row-major and the
result is requested in float32; the transposed operands of the backward pass would silently become
float32 products, three to five times slower. The transposes are therefore materialized. Each stands
alone: fused with the computation of its operand it takes three times as long.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from spectral_pod.parallel.sharding import platform


def affine(x_RI: jax.Array, w_IO: jax.Array, b_O: jax.Array) -> jax.Array:
    """`x @ w + b` over rows R, in the dtype of all three operands; sums in float32 or better."""
    single = jax.sharding.get_abstract_mesh().size <= 1  # layout constraints are not partitioned
    if x_RI.dtype == jnp.bfloat16 and platform() == "cpu" and single:
        return _row_major_affine(x_RI, w_IO, b_O)
    if x_RI.dtype == jnp.bfloat16 and platform() == "tpu":
        return _affine(x_RI, w_IO, b_O)
    return x_RI @ w_IO + b_O[None]


@jax.custom_vjp
def _affine(x_RI: jax.Array, w_IO: jax.Array, b_O: jax.Array) -> jax.Array:
    return x_RI @ w_IO + b_O[None]


def _affine_backward(
    operands: tuple[jax.Array, jax.Array], dy_RO: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_RI, w_IO = operands
    return dy_RO @ w_IO.T, x_RI.T @ dy_RO, _sum(dy_RO)


_affine.defvjp(lambda x, w, b: (_affine(x, w, b), (x, w)), _affine_backward)


def _sum(dy_RO: jax.Array) -> jax.Array:
    """The sum over rows, as a product with as many rows of ones as a tile has.

    XLA would make a sum of a product with one row, which takes a TPU six times as long.
    """
    return _product(jnp.ones((8, len(dy_RO)), dy_RO.dtype), dy_RO)[0].astype(dy_RO.dtype)


@jax.custom_vjp
def _row_major_affine(x_RI: jax.Array, w_IO: jax.Array, b_O: jax.Array) -> jax.Array:
    return (_product(x_RI, w_IO) + b_O.astype(jnp.float32)[None]).astype(x_RI.dtype)


def _forward(
    x_RI: jax.Array, w_IO: jax.Array, b_O: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _row_major_affine(x_RI, w_IO, b_O), (x_RI, w_IO)


def _backward(
    operands: tuple[jax.Array, jax.Array], dy_RO: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_RI, w_IO = operands
    dy_RO = jax.lax.optimization_barrier(dy_RO)
    dx_RI = _product(dy_RO, _transposed(w_IO))
    dw_IO = _product(_transposed(x_RI), dy_RO)
    return dx_RI.astype(x_RI.dtype), dw_IO.astype(w_IO.dtype), _sum(dy_RO)


_row_major_affine.defvjp(_forward, _backward)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _transposed(x: jax.Array) -> jax.Array:
    return with_layout_constraint(jax.lax.optimization_barrier(x).T, Layout((0, 1)))
