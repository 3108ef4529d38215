"""Drawing the next token from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How a token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; 0 is all.
      top_p: only the likeliest tokens that together have this probability (Holtzman et al. 2020);
        the likeliest one always.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def draw(logits_BC: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """int32 [B]: one token a row, each row by its own random key and no other."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BC, axis=-1).astype(jnp.int32)
    logits_BC = logits_BC / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits_BC = jnp.where(_kept(logits_BC, sampling), logits_BC, -jnp.inf)
    noise_BC = jax.vmap(lambda key: jax.random.gumbel(key, logits_BC.shape[1:]))(keys_B)
    return jnp.argmax(logits_BC + noise_BC, axis=-1).astype(jnp.int32)


def _kept(logits_BC: jax.Array, sampling: Sampling) -> jax.Array:
    """The tokens that may be drawn. Nothing is kept or dropped by its place among equals."""
    descending_BC = -jnp.sort(-logits_BC, axis=-1)
    kept_BC = jnp.ones(logits_BC.shape, bool)
    if sampling.top_k:
        kth_B1 = descending_BC[:, min(sampling.top_k, logits_BC.shape[1]) - 1][:, None]
        kept_BC &= logits_BC >= kth_B1
    if sampling.top_p < 1:
        p_BC = jax.nn.softmax(jnp.where(kept_BC, logits_BC, -jnp.inf))
        sorted_BC = -jnp.sort(-p_BC, axis=-1)
        before_BC = jnp.cumsum(sorted_BC, axis=-1) - sorted_BC
        needed_BC = (before_BC < sampling.top_p) & (sorted_BC > 0)
        least_B1 = jnp.min(jnp.where(needed_BC, sorted_BC, 1.0), axis=-1, keepdims=True)
        kept_BC &= p_BC >= least_B1
    return kept_BC
