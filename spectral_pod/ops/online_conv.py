"""Exact causal convolutions of sequences that arrive one position at a time, for decoding.

There are two kinds, for all J layers of a model at once, in float32:

    filter    y_t = sum_{s <= t} h_{t-s} x_s    h is fixed, x arrives (long convolutions)
    product   y_t = sum_{s <= t} q_s k_{t-s}    q and k both arrive (convolutional attention)

Both use a dyadic tiling (van der Hoeven 2002, "Relax, but don't be too lazy"; Oncescu et al. 2024,
"Flash Inference"). When i positions have arrived, let U = i & -i be the largest power of two that
divides i. The last U inputs are convolved with h[0 : 2 U] by one circular FFT of 2 U points, whose
upper half does not wrap around and is the contribution of these inputs to the next U outputs. A
pair (s, t) is counted in exactly one tile: the one whose i is divisible by the largest power of two
in (s, t]. For products, q and k take turns as the filter, and pairs within a tile are counted once.
N positions cost O(N log^2 N).

Tiles smaller than `BLOCK` are not worth an FFT: each step adds the contribution of its input
directly to the outputs of the current block of positions. A decoder therefore keeps two things:

    state   inputs and partial sums of all positions: large, accessed once per `BLOCK` positions
    block   inputs and partial sums of the current block: small, accessed in every step

`filter_step` and `product_step` are pure and handle one layer. They are called (unrolled, scanned
or vmapped over layers) inside a model's own jitted step, which never takes the large state.
`filter_advance` and `product_advance` are called from the host between blocks and run one small
program per tile size, with the state donated. A `lax.switch` over tile sizes inside the model's
program would copy the state instead.

    plan = plan_filter(h_JND, length)
    y_JBPD, state, block = filter_prefill(plan, prompt_JBPD)          # or filter_init(plan, B)
    for position in range(P, length):
        y_BD, block[j] = filter_step(plan.h_JTD[j], block[j], x_BD, position)    # each layer j
        if (position + 1) % BLOCK == 0 and position + 1 < length:
            state, block = filter_advance(plan, state, block, position + 1)

All sequences of a batch are at the same position but may start at different ones, with zeros before
the start. A late start delays the output of a filter just as it delays the input. A plain product
would be delayed twice, as both factors are; so one factor is indexed from the start of its
sequence. In shape suffixes J stands for layers and P for the positions of a prompt.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import Axes, shard_op

BLOCK = 32  # positions summed directly, and the smallest tile

_SEQUENCES: Axes = ("layer", "batch", None, "channel")
_STARTS: Axes = ("layer", "batch")
_SPECTRUM: Axes = ("layer", None, "channel", None)


class FilterPlan(NamedTuple):
    """Filters prepared for tiling; N is a multiple of `BLOCK`."""

    h_JND: jax.Array
    h_JTD: jax.Array  # the first `BLOCK` taps
    spectra: tuple[jax.Array, ...]  # of h[0 : 2 U], [J, 1, D, U + 1], for U = BLOCK 2^i < N


class FilterState(NamedTuple):
    """Inputs and partial sums; a prompt's inputs stay zero, as the sums contain their effects."""

    x_JBND: jax.Array
    sums_JBND: jax.Array


class FilterBlock(NamedTuple):
    """The current block; a single layer's has no axis J. Inputs of a prompt stay zero."""

    x_JBTD: jax.Array
    sums_JBTD: jax.Array


class ProductState(NamedTuple):
    """Inputs and partial sums; the sums contain all pairs before `prompt`, the prompt's length."""

    q_JBND: jax.Array
    k_JBND: jax.Array
    sums_JBND: jax.Array
    start_JB: jax.Array  # first position of each sequence
    prompt: jax.Array


class ProductBlock(NamedTuple):
    """The current block; a single layer's has no axis J. Entries q, k of a prompt stay zero.

    The heads hold the first `BLOCK` positions of each sequence, a prompt's included, as far as they
    have arrived.
    """

    q_JBTD: jax.Array
    k_JBTD: jax.Array
    q_head_JBTD: jax.Array
    k_head_JBTD: jax.Array
    sums_JBTD: jax.Array
    start_JB: jax.Array


# ---- Filters: one side is fixed ------------------------------------------------------------------


def plan_filter(h_JND: jax.Array, length: int) -> FilterPlan:
    """Prepares filters for up to `length` positions; the spectra take 2 to 4 times their memory.

    Args:
      h_JND: one filter per layer and channel, of any length; taps beyond it count as zero.
      length: maximum number of positions, prompt included.
    """
    h_JND = _fit(h_JND.astype(jnp.float32), _capacity(length))

    def op(h_JBND: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_spectrum(_fit(h_JBND, 2 * size), 2 * size) for size in sizes)

    sizes = _tile_sizes(h_JND.shape[1])
    axes: Axes = ("layer", None, None, "channel")
    spectra = shard_op(op, (axes,), (_SPECTRUM,) * len(sizes))(h_JND[:, None])
    return FilterPlan(h_JND, h_JND[:, :BLOCK], spectra)


def filter_init(plan: FilterPlan, batch: int) -> tuple[FilterState, FilterBlock]:
    """The state and block of `batch` sequences before their first position."""
    J, N, D = plan.h_JND.shape
    # Separate buffers, or the state could not be donated.
    state = FilterState(*(jnp.zeros((J, batch, N, D), jnp.float32) for _ in range(2)))
    return state, FilterBlock(*(_read(x_JBND, 0, BLOCK) for x_JBND in state))


def filter_prefill(
    plan: FilterPlan, x_JBPD: jax.Array
) -> tuple[jax.Array, FilterState, FilterBlock]:
    """Convolves a prompt by one FFT, and prepares decoding.

    Layers that depend on one another are prefilled one at a time: all leaves of a plan have a
    leading axis J, so slices of a plan are plans of fewer layers, and the results concatenate.

    Args:
      plan: from `plan_filter`.
      x_JBPD: the prompts, P >= 1.

    Returns:
      y_JBPD, and the state and block after the prompt.

    Raises:
      ValueError: the prompt leaves no room for another position.
    """
    P, N = x_JBPD.shape[2], plan.h_JND.shape[1]
    _check_room(P, N)
    points = _even_points(N + P - 1)

    def op(x_JBPD: jax.Array, h_JBND: jax.Array) -> jax.Array:
        return _inverse(_spectrum(x_JBPD, points) * _spectrum(h_JBND, points), 0, N)

    axes: Axes = ("layer", None, None, "channel")
    run = shard_op(op, (_SEQUENCES, axes), _SEQUENCES)
    sums_JBND = run(x_JBPD.astype(jnp.float32), plan.h_JND[:, None])
    state = FilterState(jnp.zeros_like(sums_JBND), sums_JBND)
    sums_JBTD = _read(sums_JBND, P - P % BLOCK, BLOCK)
    return sums_JBND[:, :, :P], state, FilterBlock(jnp.zeros_like(sums_JBTD), sums_JBTD)


def filter_step(
    h_TD: jax.Array, block: FilterBlock, x_BD: jax.Array, position: int | jax.Array
) -> tuple[jax.Array, FilterBlock]:
    """Computes one position of one layer.

    Args:
      h_TD: the layer's slice of `plan.h_JTD`.
      block: the layer's slice of the block that contains `position`.
      x_BD: the input at `position`.
      position: index counted from the start of the prompt.

    Returns:
      The output y_BD in float32, and the updated block.
    """
    x_BTD, sums_BTD = block
    phase = position % BLOCK
    x_BD = x_BD.astype(jnp.float32)
    sums_BTD += _delay(h_TD, phase)[None] * x_BD[:, None]
    return _at(sums_BTD, phase), FilterBlock(_put(x_BTD, x_BD, phase), sums_BTD)


def filter_advance(
    plan: FilterPlan, state: FilterState, block: FilterBlock, position: int
) -> tuple[FilterState, FilterBlock]:
    """Finishes a block: adds the contributions of the tile that ends with it to later outputs.

    Args:
      plan: from `plan_filter`.
      state: the state, which is donated and must not be used again.
      block: the block that ends.
      position: the number of positions that have arrived, a multiple of `BLOCK`.

    Returns:
      The state, and the block that begins at `position`.

    Raises:
      ValueError: no block begins at `position`.
    """
    size, reach = _tile(position, plan.h_JND.shape[1])
    spectrum_JBDF = plan.spectra[_tile_sizes(plan.h_JND.shape[1]).index(size)]
    return _filter_tile(spectrum_JBDF, state, block.x_JBTD, position, size=size, reach=reach)


@functools.partial(jax.jit, static_argnames=("size", "reach"), donate_argnames="state")
def _filter_tile(
    spectrum_JBDF: jax.Array,
    state: FilterState,
    x_JBTD: jax.Array,
    position: jax.Array,
    *,
    size: int,
    reach: int,
) -> tuple[FilterState, FilterBlock]:
    def op(
        spectrum_JBDF: jax.Array,
        x_JBND: jax.Array,
        sums_JBND: jax.Array,
        x_JBTD: jax.Array,
        position: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        x_JBND = _write(x_JBND, x_JBTD, position - BLOCK)
        tile = _spectrum(_read(x_JBND, position - size, size), 2 * size) * spectrum_JBDF
        return x_JBND, _add(sums_JBND, _inverse(tile, size, reach), position)

    in_axes = (_SPECTRUM, _SEQUENCES, _SEQUENCES, _SEQUENCES, ())
    run = shard_op(op, in_axes, (_SEQUENCES, _SEQUENCES))
    state = FilterState(*run(spectrum_JBDF, *state, x_JBTD, position))
    sums_JBTD = _read(state.sums_JBND, position, BLOCK)
    return state, FilterBlock(jnp.zeros_like(sums_JBTD), sums_JBTD)


# ---- Products: both sides arrive -----------------------------------------------------------------


def product_init(
    layers: int, batch: int, length: int, width: int
) -> tuple[ProductState, ProductBlock]:
    """The state and block before the first of up to `length` positions of [B, D] each."""
    shape = (layers, batch, _capacity(length), width)
    q_JBND, k_JBND, sums_JBND = (jnp.zeros(shape, jnp.float32) for _ in range(3))
    start_JB = jnp.zeros((layers, batch), jnp.int32)
    state = ProductState(q_JBND, k_JBND, sums_JBND, start_JB, prompt=jnp.int32(0))
    return state, _product_block(state, 0)


def product_prefill(
    q_JBPD: jax.Array, k_JBPD: jax.Array, start_JB: jax.Array, length: int
) -> tuple[jax.Array, ProductState, ProductBlock]:
    """Convolves a prompt's q and k by one FFT, and prepares decoding.

    Args:
      q_JBPD, k_JBPD: the prompts, P >= 1, zero before the start of each sequence.
      start_JB: int32, first position of each sequence.
      length: maximum number of positions, prompt included.

    Returns:
      y_JBPD, and the state and block after the prompt.

    Raises:
      ValueError: the prompt leaves no room for another position.
    """
    P, N = q_JBPD.shape[2], _capacity(length)
    _check_room(P, N)
    points = _even_points(2 * P - 1)

    def op(q_JBPD: jax.Array, k_JBPD: jax.Array, start_JB: jax.Array) -> jax.Array:
        q_JBPD = _head(q_JBPD, start_JB, P)
        return _inverse(_spectrum(q_JBPD, points) * _spectrum(k_JBPD, points), 0, min(N, points))

    q_JBPD, k_JBPD = q_JBPD.astype(jnp.float32), k_JBPD.astype(jnp.float32)
    run = shard_op(op, (_SEQUENCES, _SEQUENCES, _STARTS), _SEQUENCES)
    sums = run(q_JBPD, k_JBPD, start_JB)
    state = ProductState(
        _fit(q_JBPD, N), _fit(k_JBPD, N), _fit(sums, N), start_JB, prompt=jnp.int32(P)
    )
    return sums[:, :, :P], state, _product_block(state, P - P % BLOCK)


def product_step(
    block: ProductBlock, q_BD: jax.Array, k_BD: jax.Array, position: int | jax.Array
) -> tuple[jax.Array, ProductBlock]:
    """Computes one position of one layer.

    Args:
      block: the layer's slice of the block that contains `position`.
      q_BD, k_BD: the inputs at `position`.
      position: index counted from the start of the prompt.

    Returns:
      The output y_BD in float32, and the updated block.
    """
    q_BTD, k_BTD, q_head_BTD, k_head_BTD, sums_BTD, start_B = block
    phase = position % BLOCK
    q_BD, k_BD = q_BD.astype(jnp.float32), k_BD.astype(jnp.float32)
    is_current_BT1 = (jnp.arange(BLOCK)[None] == (position - start_B)[:, None])[..., None]
    # The pair of this position's own q and k is counted once, as k enters its head before q does.
    k_head_BTD = jnp.where(is_current_BT1, k_BD[:, None], k_head_BTD)
    sums_BTD += _delay(k_head_BTD, phase) * q_BD[:, None]
    sums_BTD += _delay(q_head_BTD, phase) * k_BD[:, None]
    q_head_BTD = jnp.where(is_current_BT1, q_BD[:, None], q_head_BTD)
    q_BTD, k_BTD = _put(q_BTD, q_BD, phase), _put(k_BTD, k_BD, phase)
    block = ProductBlock(q_BTD, k_BTD, q_head_BTD, k_head_BTD, sums_BTD, start_B)
    return _at(sums_BTD, phase), block


def product_advance(
    state: ProductState, block: ProductBlock, position: int
) -> tuple[ProductState, ProductBlock]:
    """Finishes a block, as `filter_advance` does, with five FFTs per tile instead of two."""
    size, reach = _tile(position, state.q_JBND.shape[2])
    entries = block.q_JBTD, block.k_JBTD
    return _product_tile(state, entries, position, size=size, reach=reach)


@functools.partial(jax.jit, static_argnames=("size", "reach"), donate_argnames="state")
def _product_tile(
    state: ProductState,
    entries: tuple[jax.Array, jax.Array],
    position: jax.Array,
    *,
    size: int,
    reach: int,
) -> tuple[ProductState, ProductBlock]:
    """Adds the pairs of a tile that involve a position after the prompt.

    These are new q with any k, and new k with any q except the new ones of the same tile, whose
    pairs are already counted. No pair is counted in two tiles: if its later position is an input of
    one tile and its earlier position of another, the later one had not arrived at that other tile.
    """

    def op(
        q_JBND: jax.Array,
        k_JBND: jax.Array,
        sums_JBND: jax.Array,
        start_JB: jax.Array,
        prompt: jax.Array,
        q_JBTD: jax.Array,
        k_JBTD: jax.Array,
        position: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Added rather than written: the block in which a prompt ends holds entries of the prompt.
        q_JBND = _add(q_JBND, q_JBTD, position - BLOCK)
        k_JBND = _add(k_JBND, k_JBTD, position - BLOCK)
        fresh = jnp.maximum(position - size, prompt)  # the first position that is new in this tile
        new = (jnp.arange(size) + position - size >= fresh)[None, None, :, None]
        q_new, k_new = (
            jnp.where(new, _read(x_JBND, position - size, size), 0) for x_JBND in (q_JBND, k_JBND)
        )
        q_head, k_head = (_head(x_JBND, start_JB, 2 * size) for x_JBND in (q_JBND, k_JBND))
        met = start_JB[..., None] + jnp.arange(2 * size)[None, None] >= fresh
        q_head = jnp.where(met[..., None], 0, q_head)
        q_new, k_new, q_head, k_head = (
            _spectrum(x_JBND, 2 * size) for x_JBND in (q_new, k_new, q_head, k_head)
        )
        tile = _inverse(q_new * k_head + k_new * q_head, size, reach)
        return q_JBND, k_JBND, _add(sums_JBND, tile, position)

    in_axes = (*(_SEQUENCES,) * 3, _STARTS, (), *(_SEQUENCES,) * 2, ())
    run = shard_op(op, in_axes, (_SEQUENCES,) * 3)
    q_JBND, k_JBND, sums_JBND = run(*state, *entries, position)
    state = ProductState(q_JBND, k_JBND, sums_JBND, state.start_JB, state.prompt)
    return state, _product_block(state, position)


def _product_block(state: ProductState, begin: int | jax.Array) -> ProductBlock:
    head = shard_op(functools.partial(_head, count=BLOCK), (_SEQUENCES, _STARTS), _SEQUENCES)
    sums_JBTD = _read(state.sums_JBND, begin, BLOCK)
    return ProductBlock(
        q_JBTD=jnp.zeros_like(sums_JBTD),
        k_JBTD=jnp.zeros_like(sums_JBTD),
        q_head_JBTD=head(state.q_JBND, state.start_JB),
        k_head_JBTD=head(state.k_JBND, state.start_JB),
        sums_JBTD=sums_JBTD,
        start_JB=state.start_JB,
    )


def _head(x_JBND: jax.Array, start_JB: jax.Array, count: int) -> jax.Array:
    """The first `count` positions of sequences that start at `start_JB`, zero-padded at the end."""
    N = x_JBND.shape[2]
    available = min(count, N)

    def read(x_ND: jax.Array, start: jax.Array) -> jax.Array:
        before = jnp.minimum(start, N - available)
        return _read(_fit(_read(x_ND, before, available), available + count), start - before, count)

    return jax.vmap(jax.vmap(read))(x_JBND, start_JB)


# ---- Tiling --------------------------------------------------------------------------------------


def _capacity(length: int) -> int:
    return math.ceil(length / BLOCK) * BLOCK


def _check_room(prompt: int, capacity: int) -> None:
    if prompt >= capacity:
        raise ValueError(f"a prompt of {prompt} positions leaves no room in {capacity}")


def _even_points(least: int) -> int:
    """The next power of two, for speed, and at least 2, as `_inverse` needs an even number."""
    return max(2, 1 << (least - 1).bit_length())


def _tile_sizes(capacity: int) -> list[int]:
    return [BLOCK << i for i in range(32) if BLOCK << i < capacity]


def _tile(position: int, capacity: int) -> tuple[int, int]:
    """The numbers of inputs and of outputs of the tile at `position`."""
    if position % BLOCK or not 0 < position < capacity:
        raise ValueError(f"no block begins at {position}: blocks of {BLOCK} up to {capacity}")
    size = position & -position
    return size, min(size, capacity - position)


# ---- Access along positions, the last axis but one -----------------------------------------------


def _spectrum(x_ND: jax.Array, points: int) -> jax.Array:
    return jnp.fft.rfft(x_ND.mT, points)  # FFTs are fastest along rows


def _inverse(spectrum_DF: jax.Array, first: int, count: int) -> jax.Array:
    """Entries first..first + count of the inverse FFT, of an even number of points."""
    return jnp.fft.irfft(spectrum_DF)[..., first : first + count].mT


def _delay(h_TD: jax.Array, phase: int | jax.Array) -> jax.Array:
    """h[s - phase] for s = 0..T, zero where s < phase."""
    T = h_TD.shape[-2]
    delayed_TD = jnp.concatenate([jnp.zeros_like(h_TD), h_TD], -2)
    return jax.lax.dynamic_slice_in_dim(delayed_TD, T - phase, T, -2)


def _fit(x_ND: jax.Array, length: int) -> jax.Array:
    """Truncates or zero-pads to `length` positions."""
    missing = max(0, length - x_ND.shape[-2])
    return jnp.pad(x_ND, [(0, 0)] * (x_ND.ndim - 2) + [(0, missing), (0, 0)])[..., :length, :]


def _read(x_ND: jax.Array, start: int | jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_ND, start, count, -2)


def _write(x_ND: jax.Array, update_ND: jax.Array, start: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_ND, update_ND, start, -2)


def _add(x_ND: jax.Array, update_ND: jax.Array, start: int | jax.Array) -> jax.Array:
    return _write(x_ND, _read(x_ND, start, update_ND.shape[-2]) + update_ND, start)


def _at(x_BTD: jax.Array, phase: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x_BTD, phase, 1, keepdims=False)


def _put(x_BTD: jax.Array, entry_BD: jax.Array, phase: int | jax.Array) -> jax.Array:
    return _write(x_BTD, entry_BD[:, None], phase)
