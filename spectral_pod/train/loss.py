"""Losses, per example, in float32."""

import jax
import optax
from jaxtyping import Float

from spectral_pod.shapes import Labels, Logits


def classification_loss(
    logits_BC: Logits, labels_B: Labels, smoothing: float
) -> Float[jax.Array, " B"]:
    """[B]: cross-entropy in nats against labels smoothed towards uniform by `smoothing`."""
    targets_BC = optax.smooth_labels(jax.nn.one_hot(labels_B, logits_BC.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits_BC, targets_BC)
