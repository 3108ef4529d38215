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

    def step(carry: Any, index_and_part: Any) -> tuple[Any, Any]:
        index, part = index_and_part
        if model.config.truncate_gradients:
            carry = jax.lax.stop_gradient(carry)
        (output, carry), sown = _extend(model, variables, part, carry, index, train, key)
        return carry, (of_chunk(output, part), sown)

    parts = _split(rows, model.config.chunk)
    start = _start(model, variables, parts[1], train)
    _, found = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, parts)
    return cast(tuple[Any, Any], found)


def truncated_gradients(
    model: Model,
    params: Any,
    rows: Mapping[str, jax.Array],
    loss_of_chunk: Callable[[Any, Any, Mapping[str, jax.Array]], tuple[jax.Array, Any]],
    *,
    key: jax.Array,
) -> tuple[Any, Any]:
    """The gradients of a sum of losses of chunks, which end at the start of each chunk.

    Those of a chunk are taken before the next is read, so nothing of it is kept: `read` would keep
    what each chunk carries on, which of Hyena is as much as an activation.

    Args:
      model, rows: as for `read`.
      params: the model's parameters.
      loss_of_chunk: from the output of `extend`, what layers have sown and the chunk's part of
        `rows` to a loss, and what else is kept of the chunk.
      key: of dropout.

    Returns:
      The gradients of `params`, and what was kept, stacked along a first axis of chunks.
    """

    def step(carry: Any, index_and_part: Any) -> tuple[Any, Any]:
        (grads, before), (index, part) = carry, index_and_part

        def loss(params: Any) -> tuple[jax.Array, Any]:
            (output, after), sown = _extend(
                model, {"params": params}, part, before, index, True, key
            )
            total, kept = loss_of_chunk(output, sown, part)
            return total, (kept, after)

        more, (kept, after) = jax.grad(loss, has_aux=True)(params)
        return (jax.tree.map(jnp.add, grads, more), after), kept

    parts = _split(rows, model.config.chunk)
    start = _start(model, {"params": params}, parts[1], True)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (grads, _), kept = jax.lax.scan(step, (zeros, start), parts)
    return grads, kept


def _extend(
    model: Model,
    variables: Mapping[str, Any],
    part: Mapping[str, jax.Array],
    carry: Any,
    index: jax.Array,
    train: bool,
    key: jax.Array | None,
) -> Any:
    rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
    inputs = part["tokens"], part["mask"], carry
    return model.apply(variables, *inputs, train=train, rngs=rngs, mutable=SOWN, method="extend")


def _start(
    model: Model, variables: Mapping[str, Any], parts: Mapping[str, jax.Array], train: bool
) -> Any:
    """What is carried into the first chunk: zeros."""
    first, key = {name: x[0] for name, x in parts.items()}, jax.random.key(0)
    (_, carry), _ = jax.eval_shape(
        lambda: _extend(model, variables, first, None, jnp.int32(0), train, key)
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), carry)


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


def _split(rows: Mapping[str, jax.Array], chunk: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The numbers of the chunks, and [B, L] to [S, B, M]."""

    def split(x_BL: jax.Array) -> jax.Array:
        x_BSM = x_BL.reshape(x_BL.shape[0], -1, chunk)
        return constrain(jnp.swapaxes(x_BSM, 0, 1), None, "batch", "position")

    parts = {name: split(x_BL) for name, x_BL in rows.items()}
    return jnp.arange(len(parts["tokens"])), parts
