"""Dense layers and normalisation, with the logical axes of their parameters."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.parameter import parameter
from spectral_pod.ops import layer_norm as op
from spectral_pod.ops.affine import add_bias, affine
from spectral_pod.parallel.sharding import Axes, constrain, num_shards, platform


class Dense(nn.Module):
    """`x @ kernel + bias` over the last axes of x; products in `dtype`, float32 parameters.

    The first axes of x are the batch and, if there are two, the positions.

    Attributes:
      features: sizes of the output's last axes, which replace the contracted axes of x.
      axes: logical axes of the kernel, contracted ones first; the bias has those of the features.
      dtype: of the product and the result.
      use_bias: whether there is a bias.
    """

    features: int | tuple[int, ...]
    axes: Axes
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, index: int | None = None) -> jax.Array:
        """With an index, the part of the result with that index of the first feature alone."""
        features = (self.features,) if isinstance(self.features, int) else self.features
        num_in = len(self.axes) - len(features)
        shape = x.shape[-num_in:] + features
        init = nn.initializers.lecun_normal(range(num_in), range(num_in, len(shape)))
        boxed_kernel = parameter(init, *self.axes, group="decayed", inputs=num_in)
        kernel = self.param("kernel", boxed_kernel, shape)
        bias = jnp.zeros(features, self.dtype)
        if self.use_bias:
            zeros = parameter(nn.initializers.zeros_init(), *self.axes[num_in:], group="undecayed")
            bias = self.param("bias", zeros, features).astype(self.dtype)
        # A kernel split over `embed` is gathered here, so that each device multiplies its own rows.
        kernel = constrain(kernel.astype(self.dtype), *(_gathered(axis) for axis in self.axes))
        if index is not None:
            features, bias = features[1:], bias[index]
            kernel = jax.lax.index_in_dim(kernel, index, num_in, keepdims=False)
        x = x.astype(self.dtype)
        lead = x.shape[:-num_in]
        # As a matrix: with x of rank 3, the gradient takes XLA three times as long on CPUs. But
        # batch and positions, if both are split, cannot be one axis.
        if num_shards("position") > 1:
            y = jnp.tensordot(x, kernel, num_in)
        else:
            rows = x.reshape(math.prod(lead), -1)
            matrix = kernel.reshape(rows.shape[1], -1)
            if platform() == "cpu":
                return affine(rows, matrix, bias.reshape(-1)).reshape(*lead, *features)
            y = (rows @ matrix).reshape(*lead, *features)
        features_axes = map(_gathered, self.axes[len(self.axes) - len(features) :])
        return add_bias(y, bias, (*("batch", "position")[: len(lead)], *features_axes))


def _gathered(axis: str | None) -> str | None:
    return None if axis == "embed" else axis


class LayerNorm(nn.Module):
    """LayerNorm over the model width, computed and returned in float32 for any input dtype."""

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
        """[B, N, D] to the same; per position, so that the mask has no effect."""
        shape = (x_BND.shape[-1],)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale_D = self.param("scale", parameter(ones, "width", group="undecayed"), shape)
        bias_D = self.param("bias", parameter(zeros, "width", group="undecayed"), shape)
        return op.layer_norm(x_BND, scale_D, bias_D)


class BatchNorm(nn.Module):
    """Normalises each channel over batch and positions, in float32 (Ioffe and Szegedy 2015).

    In training by the mean and variance of the valid positions of the batch, of all devices; where
    gradients are accumulated, of the micro-batch. Else by their running averages, which are
    parameters of the group 'statistics': what training sows into the collection of this name
    replaces them (`train/step.py`).
    """

    deterministic: bool
    momentum: float = 0.95  # of the running averages, as in S5's program

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
        """[B, N, D] to the same in float32; the mask is needed in training only."""
        shape, x_BND = (x_BND.shape[-1],), x_BND.astype(jnp.float32)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale_D = self.param("scale", parameter(ones, "width", group="undecayed"), shape)
        bias_D = self.param("bias", parameter(zeros, "width", group="undecayed"), shape)
        mean_D = self.param("mean", parameter(zeros, "width", group="statistics"), shape)
        var_D = self.param("variance", parameter(ones, "width", group="statistics"), shape)
        if not self.deterministic:
            assert mask_BN is not None
            weight_BN = mask_BN.astype(jnp.float32)
            weight_BN /= jnp.maximum(jnp.sum(weight_BN), 1.0)
            running = mean_D, var_D
            mean_D = jnp.einsum("bnd,bn->d", x_BND, weight_BN, precision="highest")
            square_BND = jnp.square(x_BND - mean_D[None, None])
            var_D = jnp.einsum("bnd,bn->d", square_BND, weight_BN, precision="highest")
            for name, old_D, new_D in zip(("mean", "variance"), running, (mean_D, var_D)):
                value_D = self.momentum * old_D + (1 - self.momentum) * new_D
                value_D = jax.lax.stop_gradient(value_D)
                self.sow("statistics", name, value_D, reduce_fn=_latest, init_fn=lambda: None)
        rate_D = scale_D * jax.lax.rsqrt(var_D + 1e-5)
        return (x_BND - mean_D[None, None]) * rate_D[None, None] + bias_D[None, None]


def _latest(_: Any, value: jax.Array) -> jax.Array:
    return value


def layer_norm(x_BND: jax.Array, name: str) -> jax.Array:
    """Applies a `LayerNorm` that is a submodule of the calling module, under this name."""
    return LayerNorm(name=name)(x_BND)
