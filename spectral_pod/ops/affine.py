"""The affine map of a dense layer, arranged so that XLA uses matrix units for all of it.

The bias gradient is a product with ones: a sum over rows takes six times as long on TPUs, and eight
times on CPUs. Each device sums its own rows, as XLA may otherwise gather the rows of all.

XLA on CPUs multiplies bfloat16 on a matrix unit (AMX) only if both operands are row-major and the
result is requested in float32; the transposed operands of the backward pass would silently become
float32 products, three to five times slower. The transposes are therefore materialized. Each stands
alone: fused with the computation of its operand it takes three times as long.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from spectral_pod.parallel.sharding import Axes, platform, shard_op, vary_like


def affine(x_RI: jax.Array, w_IO: jax.Array, b_O: jax.Array) -> jax.Array:
    """`x @ w + b` over rows R, in the dtype of all three operands; sums in float32 or better."""
    single = jax.sharding.get_abstract_mesh().size <= 1  # layout constraints are not partitioned
    if x_RI.dtype == jnp.bfloat16 and platform() == "cpu" and single:
        return _row_major_affine(x_RI, w_IO, b_O)
    return x_RI @ w_IO + b_O[None]


def add_bias(y: jax.Array, bias: jax.Array, axes: Axes) -> jax.Array:
    """`y + bias`, where the bias has the last axes of y.

    Args:
      y: the result of a product, split over devices by the logical `axes`.
      bias: in the same dtype.
      axes: one for each dimension of y.
    """
    if y.dtype != jnp.bfloat16 or platform() != "tpu":
        return y + jnp.broadcast_to(bias, y.shape)

    def on_device(y: jax.Array, bias: jax.Array) -> jax.Array:
        y_RO = y.reshape(-1, bias.size)
        return _add(y_RO, vary_like(bias.reshape(-1), y)).reshape(y.shape)

    return shard_op(on_device, (axes, axes[y.ndim - bias.ndim :]), axes)(y, bias)


@jax.custom_vjp
def _add(y_RO: jax.Array, b_O: jax.Array) -> jax.Array:
    return y_RO + b_O[None]


_add.defvjp(lambda y_RO, b_O: (_add(y_RO, b_O), None), lambda _, dy_RO: (dy_RO, _sum(dy_RO)))


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
