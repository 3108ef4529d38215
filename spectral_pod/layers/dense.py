"""Dense layers and normalisation, with the logical axes of their parameters."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import Axes, partitioned


def dense(features: int | tuple[int, ...], axes: Axes, dtype: Any, **kwargs: Any) -> nn.Module:
    """`nn.DenseGeneral` with float32 parameters and products in `dtype`.

    `axes` are the kernel's logical axes, contracted dimensions first; the bias takes those of the
    output features.
    """
    num_out = 1 if isinstance(features, int) else len(features)
    return nn.DenseGeneral(
        features,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=partitioned(nn.initializers.lecun_normal(), *axes),
        bias_init=partitioned(nn.initializers.zeros_init(), *axes[-num_out:]),
        **kwargs,
    )


def layer_norm(x: jax.Array, name: str) -> jax.Array:
    """LayerNorm over the model width; computed and returned in float32 whatever comes in."""
    return nn.LayerNorm(
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        scale_init=partitioned(nn.initializers.ones_init(), "width"),
        bias_init=partitioned(nn.initializers.zeros_init(), "width"),
        name=name,
    )(x.astype(jnp.float32))
