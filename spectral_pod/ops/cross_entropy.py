"""Cross-entropy in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int


def cross_entropy(
    logits: Float[jax.Array, "*places C"], labels: Int[jax.Array, "*places"], smoothing: float
) -> Float[jax.Array, "*places"]:
    """Cross-entropy in nats, of rows or of positions, against labels smoothed towards uniform.

    A fraction `smoothing` of a target's weight is spread over all classes.
    """
    log_p = jax.nn.log_softmax(logits)
    # A comparison rather than a gather: the gradient needs no scatter, and classes may be sharded.
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    is_label = classes == jnp.expand_dims(labels, -1)
    loss = -jnp.sum(jnp.where(is_label, log_p, 0.0), axis=-1)
    return (1.0 - smoothing) * loss - smoothing * jnp.mean(log_p, axis=-1)
