"""Exact incremental decoding: prompts in one pass, then byte after byte.

It gives the numbers of the model on the whole sequence. The cost per byte is constant for recurrent
layers and local attention, O(log^2 N) for long convolutions (`ops/online_conv.py`), and linear in
the positions for full attention. A layer's decode state (`layers/mixer.py`) is created by `prefill`
and updated by `advance`. In between, the decoder prepares three kinds of states:

    GrowingState     is extended to all positions to come
    FilterInputs     of a long convolution, becomes a FilterCache
    ProductInputs    of a product of two sequences, becomes a ProductBlock

For the last two the decoder also holds partial sums over all positions, outside of the model.

One compiled program reads `BLOCK` positions and updates the states in place. Between its calls, a
small program per tile size adds the tiles of the convolutions that end there. No Python code runs
per byte.

Prompts are left-padded to equal lengths. Padding positions are invalid, and invalid positions do
not affect valid ones.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.generate.sampling import Sampling, draw
from spectral_pod.layers.long_convolution import FilterCache, FilterInputs
from spectral_pod.layers.mixer import GrowingState
from spectral_pod.layers.wavelet_attention import ProductInputs
from spectral_pod.models.causal_model import CausalModel, DecodeState
from spectral_pod.ops import online_conv
from spectral_pod.ops.online_conv import BLOCK, ProductBlock
from spectral_pod.seeds import random_key
from spectral_pod.shapes import EOS, PAD, symbol

PLAIN = Sampling()
END_OF_DOCUMENT = 256  # the class of models of bytes that is no byte; always the last one

# A decode state's parts that are prepared or advanced as a whole.
_KINDS = (GrowingState, FilterInputs, ProductInputs, FilterCache, ProductBlock)


class _Filters(flax.struct.PyTreeNode):
    """Long convolutions of equal shapes, decoded together; `places` are indices of their states."""

    places: tuple[int, ...] = flax.struct.field(pytree_node=False)
    plan: online_conv.FilterPlan
    sums: online_conv.FilterState

    def advance(self, caches: list[FilterCache], position: int) -> tuple[Any, list[FilterCache]]:
        """Finishes the block that ends at `position`, for all of these layers."""
        block = _stack([cache.block for cache in caches])
        sums, block = online_conv.filter_advance(self.plan, self.sums, block, position)
        blocks = _unstack(block, len(caches))
        caches = [FilterCache(cache.taps_TD, block) for cache, block in zip(caches, blocks)]
        return self.replace(sums=sums), caches


class _Products(flax.struct.PyTreeNode):
    """Products of two sequences of equal shapes, likewise."""

    places: tuple[int, ...] = flax.struct.field(pytree_node=False)
    sums: online_conv.ProductState

    def advance(self, blocks: list[ProductBlock], position: int) -> tuple[Any, list[ProductBlock]]:
        sums, block = online_conv.product_advance(self.sums, _stack(blocks), position)
        return self.replace(sums=sums), _unstack(block, len(blocks))


class Decoder:
    """Continues one batch of sequences, `BLOCK` positions at a time.

    After construction `logits_BC` are the float32 logits after the prompts; `extend` continues.
    """

    def __init__(
        self,
        model: CausalModel,
        params: Any,
        tokens_BP: jax.Array | np.ndarray,
        *,
        num_positions: int,
    ):
        """Prefills the prompts.

        Args:
          model: from `models.build(..., decoding=True)`.
          params: its parameters, from `layers.block.unstack`.
          tokens_BP: int prompts, left-padded with PAD. With P = 0 the sequences start empty, and
            `logits_BC` is None.
          num_positions: maximum number of positions after the prompts.

        Raises:
          ValueError: P is not a multiple of `BLOCK`.
        """
        tokens_BP = jnp.asarray(tokens_BP, jnp.int32)
        batch, self.position = tokens_BP.shape
        if self.position % BLOCK:
            raise ValueError(f"prompts of {self.position} positions, not a multiple of {BLOCK}")
        self._model, self._params = model, params
        self._capacity = self.position + max(1, -(-num_positions // BLOCK)) * BLOCK
        self.logits_BC = None
        if self.position:
            self.logits_BC, state = _prefill(model, params, tokens_BP)
        else:
            state = _init_state(model, params, batch)
        self._state, self._sums = _prepare(state, self._capacity)

    def extend(
        self, tokens_B: jax.Array, keys_B: jax.Array, drawn: int, sampling: Sampling
    ) -> jax.Array:
        """Reads `BLOCK` tokens: the given one, then each one sampled after the one before.

        Args:
          tokens_B: int32, the token at the next position.
          keys_B: random keys, one per sequence.
          drawn: the number of tokens sampled before; the key of a sequence's n-th is (key, n).
          sampling: temperature, top-k and top-p.

        Returns:
          int32 [B, BLOCK]: the token sampled after each of the positions. The last one has not been
          read: it is the first of the next block.
        """
        tokens_BT, self._state = _draw_block(
            self._model, self._params, self._state, tokens_B, keys_B, drawn, self.position, sampling
        )
        self._advance()
        return tokens_BT

    def force(self, tokens_BT: jax.Array) -> jax.Array:
        """Reads `BLOCK` given tokens; returns float32 logits [B, BLOCK, C], after each of them."""
        logits_BTC, self._state = _read_block(
            self._model, self._params, self._state, tokens_BT, self.position
        )
        self._advance()
        return logits_BTC

    def _advance(self) -> None:
        self.position += BLOCK
        if self.position == self._capacity:  # no later position needs this block
            return
        leaves, tree = _leaves(self._state)
        for i, group in enumerate(self._sums):
            caches: list[Any] = [leaves[place] for place in group.places]
            self._sums[i], caches = group.advance(caches, self.position)
            for place, cache in zip(group.places, caches):
                leaves[place] = cache
        self._state = jax.tree.unflatten(tree, leaves)


def generate(
    model: CausalModel,
    params: Any,
    prompts: Sequence[bytes],
    *,
    num_bytes: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    context: int | None = None,
    rows: int = 1,
) -> Iterator[list[bytes]]:
    """Continues prompts by `generate_tokens`; yields the bytes appended to each of them."""
    pieces = generate_tokens(
        model,
        params,
        prompts,
        num_tokens=num_bytes,
        seed=seed,
        sampling=sampling,
        context=context,
        rows=rows,
    )
    for row in pieces:
        yield list(map(bytes, row))


def generate_tokens(
    model: CausalModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    context: int | None = None,
    rows: int = 1,
) -> Iterator[list[list[int]]]:
    """Continues prompts of tokens, such as bytes; yields those appended, as they are sampled.

    The n-th token of sequence b is sampled with a key derived from (seed, b, n), so a text depends
    neither on other prompts nor on the mesh. A sequence ends after `num_tokens` or at the end of a
    document, the last class. When it reaches `context` positions, the last half of them becomes a
    new prompt.

    Args:
      model, params: as for `Decoder`.
      prompts: at least one token each.
      num_tokens: maximum number of tokens to append.
      seed: sampling seed.
      sampling: temperature, top-k and top-p.
      context: the number of positions that the model was built for; None for no limit.
      rows: the batch is padded to a multiple of this, the number of devices that share it.

    Raises:
      ValueError: a prompt is empty.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least one byte to continue")
    num_rows, end = -(-len(prompts) // rows) * rows, model.num_classes - 1
    texts = [list(prompt) for prompt in prompts]
    ended = [False] * len(prompts)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(random_key(seed), row))(jnp.arange(num_rows))
    drawn = 0
    while drawn < num_tokens and not all(ended):
        tokens_BP = _aligned(texts, num_rows, context)
        room = num_tokens - drawn
        if context is not None:
            # Each row counts its own positions; the longest one has the fewest left.
            longest = int((tokens_BP != PAD).sum(1).max())
            room = min(room, context - longest)
        decoder = Decoder(model, params, tokens_BP, num_positions=room)
        token_B = _draw(decoder.logits_BC, keys_B, drawn, sampling)
        yield _append(texts, ended, np.asarray(token_B)[:, None], end)
        drawn, left = drawn + 1, room - 1
        while left > 0 and not all(ended):
            tokens_BT = decoder.extend(_as_input(token_B, end), keys_B, drawn, sampling)
            token_B = tokens_BT[:, -1]
            count = min(left, BLOCK)
            yield _append(texts, ended, np.asarray(tokens_BT)[:, :count], end)
            drawn, left = drawn + count, left - count


def context_of(model: CausalModel) -> int | None:
    """The number of positions that a model was built for; None without learned positions."""
    return model.config.max_positions if model.config.positions == "learned" else None


def _append(
    texts: list[list[int]], ended: list[bool], tokens_BT: np.ndarray, end: int
) -> list[list[int]]:
    pieces = []
    for row, text in enumerate(texts):
        piece: list[int] = []
        if not ended[row]:
            piece = tokens_BT[row].tolist()
            if end in piece:
                piece, ended[row] = piece[: piece.index(end)], True
        text += piece
        pieces.append(piece)
    return pieces


def _aligned(texts: Sequence[Sequence[int]], rows: int, context: int | None) -> np.ndarray:
    """Left-padded prompts, int32 [rows, P]; P is a power of two, to compile for few shapes."""
    if context is not None:
        texts = [text if len(text) < context else text[-max(1, context // 2) :] for text in texts]
    longest = max(len(text) for text in texts)
    length = max(BLOCK, 1 << (longest - 1).bit_length())
    tokens_BP = np.full((rows, length), PAD, np.int32)
    tokens_BP[len(texts) :, -1] = 0  # rows without a prompt, which are discarded
    for row, text in enumerate(texts):
        tokens_BP[row, length - len(text) :] = symbol(np.asarray(text, np.int32))
    return tokens_BP


def _as_input(token_B: jax.Array, end: int) -> jax.Array:
    return jnp.where(token_B == end, EOS, symbol(token_B, jnp))


# ---- Programs --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    model: CausalModel, params: Any, tokens_BP: jax.Array
) -> tuple[jax.Array, DecodeState]:
    logits_BPC, state = model.apply(
        {"params": params}, tokens_BP, tokens_BP != PAD, method="prefill"
    )
    return logits_BPC[:, -1], state


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init_state(model: CausalModel, params: Any, batch: int) -> DecodeState:
    state: DecodeState = model.apply({"params": params}, batch, method="init_state")
    return state


@functools.partial(jax.jit, static_argnums=3)
def _draw(logits_BC: jax.Array, keys_B: jax.Array, drawn: jax.Array, sampling: Sampling) -> Any:
    return draw(logits_BC, jax.vmap(jax.random.fold_in, (0, None))(keys_B, drawn), sampling)


def read_position(
    model: CausalModel, params: Any, state: DecodeState, token_B: jax.Array, position: jax.Array
) -> tuple[jax.Array, DecodeState]:
    logits_B1C, state = model.apply(
        {"params": params}, token_B[:, None], state, position, method="advance"
    )
    return logits_B1C[:, 0], state


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def _draw_block(
    model: CausalModel,
    params: Any,
    state: DecodeState,
    token_B: jax.Array,
    keys_B: jax.Array,
    drawn: jax.Array,
    position: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, DecodeState]:
    def step(carry: tuple[jax.Array, DecodeState], i: jax.Array) -> Any:
        token_B, state = carry
        logits_BC, state = read_position(model, params, state, token_B, position + i)
        token_B = _draw(logits_BC, keys_B, drawn + i, sampling)
        return (_as_input(token_B, model.num_classes - 1), state), token_B

    (_, state), tokens_TB = jax.lax.scan(step, (token_B, state), jnp.arange(BLOCK))
    return tokens_TB.T, state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read_block(
    model: CausalModel, params: Any, state: DecodeState, tokens_BT: jax.Array, position: jax.Array
) -> tuple[jax.Array, DecodeState]:
    def step(state: DecodeState, token_and_i: tuple[jax.Array, jax.Array]) -> Any:
        token_B, i = token_and_i
        logits_BC, state = read_position(model, params, state, token_B, position + i)
        return state, logits_BC

    state, logits_TBC = jax.lax.scan(step, state, (tokens_BT.T, jnp.arange(BLOCK)))
    return jnp.swapaxes(logits_TBC, 0, 1), state


# ---- States after prefill become states of steps ------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def _prepare(state: DecodeState, capacity: int) -> tuple[DecodeState, list[_Filters | _Products]]:
    """The state of the first step after a prompt, and the sums beside it, as one program."""
    leaves, tree = _leaves(state)
    sums: list[_Filters | _Products] = [
        *_filters(leaves, capacity),
        *_products(leaves, capacity),
    ]
    leaves = [leaf.extend(capacity) if isinstance(leaf, GrowingState) else leaf for leaf in leaves]
    return jax.tree.unflatten(tree, leaves), sums


def _leaves(state: DecodeState) -> tuple[list[Any], Any]:
    """The parts of a state that the decoder treats as one, and how they make up the state."""
    return jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, _KINDS))


def _filters(leaves: list[Any], capacity: int) -> list[_Filters]:
    """Replaces every `FilterInputs` by a `FilterCache`; groups layers of equal shapes."""
    groups = []
    for places in _by_shape(leaves, FilterInputs):
        taps_JDT, x_JBPD = _stack([leaves[place] for place in places])
        plan = online_conv.plan_filter(jnp.swapaxes(taps_JDT, 1, 2), capacity)
        if x_JBPD.shape[2]:
            _, sums, block = online_conv.filter_prefill(plan, x_JBPD)
        else:
            sums, block = online_conv.filter_init(plan, x_JBPD.shape[1])
        caches = _unstack(FilterCache(plan.h_JTD, block), len(places))
        for place, cache in zip(places, caches):
            leaves[place] = cache
        groups.append(_Filters(places, plan, sums))
    return groups


def _products(leaves: list[Any], capacity: int) -> list[_Products]:
    """Replaces every `ProductInputs` by a `ProductBlock`, likewise."""
    groups = []
    for places in _by_shape(leaves, ProductInputs):
        q_JBPD, k_JBPD, start_JB = _stack([leaves[place] for place in places])
        J, B, P, D = q_JBPD.shape
        if P:
            _, sums, block = online_conv.product_prefill(q_JBPD, k_JBPD, start_JB, capacity)
        else:
            sums, block = online_conv.product_init(J, B, capacity, D)
        for place, leaf in zip(places, _unstack(block, J)):
            leaves[place] = leaf
        groups.append(_Products(places, sums))
    return groups


def _by_shape(leaves: Sequence[Any], kind: type) -> list[tuple[int, ...]]:
    """The indices of the states of a kind, grouped by shape."""
    groups: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, kind):
            groups.setdefault(jax.tree.map(jnp.shape, leaf), []).append(place)
    return [tuple(places) for places in groups.values()]


@jax.jit
def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *values: jnp.stack(values), *trees)


@functools.partial(jax.jit, static_argnums=1)
def _unstack(stacked: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda x, j=j: x[j], stacked) for j in range(count)]
