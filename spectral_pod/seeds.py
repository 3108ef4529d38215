"""Random numbers from a seed, which may be any integer."""

import jax
import numpy as np


def entropy(seed: int) -> int:
    """A non-negative integer for NumPy: the seed itself, or one of its own if it is negative."""
    return seed if seed >= 0 else (1 << 128) - seed


def random_key(seed: int) -> jax.Array:
    """A JAX key that depends on all bits of the seed; `jax.random.key` keeps the lowest 32."""
    rest, word = divmod(entropy(seed), 1 << 32)
    key = jax.random.key(np.uint32(word))
    while rest:
        rest, word = divmod(rest, 1 << 32)
        key = jax.random.fold_in(key, np.uint32(word))
    return key
