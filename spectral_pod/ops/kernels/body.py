"""What the bodies of kernels share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def terms(x: jax.Array, count: int) -> list[jax.Array]:
    """bfloat16 terms, which the matrix unit multiplies, whose sum is x; the largest first."""
    found = []
    for _ in range(count):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(x.dtype)
    return found


def each(count: int, run: Callable[[jax.Array], None]) -> None:
    """`run(i)` for i = 0, ..., count - 1, in a loop."""
    jax.lax.fori_loop(0, count, lambda i, _: run(i), None)
