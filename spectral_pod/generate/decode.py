"""Exact incremental decoding: prompts in one pass, then byte after byte.

The same numbers as the model on the whole sequence, at a cost per byte that does not grow with the
position, or, for long convolutions, as log^2 N (`ops/online_conv.py`). What a layer keeps of the
past is in Flax's collection `cache`. The prompts' pass fills it; then two kinds of entries are made
ready for steps:

    taps, inputs             a long convolution: -> taps, block
    product_q, product_k,
    product_start            a convolution of two sequences: -> product_block
    keys, values, valid      of attention: room for the positions to come

A program of `BLOCK` positions, compiled once and driven from the host, takes and returns the cache
in place; between two of them the tiles of the convolutions that end there are added, each size by a
small program of its own. No Python runs per byte, and no program touches all of the past.

Prompts of different lengths are aligned at their ends: positions before a prompt are invalid, and
invalid positions change nothing.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from spectral_pod.generate.sampling import Sampling, draw
from spectral_pod.ops import online_conv
from spectral_pod.ops.online_conv import BLOCK
from spectral_pod.shapes import EOS, PAD

PLAIN = Sampling()
END_OF_DOCUMENT = 256  # the class that is not a byte

_Path = tuple[str, ...]
_Flat = dict[_Path, Any]


class _Filters(NamedTuple):
    """Long convolutions of equal width, decoded together."""

    paths: tuple[_Path, ...]
    plan: online_conv.FilterPlan
    state: online_conv.FilterState


class _Products(NamedTuple):
    paths: tuple[_Path, ...]
    state: online_conv.ProductState


class Decoder:
    """Continues one batch of sequences, `BLOCK` positions at a time.

    After construction `logits_BC` are those after the prompts; `extend` appends positions.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        tokens_BP: jax.Array | np.ndarray,
        *,
        num_positions: int,
    ):
        """Runs the prompts.

        Args:
          model: of `models.build(..., decoding=True)`.
          params: of `layers.block.unstack`.
          tokens_BP: the prompts, PAD before them; P a multiple of `BLOCK`.
          num_positions: most positions to come.
        """
        tokens_BP = jnp.asarray(tokens_BP, jnp.int32)
        self.position = tokens_BP.shape[1]
        if self.position % BLOCK:
            raise ValueError(f"prompts of {self.position} positions, not a multiple of {BLOCK}")
        self._model, self._params = model, params
        self._capacity = self.position + max(1, -(-num_positions // BLOCK)) * BLOCK
        self.logits_BC, cache = _prefill(model, params, tokens_BP)
        self._filters, self._products, self._cache = _make_ready(cache, self._capacity)

    def extend(
        self, tokens_B: jax.Array, keys_B: jax.Array, drawn: int, sampling: Sampling
    ) -> jax.Array:
        """Reads `BLOCK` tokens, the first given and each later one drawn after the one before.

        Args:
          tokens_B: the token at the next position.
          keys_B: random keys of the sequences.
          drawn: how many tokens were drawn before; the random draws are those of (key, number).

        Returns:
          int32 [B, BLOCK]: the tokens drawn after each of the positions. The last one has not been
          read: it is the first of the next block.
        """
        tokens_BT, self._cache = _draw_block(
            self._model, self._params, self._cache, tokens_B, keys_B, drawn, self.position, sampling
        )
        self._advance()
        return tokens_BT

    def force(self, tokens_BT: jax.Array) -> jax.Array:
        """Reads `BLOCK` given tokens; the logits [B, BLOCK, C] after each of them."""
        logits_BTC, self._cache = _read_block(
            self._model, self._params, self._cache, tokens_BT, self.position
        )
        self._advance()
        return logits_BTC

    def _advance(self) -> None:
        self.position += BLOCK
        if self.position == self._capacity:  # no later position needs this block
            return
        for i, (paths, plan, state) in enumerate(self._filters):
            block = _stack([self._cache[(*path, "block")] for path in paths])
            state, block = online_conv.filter_advance(plan, state, block, self.position)
            self._filters[i] = _Filters(paths, plan, state)
            self._put(paths, "block", block)
        for i, (paths, product) in enumerate(self._products):
            block = _stack([self._cache[(*path, "product_block")] for path in paths])
            product, block = online_conv.product_advance(product, block, self.position)
            self._products[i] = _Products(paths, product)
            self._put(paths, "product_block", block)

    def _put(self, paths: Sequence[_Path], name: str, stacked: Any) -> None:
        for path, block in zip(paths, _unstack(stacked, len(paths))):
            self._cache[(*path, name)] = block


def generate(
    model: nn.Module,
    params: Any,
    prompts: Sequence[bytes],
    *,
    num_bytes: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    context: int | None = None,
    rows: int = 1,
) -> Iterator[list[bytes]]:
    """Continues every prompt; yields what was appended to each, as it comes.

    Sequence b draws its n-th byte by a key of (seed, b, n): what is written depends neither on
    other prompts nor on the mesh. A sequence ends after `num_bytes` or at the end of a document.
    Beyond `context` positions the last half of it is read again as a new prompt.

    Args:
      model, params: as for `Decoder`.
      prompts: at least one byte each.
      num_bytes: most bytes to append.
      sampling: how bytes are drawn.
      context: positions that the model was made for; None has no limit.
      rows: sequences are computed in multiples of this, the devices that share a batch.

    Raises:
      ValueError: a prompt is empty.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least one byte to continue")
    num_rows = -(-len(prompts) // rows) * rows
    texts = [bytearray(prompt) for prompt in prompts]
    ended = [False] * len(prompts)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(
        jnp.arange(num_rows)
    )
    drawn = 0
    while drawn < num_bytes and not all(ended):
        tokens_BP = _aligned(texts, num_rows, context)
        room = num_bytes - drawn
        if context is not None:
            # Rows have their own counts of positions, of which the longest has the least room.
            longest = int((tokens_BP != PAD).sum(1).max())
            room = min(room, context - longest)
        decoder = Decoder(model, params, tokens_BP, num_positions=room)
        token_B = _draw(decoder.logits_BC, keys_B, drawn, sampling)
        yield _append(texts, ended, np.asarray(token_B)[:, None])
        drawn, left = drawn + 1, room - 1
        while left > 0 and not all(ended):
            tokens_BT = decoder.extend(_as_input(token_B), keys_B, drawn, sampling)
            token_B = tokens_BT[:, -1]
            count = min(left, BLOCK)
            yield _append(texts, ended, np.asarray(tokens_BT)[:, :count])
            drawn, left = drawn + count, left - count


def context_of(model: nn.Module) -> int | None:
    """Positions that a model was made for; without learned positions there is no limit."""
    return model.config.max_positions if model.config.positions == "learned" else None


def _append(texts: list[bytearray], ended: list[bool], tokens_BT: np.ndarray) -> list[bytes]:
    pieces = []
    for row, text in enumerate(texts):
        piece = b""
        if not ended[row]:
            tokens = tokens_BT[row].tolist()
            if END_OF_DOCUMENT in tokens:
                tokens, ended[row] = tokens[: tokens.index(END_OF_DOCUMENT)], True
            piece = bytes(tokens)
        text += piece
        pieces.append(piece)
    return pieces


def _aligned(texts: Sequence[bytes | bytearray], rows: int, context: int | None) -> np.ndarray:
    """Prompts with PAD before them, [rows, P]; P is a power of two: few shapes are compiled."""
    if context is not None:
        texts = [text if len(text) < context else text[-max(1, context // 2) :] for text in texts]
    longest = max(len(text) for text in texts)
    length = max(BLOCK, 1 << (longest - 1).bit_length())
    tokens_BP = np.full((rows, length), PAD, np.int32)
    tokens_BP[len(texts) :, -1] = 0  # rows that only fill up the devices
    for row, text in enumerate(texts):
        tokens_BP[row, length - len(text) :] = np.frombuffer(bytes(text), np.uint8)
    return tokens_BP


def _as_input(token_B: jax.Array) -> jax.Array:
    return jnp.where(token_B == END_OF_DOCUMENT, EOS, token_B)


# ---- Programs --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _prefill(model: nn.Module, params: Any, tokens_BP: jax.Array) -> tuple[jax.Array, _Flat]:
    logits_BPC, variables = model.apply(
        {"params": params}, tokens_BP, tokens_BP != PAD, mutable=["cache"]
    )
    return logits_BPC[:, -1], traverse_util.flatten_dict(variables["cache"])


@functools.partial(jax.jit, static_argnums=3)
def _draw(logits_BC: jax.Array, keys_B: jax.Array, drawn: jax.Array, sampling: Sampling) -> Any:
    return draw(logits_BC, jax.vmap(jax.random.fold_in, (0, None))(keys_B, drawn), sampling)


def _step(
    model: nn.Module, params: Any, cache: _Flat, token_B: jax.Array, position: jax.Array
) -> tuple[jax.Array, _Flat]:
    logits_B1C, variables = model.apply(
        {"params": params, "cache": traverse_util.unflatten_dict(cache)},
        token_B[:, None],
        jnp.ones((len(token_B), 1), bool),
        position=position,
        mutable=["cache"],
    )
    return logits_B1C[:, 0], traverse_util.flatten_dict(variables["cache"])


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def _draw_block(
    model: nn.Module,
    params: Any,
    cache: _Flat,
    token_B: jax.Array,
    keys_B: jax.Array,
    drawn: jax.Array,
    position: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, _Flat]:
    def step(carry: tuple[jax.Array, _Flat], i: jax.Array) -> Any:
        token_B, cache = carry
        logits_BC, cache = _step(model, params, cache, token_B, position + i)
        token_B = _draw(logits_BC, keys_B, drawn + i, sampling)
        return (_as_input(token_B), cache), token_B

    (_, cache), tokens_TB = jax.lax.scan(step, (token_B, cache), jnp.arange(BLOCK))
    return tokens_TB.T, cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read_block(
    model: nn.Module, params: Any, cache: _Flat, tokens_BT: jax.Array, position: jax.Array
) -> tuple[jax.Array, _Flat]:
    def step(cache: _Flat, token_and_offset: Any) -> tuple[_Flat, jax.Array]:
        token_B, i = token_and_offset
        logits_BC, cache = _step(model, params, cache, token_B, position + i)
        return cache, logits_BC

    cache, logits_TBC = jax.lax.scan(step, cache, (tokens_BT.T, jnp.arange(BLOCK)))
    return jnp.swapaxes(logits_TBC, 0, 1), cache


# ---- From the cache that the prompts leave to the one that steps take ---------------------------


def _make_ready(cache: _Flat, capacity: int) -> tuple[list[_Filters], list[_Products], _Flat]:
    cache = dict(cache)
    filters = []
    for paths in _by_shape(cache, "inputs"):
        taps_JTD = jnp.stack([cache[(*path, "taps")] for path in paths])
        plan = online_conv.plan_filter(taps_JTD, capacity)
        x_JBPD = jnp.stack([cache.pop((*path, "inputs")) for path in paths])
        _, state, block = online_conv.filter_prefill(plan, x_JBPD)
        filters.append(_Filters(paths, plan, state))
        for name, values in (("taps", plan.h_JTD), ("block", block)):
            for path, value in zip(paths, _unstack(values, len(paths))):
                cache[(*path, name)] = value
    products = []
    for paths in _by_shape(cache, "product_q"):
        q_JBPD, k_JBPD, start_JB = (
            jnp.stack([cache.pop((*path, name)) for path in paths])
            for name in ("product_q", "product_k", "product_start")
        )
        _, product, product_block = online_conv.product_prefill(q_JBPD, k_JBPD, start_JB, capacity)
        products.append(_Products(paths, product))
        for path, value in zip(paths, _unstack(product_block, len(paths))):
            cache[(*path, "product_block")] = value
    for path, value in cache.items():
        if path[-1] in ("keys", "values", "valid"):
            room = [(0, 0)] * value.ndim
            room[1] = (0, capacity - value.shape[1])
            cache[path] = jnp.pad(value, room)
    return filters, products, cache


def _by_shape(cache: _Flat, name: str) -> list[tuple[_Path, ...]]:
    """The modules that have an entry of this name, those with equal shapes together."""
    groups: dict[tuple[int, ...], list[_Path]] = {}
    for path, value in cache.items():
        if path[-1] == name:
            groups.setdefault(value.shape, []).append(path[:-1])
    return [tuple(paths) for paths in groups.values()]


@jax.jit
def _stack(blocks: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *values: jnp.stack(values), *blocks)


@functools.partial(jax.jit, static_argnums=1)
def _unstack(stacked: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda x, j=j: x[j], stacked) for j in range(count)]
