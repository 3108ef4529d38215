"""Decoding position by position through long convolutions, without the model around them.

A chain of six causal convolutions of width 256 with filters as long as the sequence, tanh between
them, batch 1: online (`ops/online_conv.py`), by a dot product with all inputs so far, and by
convolving the whole prefix again for every position. Groups: decode_N.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.ops.long_conv import causal_conv
from spectral_pod.ops.online_conv import (
    BLOCK,
    FilterBlock,
    filter_advance,
    filter_init,
    filter_step,
    plan_filter,
)
from tools.bench.settings import Settings
from tools.bench.timing import Case, Comparison, Group, Seconds, timed, times_faster

_STAGES = 8  # of the cached form: each has its own program, for prefixes up to its length
_SAMPLE = 64  # positions of a stage that are run


def groups(settings: Settings) -> list[Group]:
    if settings.quick:
        return [Group("decode_1024", 1, functools.partial(_decode, 1024, 2, 8, 64))]
    return [
        Group(f"decode_{n}", n, functools.partial(_decode, n, 6, 256, n))
        for n in (1024, 4096, 16_384)
    ]


def _decode(named: int, J: int, D: int, N: int) -> Comparison:
    rng = np.random.default_rng(0)
    h_JND = jnp.asarray(rng.normal(size=(J, N, D)) / np.sqrt(N), jnp.float32)
    x_BD = jnp.asarray(rng.normal(size=(1, D)), jnp.float32)

    def case(name: str, what: str, run: Callable[[], Seconds]) -> Case:
        baseline = "" if name == "cached" else "cached"
        return Case(name, what, f"layers={J} D={D} N={N}", run, baseline, work={"positions": N})

    cases = [
        case("online", "tiles by FFT, in blocks of 32 from the host", _online(h_JND, x_BD)),
        case("cached", "dot product with all inputs so far", _cached(h_JND, x_BD)),
        case("recomputed", f"{N} times the causal_conv of a prefix of N/2", _recomputed(h_JND)),
    ]
    return Comparison(
        cases,
        [
            times_faster(f"decode_online_vs_cached_{named}", "online", "cached"),
            times_faster(f"decode_online_vs_recomputed_{named}", "online", "recomputed"),
        ],
    )


def _online(h_JND: jax.Array, x_BD: jax.Array) -> Callable[[], Seconds]:
    J, N, _ = h_JND.shape
    plan = plan_filter(h_JND, N)

    @jax.jit
    def one_block(
        h_JTD: jax.Array, block: FilterBlock, x_BD: jax.Array, start: jax.Array
    ) -> tuple[FilterBlock, jax.Array]:
        def step(carry: Any, position: jax.Array) -> tuple[Any, None]:
            layers, x_BD = carry
            after = []
            for j in range(J):
                y_BD, layer = filter_step(h_JTD[j], layers[j], x_BD, position)
                after.append(layer)
                x_BD = jnp.tanh(y_BD)
            return (after, x_BD), None

        layers = [jax.tree.map(lambda x, j=j: x[j], block) for j in range(J)]
        (layers, x_BD), _ = jax.lax.scan(step, (layers, x_BD), start + jnp.arange(BLOCK))
        return jax.tree.map(lambda *x: jnp.stack(x), *layers), x_BD

    def decode() -> jax.Array:
        state, block = filter_init(plan, batch=1)
        x = x_BD
        for start in range(0, N, BLOCK):
            block, x = one_block(plan.h_JTD, block, x, start)
            if start + BLOCK < N:
                state, block = filter_advance(plan, state, block, start + BLOCK)
        return x

    return functools.partial(timed, decode)


def _cached(h_JND: jax.Array, x_BD: jax.Array) -> Callable[[], Seconds]:
    """O(t) a position, in stages that touch no more than the inputs up to their own end.

    All positions of a stage cost the same, so some of them are run, and counted for all.
    """
    J, N, D = h_JND.shape
    length = N // _STAGES
    sample = min(_SAMPLE, length)

    @jax.jit
    def stage(h_JTD: jax.Array, x_BD: jax.Array, start: jax.Array) -> jax.Array:
        T = h_JTD.shape[1]
        # Back to front, and zeros for the inputs that are still to come.
        taps = [jnp.pad(h_TD[::-1], ((0, length), (0, 0))) for h_TD in h_JTD]

        def step(carry: Any, position: jax.Array) -> tuple[Any, None]:
            caches, x_BD = carry
            after = []
            for cache, tap in zip(caches, taps):
                cache = jax.lax.dynamic_update_slice(cache, x_BD, (position, 0))
                after.append(cache)
                aligned = jax.lax.dynamic_slice(tap, (T - 1 - position, 0), (T, D))
                x_BD = jnp.tanh(jnp.sum(aligned * cache, 0, keepdims=True))
            return (after, x_BD), None

        caches = [jnp.zeros((T, D))] * J
        (_, x_BD), _ = jax.lax.scan(step, (caches, x_BD), start + jnp.arange(sample))
        return x_BD

    filters = [h_JND[:, : (s + 1) * length] for s in range(_STAGES)]

    def decode() -> list[jax.Array]:
        return [stage(h_JTD, x_BD, s * length) for s, h_JTD in enumerate(filters)]

    return lambda: _times(length // sample, timed(decode))


def _recomputed(h_JND: jax.Array) -> Callable[[], Seconds]:
    """All positions at the price of the mean one; N convolutions would take minutes."""
    _, N, D = h_JND.shape
    x_BDN = jnp.ones((1, D, N // 2))

    @jax.jit
    def prefix(h_JND: jax.Array, x_BDN: jax.Array) -> jax.Array:
        for h_ND in h_JND:
            x_BDN = jnp.tanh(causal_conv(x_BDN, h_ND.T))
        return x_BDN[..., -1]

    return lambda: _times(N, timed(prefix, h_JND, x_BDN))


def _times(count: int, one: Seconds) -> Seconds:
    return Seconds(wall=count * one.wall, cpu=count * one.cpu)
