"""Losses, per example, in float32."""

import jax
import optax


def classification_loss(logits_BC: jax.Array, labels_B: jax.Array, smoothing: float) -> jax.Array:
    """[B]: cross-entropy in nats against labels smoothed towards uniform by `smoothing`."""
    targets_BC = optax.smooth_labels(jax.nn.one_hot(labels_B, logits_BC.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits_BC, targets_BC)
