"""Online convolutions, one position at a time, against whole convolutions in float64."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.analysis.flops import forward_flops
from spectral_pod.ops import online_conv, reference
from spectral_pod.ops.online_conv import (
    BLOCK,
    filter_advance,
    filter_init,
    filter_prefill,
    filter_step,
    plan_filter,
    product_advance,
    product_init,
    product_prefill,
    product_step,
)

J, B, D = 2, 2, 3
# (positions, prompt length): on both sides of block and tile boundaries, and some at random.
CASES = [
    *[(1, 0), (2, 1), (31, 0), (32, 31), (33, 1), (33, 32), (64, 40), (65, 0), (97, 64), (300, 0)],
    *(
        (int(N), int(P))
        for N in np.random.default_rng(0).integers(34, 300, 6)
        for P in np.random.default_rng(N).integers(1, N, 1)
    ),
]
TOLERANCE = 1e-5  # relative to the largest output; measured: at most 4e-7


@jax.jit
def filter_layers(h_JTD, block, x_JBD, position):
    return jax.vmap(filter_step, (0, 0, 0, None))(h_JTD, block, x_JBD, position)


@jax.jit
def product_layers(block, q_JBD, k_JBD, position):
    return jax.vmap(product_step, (0, 0, 0, None))(block, q_JBD, k_JBD, position)


plan_of = jax.jit(plan_filter, static_argnums=1)
prefill_filter = jax.jit(filter_prefill)
prefill_product = jax.jit(product_prefill, static_argnums=3)


def filter_online(h_JND, x_JBND, prompt):
    """All outputs: those of the prompt by the prefill, the others one by one."""
    N = x_JBND.shape[2]
    plan = plan_of(h_JND, N)
    if prompt:
        y_JBPD, state, block = prefill_filter(plan, x_JBND[:, :, :prompt])
        outputs = list(np.moveaxis(y_JBPD, 2, 0))
    else:
        state, block = filter_init(plan, x_JBND.shape[1])
        outputs = []
    for t in range(prompt, N):
        y_JBD, block = filter_layers(plan.h_JTD, block, x_JBND[:, :, t], t)
        outputs.append(y_JBD)
        if (t + 1) % BLOCK == 0 and t + 1 < N:
            state, block = filter_advance(plan, state, block, t + 1)
    return np.stack(outputs, 2)


def product_online(q_JBND, k_JBND, prompt, starts=(0,) * B):
    J, B, N, D = q_JBND.shape
    if prompt:
        start_JB = np.broadcast_to(np.int32(starts), (J, B))
        prompts = q_JBND[:, :, :prompt], k_JBND[:, :, :prompt]
        y_JBPD, state, block = prefill_product(*prompts, start_JB, N)
        outputs = list(np.moveaxis(y_JBPD, 2, 0))
    else:
        state, block = product_init(J, B, N, D)
        outputs = []
    for t in range(prompt, N):
        y_JBD, block = product_layers(block, q_JBND[:, :, t], k_JBND[:, :, t], t)
        outputs.append(y_JBD)
        if (t + 1) % BLOCK == 0 and t + 1 < N:
            state, block = product_advance(state, block, t + 1)
    return np.stack(outputs, 2)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_every_position_agrees(actual, expected):
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(("N", "prompt"), CASES)
def test_known_filter_equals_the_whole_convolution(N, prompt):
    x_JBND, h_JND = random(J, B, N, D), random(J, N, D, seed=1)
    expected = reference.causal_convolution(x_JBND, h_JND[:, None])
    assert_every_position_agrees(filter_online(h_JND, x_JBND, prompt), expected)


@pytest.mark.parametrize(("N", "prompt"), CASES)
def test_growing_product_equals_the_whole_convolution(N, prompt):
    q_JBND, k_JBND = random(2, J, B, N, D)
    expected = reference.causal_convolution(q_JBND, k_JBND)
    assert_every_position_agrees(product_online(q_JBND, k_JBND, prompt), expected)


@pytest.mark.parametrize("starts", [(0, 7), (50, 31), (99, 64)])
@pytest.mark.parametrize(("N", "prompt"), [(129, 100), (300, 128)])
def test_products_of_sequences_that_begin_later(N, prompt, starts):
    """A late start delays the output by the same amount, wherever it is in blocks and tiles."""
    begun = np.arange(N) >= np.reshape(starts, (B, 1))
    q_JBND, k_JBND = np.where(begun[..., None], random(2, J, B, N, D), np.float32(0))
    actual = product_online(q_JBND, k_JBND, prompt, starts)
    for b, start in enumerate(starts):
        alone = reference.causal_convolution(q_JBND[:, b, start:], k_JBND[:, b, start:])
        assert_every_position_agrees(actual[:, b, start:], alone)
        assert np.abs(actual[:, b, :start]).max(initial=0) <= 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("taps", [5, 40, 200])
def test_a_filter_shorter_or_longer_than_the_sequence(taps):
    N = 100
    x_JBND, h_JND = random(J, B, N, D), random(J, taps, D, seed=1)
    whole_JND = np.concatenate([h_JND, np.zeros((J, N, D))], 1)[:, :N]
    expected = reference.causal_convolution(x_JBND, whole_JND[:, None])
    assert_every_position_agrees(filter_online(h_JND, x_JBND, 0), expected)


def test_a_prompt_can_be_given_layer_by_layer():
    N, P = 64, 40
    plan, x_JBPD = plan_of(random(J, N, D, seed=1), N), random(J, B, P, D)
    whole = prefill_filter(plan, x_JBPD)
    parts = []
    for layer in (slice(0, 1), slice(1, 2)):
        plan_of_one = jax.tree.map(operator.itemgetter(layer), plan)
        parts.append(prefill_filter(plan_of_one, x_JBPD[layer]))
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), joined, whole)


def test_bfloat16_inputs_are_summed_in_float32():
    plan = plan_of(random(J, 2, D), 2)
    _, block = filter_init(plan, B)
    x_JBD = random(J, B, D).astype(jnp.bfloat16)
    y_JBD, block = filter_layers(plan.h_JTD, block, x_JBD, 0)
    assert y_JBD.dtype == block.x_JBTD.dtype == jnp.float32
    _, block = product_init(J, B, 2, D)
    y_JBD, block = product_layers(block, x_JBD, x_JBD, 0)
    assert y_JBD.dtype == block.q_JBTD.dtype == jnp.float32


def tile_program(form, N, size, position):
    """The jitted program of a tile for one layer and channel, and its arguments' shapes."""

    def filter_arguments():
        plan = plan_filter(jnp.zeros((1, N, 1)), N)
        state, block = filter_init(plan, 1)
        return plan.spectra[(size // BLOCK).bit_length() - 1], state, block.x_JBTD, position

    def product_arguments():
        state, block = product_init(1, 1, N, 1)
        return state, (block.q_JBTD, block.k_JBTD), position

    if form == "filter":
        program, arguments = online_conv._filter_tile, filter_arguments
    else:
        program, arguments = online_conv._product_tile, product_arguments
    return functools.partial(program, size=size, reach=size), jax.eval_shape(arguments)


def tiles(N):
    return {t: online_conv._tile(t, N) for t in range(BLOCK, N, BLOCK)}


@pytest.mark.parametrize(("form", "ffts"), [("filter", 2), ("product", 5)])
def test_work_grows_as_n_log_squared_n(form, ffts):
    @functools.cache
    def flops(N, size, first):
        program, arguments = tile_program(form, N, size, size if first else 3 * size)
        return forward_flops(program, *arguments)

    for N in (256, 1024, 4096):
        total = sum(flops(N, size, size == t) for t, (size, _) in tiles(N).items())
        # A tile of U has FFTs of 2 U points at 2.5 n log2 n each, and there are N / 2 U tiles.
        sizes = BLOCK * 2 ** np.arange(np.log2(N // BLOCK))
        expected = sum(N / (2 * U) * ffts * 2.5 * 2 * U * np.log2(2 * U) for U in sizes)
        assert total == pytest.approx(expected, rel=0.01)
        assert expected < ffts * 1.25 * N * np.log2(N) ** 2
    assert expected < (0.1 if form == "filter" else 0.3) * 4096**2  # direct: 2 N^2 / 2 FLOPs


def test_tiles_reach_up_to_the_end_and_no_further():
    for N in (32, 96, 160, 512, 992):
        for position, (size, reach) in tiles(N).items():
            assert position % size == 0
            assert reach == min(size, N - position)


@pytest.mark.parametrize("form", ["filter", "product"])
def test_a_tile_updates_the_state_in_place(form):
    """The temporary memory of a tile must not grow with the sequence."""
    temporary = {}
    for N in (512, 4096):
        program, arguments = tile_program(form, N, BLOCK, 3 * BLOCK)
        memory = program.func.lower(*arguments, **program.keywords).compile().memory_analysis()
        state = arguments[1] if form == "filter" else arguments[0]
        assert memory.alias_size_in_bytes >= sum(4 * leaf.size for leaf in state if leaf.ndim == 4)
        temporary[N] = memory.temp_size_in_bytes
    assert temporary[4096] <= temporary[512]


def test_the_donated_state_is_gone():
    plan = plan_filter(jnp.zeros((1, 64, 1)), 64)
    state, block = filter_init(plan, 1)
    filter_advance(plan, state, block, BLOCK)
    assert state.x_JBND.is_deleted()
    assert state.sums_JBND.is_deleted()


def test_calls_that_do_not_fit_are_refused():
    plan = plan_filter(jnp.zeros((1, 64, 1)), 50)
    state, block = filter_init(plan, 1)
    for position in (0, 33, 64):
        with pytest.raises(ValueError, match=f"no block begins at {position}"):
            filter_advance(plan, state, block, position)
    with pytest.raises(ValueError, match="a prompt of 64 positions"):
        filter_prefill(plan, jnp.zeros((1, 1, 64, 1)))
    prompt, start = jnp.zeros((1, 1, 64, 1)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="a prompt of 64 positions"):
        product_prefill(prompt, prompt, start, 50)
