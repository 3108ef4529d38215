"""Sampling of the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from spectral_pod import fields
from spectral_pod.fields import NonNegative, NonNegativeFloat, Probability


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is sampled.

    Attributes:
      temperature: divides the logits; 0 selects the most likely token.
      top_k: samples from the k most likely tokens only; 0 disables the limit.
      top_p: samples from the smallest set of most likely tokens whose probability reaches top_p
        (Holtzman et al. 2020); 0 leaves the most likely token.

    Raises:
      ConfigError: a value is out of its range.
    """

    temperature: NonNegativeFloat = 1.0
    top_k: NonNegative = 0
    top_p: Probability = 1.0

    def __post_init__(self) -> None:
        fields.check_all(self)


def draw(logits_BC: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Samples one token per row, int32 [B], with the row's own random key.

    Args:
      logits_BC: float logits.
      keys_B: random keys; a row's sample depends on no other row's key.
      sampling: temperature, top-k and top-p.
    """
    # A temperature that float32 cannot represent is as good as 0.
    if sampling.temperature < jnp.finfo(jnp.float32).tiny:
        return jnp.argmax(logits_BC, axis=-1).astype(jnp.int32)
    best_B1 = jnp.max(logits_BC, axis=-1, keepdims=True)  # which stays 0, and does not overflow
    logits_BC = (logits_BC - best_B1) / float(sampling.temperature)
    if sampling.top_k or sampling.top_p < 1:
        logits_BC = jnp.where(_candidates(logits_BC, sampling), logits_BC, -jnp.inf)
    noise_BC = jax.vmap(lambda key: jax.random.gumbel(key, logits_BC.shape[1:]))(keys_B)
    return jnp.argmax(logits_BC + noise_BC, axis=-1).astype(jnp.int32)


def _candidates(logits_BC: jax.Array, sampling: Sampling) -> jax.Array:
    """The tokens that may be sampled, bool [B, C]; equally likely tokens are treated alike."""
    descending_BC = -jnp.sort(-logits_BC, axis=-1)
    kept_BC = jnp.ones(logits_BC.shape, bool)
    if sampling.top_k:
        kth_B1 = descending_BC[:, min(sampling.top_k, logits_BC.shape[1]) - 1][:, None]
        kept_BC &= logits_BC >= kth_B1
    if sampling.top_p < 1:
        p_BC = jax.nn.softmax(jnp.where(kept_BC, logits_BC, -jnp.inf))
        sorted_BC = -jnp.sort(-p_BC, axis=-1)
        before_BC = jnp.cumsum(sorted_BC, axis=-1) - sorted_BC
        needed_BC = ((before_BC < sampling.top_p) | (before_BC == 0)) & (sorted_BC > 0)
        least_B1 = jnp.min(jnp.where(needed_BC, sorted_BC, 1.0), axis=-1, keepdims=True)
        kept_BC &= p_BC >= least_B1
    return kept_BC
