"""Sequences that are longer than memory allows: read in chunks, with the state carried over.

The time is proportional to the length. The memory is that of one chunk, plus for each chunk what is
carried into it, as the backward pass recomputes a chunk from there.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from spectral_pod.models.model import Model
from spectral_pod.parallel.sharding import constrain

# The collections into which layers sow: auxiliary losses, scalars to be plotted, and the running
# averages that replace parameters of the same name.
SOWN = ["losses", "metrics", "statistics"]


def read(
    model: Model,
    variables: Mapping[str, Any],
    rows: Mapping[str, jax.Array],
    of_chunk: Callable[[Any, Mapping[str, jax.Array]], Any],
    *,
    train: bool = False,
    key: jax.Array | None = None,
) -> tuple[Any, Any]:
    """Applies `model.extend` to the chunks of rows, one after the other.

    Args:
      model: a model whose `config.chunk` divides the rows' length.
      variables: its variables.
      rows: `tokens` and `mask` [B, L], and other arrays [B, L] that `of_chunk` needs.
      of_chunk: from the output of `extend` and the chunk's part of `rows` to what is kept of a
        chunk; that is all that is in memory of all chunks together.
      train: whether dropout is on; each chunk has its own, from `key`.

    Returns:
      What `of_chunk` returned, and what layers have sown into the collections SOWN, both stacked
      along a first axis of chunks.
    """
    chunk = model.config.chunk
    parts = {name: _split(x, chunk) for name, x in rows.items()}

    def extend(index: jax.Array, part: Mapping[str, jax.Array], carry: Any) -> Any:
        rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
        return model.apply(
            variables, part["tokens"], part["mask"], carry, train=train, rngs=rngs,
            mutable=SOWN, method="extend",
        )  # fmt: skip

    def step(carry: Any, index_and_part: Any) -> tuple[Any, Any]:
        index, part = index_and_part
        if model.config.truncate_gradients:
            carry = jax.lax.stop_gradient(carry)
        (output, carry), sown = extend(index, part, carry)
        return carry, (of_chunk(output, part), sown)

    first = jax.tree.map(lambda x: x[0], parts)
    (_, carry), _ = jax.eval_shape(lambda: extend(jnp.int32(0), first, None))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), carry)
    indices = jnp.arange(len(next(iter(parts.values()))))
    _, found = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, (indices, parts))
    return cast(tuple[Any, Any], found)


def logits(
    model: Model, variables: Mapping[str, Any], tokens_BL: jax.Array, mask_BL: jax.Array
) -> jax.Array:
    """The logits of rows of any length, [B, C] or [B, L, C], in chunks if they are longer."""
    chunk, length = model.config.chunk, tokens_BL.shape[1]
    if not chunk or length <= chunk:
        return cast(jax.Array, model.apply(variables, tokens_BL, mask_BL))
    missing = (0, 0), (0, -length % chunk)
    rows = {"tokens": jnp.pad(tokens_BL, missing), "mask": jnp.pad(mask_BL, missing)}
    found, _ = read(model, variables, rows, lambda output, _: output)
    if model.pools:
        return cast(jax.Array, model.apply(variables, found, method="pooled"))
    return joined(found)[:, :length]


def joined(x: jax.Array) -> jax.Array:
    """[S, B, M, ...] of chunks to [B, S * M, ...]."""
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _split(x_BL: jax.Array, chunk: int) -> jax.Array:
    """[B, L] to [S, B, M]."""
    x_BSM = x_BL.reshape(x_BL.shape[0], -1, chunk)
    return constrain(jnp.swapaxes(x_BSM, 0, 1), None, "batch", "position")
