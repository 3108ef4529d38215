"""The affine map of a dense layer, arranged so that XLA uses a CPU's matrix unit (AMX) for it.

XLA on CPUs multiplies bfloat16 on that unit only if both operands are row-major and the result is
requested in float32; the transposed operands of the backward pass would silently become float32
products, three to five times slower. The transposes are therefore materialized. Each stands alone:
fused with the computation of its operand it takes three times as long. The bias gradient is a
product with ones, eight times as fast as a sum over rows.
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
    return x_RI @ w_IO + b_O[None]


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
    db_O = _product(jnp.ones((8, len(dy_RO)), dy_RO.dtype), dy_RO)[0]  # 8: the rows of a tile
    return dx_RI.astype(x_RI.dtype), dw_IO.astype(w_IO.dtype), db_O.astype(dy_RO.dtype)


_row_major_affine.defvjp(_forward, _backward)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _transposed(x: jax.Array) -> jax.Array:
    return with_layout_constraint(jax.lax.optimization_barrier(x).T, Layout((0, 1)))
