"""Operations compared with their plain implementations: forward and backward, in float32.

Groups: delta_N, causal_conv_N, spectral_N, attention_N, dropout, dense, wavelet, and dispatch_N,
where every method of a filter runs and the one that dispatch chooses is compared with the fastest.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pywt

from spectral_pod.layers.dropout import Dropout
from spectral_pod.ops import fft, long_conv
from spectral_pod.ops.affine import affine
from spectral_pod.ops.attention import attention
from spectral_pod.ops.delta_rule import delta_rule
from spectral_pod.ops.fft import spectral_filter
from spectral_pod.ops.long_conv import causal_conv
from spectral_pod.ops.wavelet import wavedec

from . import machine
from .settings import Settings
from .timing import (
    Case,
    Comparison,
    Group,
    Ratio,
    Row,
    compiled,
    forward_backward,
    temporaries,
    timed,
    times_faster,
)

_DISPATCH_LENGTHS = (256, 512, 1000, 1024, 2048, 3001, 4096, 8192, 12_345, 16_384, 32_768, 65_536)

_ATTENTION_LENGTHS = (128, 256, 512, 2048, 8192)


def groups(settings: Settings) -> list[Group]:
    quick, partial = settings.quick, functools.partial
    made = [Group("delta_2048", 4, partial(_delta, settings, 64 if quick else 2048))]
    for n in (1024, 4096, 16_384):
        build = partial(_causal, settings, n, n // 32 if quick else n)
        made.append(Group(f"causal_conv_{n}", n / 3000, build))
    made.append(Group("spectral_2048", 3, partial(_spectral, 64 if quick else 2048)))
    for n in (64,) if quick else _ATTENTION_LENGTHS:
        made.append(Group(f"attention_{n}", 0.2 + n / 500, partial(_attention, n)))
    made.append(Group("dropout", 0.3, partial(_dropout, 64 if quick else 2048)))
    if machine.has_amx() and jax.default_backend() == "cpu":
        made.append(Group("dense", 1, partial(_dense, 16 if quick else 1)))
    made.append(Group("wavelet", 0.3, partial(_wavelet, 64 if quick else 1024)))
    for n in (256, 1000) if quick else _DISPATCH_LENGTHS:
        build = partial(_dispatch, n, 4 if quick else 256)
        made.append(Group(f"dispatch_{n}", 0.2 + n / 2000, build))
    return made


# ---- delta rule


def _delta(settings: Settings, N: int) -> Comparison:
    B, H, K = 8, 1, 64
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, B, N, H, K))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    tokens = _float32(q, k, 0.3 * v, rng.uniform(0, 1, (B, N, H)))  # no clip fires
    state = jnp.zeros((B, H, K, K))
    weights = _float32(rng.normal(size=(B, N, H, K)), rng.normal(size=(B, H, K, K)))

    def by(method: Any) -> Callable[..., Any]:
        return lambda *tokens_and_state: delta_rule(
            *tokens_and_state[:4], state_BHVK=tokens_and_state[4], method=method, clip=10.0
        )[:2]

    def case(name: str, what: str, fn: Callable[..., Any], baseline: str = "") -> Case:
        run, temporary = compiled(forward_backward(fn), weights, *tokens, state)
        return Case(name, what, f"B={B} N={N} H={H} K={K}", run, baseline, temporary)

    cases = [
        case("chunked", "delta_rule(method='chunked'), exact clips", by("chunked"), "scan"),
        case("scan", "the definition in one lax.scan", _delta_scan),
        case("remat", "delta_rule(method='recurrent'), rematerialized", by("recurrent"), "scan"),
    ]
    ratios = [
        times_faster("delta_chunked_vs_scan_2048", "chunked", "scan", ">= 6"),
        times_faster("delta_chunked_vs_remat_2048", "chunked", "remat", ">= 2.2"),
        Ratio(
            "delta_temporaries_2048",
            lambda rows: _planned(rows["scan"]) / _planned(rows["chunked"]),
            ">= 12",
        ),
    ]
    if settings.peers:
        peer, what = "fla_delta_chunk32", "flash-linear-attention's chunked form (PyTorch), no clip"
        cases.append(settings.peers.case(peer, what, {"B": B, "N": N, "H": H, "K": K}))
        ratios.append(times_faster("delta_chunked_vs_fla_2048", "chunked", peer, ">= 3.3"))
    return Comparison(cases, ratios)


def _delta_scan(
    q_BNHK: jax.Array,
    k_BNHK: jax.Array,
    v_BNHV: jax.Array,
    beta_BNH: jax.Array,
    state_BHVK: jax.Array,
    clip: float = 10.0,
) -> tuple[jax.Array, jax.Array]:
    """The straightforward form: the definition (`ops/delta_rule.py`), a token at a time."""

    def step(S: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v, beta = token
        e = v - jnp.einsum("bhvk,bhk->bhv", S, k)
        size = jnp.sqrt(jnp.sum(e**2, -1) * jnp.sum(k**2, -1))
        beta *= jnp.minimum(1.0, clip / jnp.maximum(size, 1e-20))
        S += jnp.einsum("bh,bhv,bhk->bhvk", beta, e, k)
        return S, jnp.einsum("bhvk,bhk->bhv", S, q)

    tokens = [jnp.moveaxis(x, 1, 0) for x in (q_BNHK, k_BNHK, v_BNHV, beta_BNH)]
    state_BHVK, o_NBHV = jax.lax.scan(step, state_BHVK, tuple(tokens))
    return jnp.moveaxis(o_NBHV, 0, 1), state_BHVK


def _planned(row: Row) -> int:
    assert row.temporaries is not None
    return row.temporaries


# ---- filters


def _causal(settings: Settings, named: int, N: int) -> Comparison:
    B, D = 4, 256
    rng = np.random.default_rng(0)
    u_BDN, g_BDN, h_DN = _float32(*rng.normal(size=(2, B, D, N)), rng.normal(size=(D, N)) / N)

    def plain(u_BND: jax.Array, h_ND: jax.Array) -> jax.Array:
        product_BFD = jnp.fft.rfft(u_BND, 2 * N, axis=1) * jnp.fft.rfft(h_ND, 2 * N, axis=0)
        return jnp.fft.irfft(product_BFD, 2 * N, axis=1)[:, :N]

    def plain_rows(u_BDN: jax.Array, h_DN: jax.Array) -> jax.Array:
        return jnp.fft.irfft(jnp.fft.rfft(u_BDN, 2 * N) * jnp.fft.rfft(h_DN, 2 * N), 2 * N)[..., :N]

    def case(name: str, what: str, fn: Callable[..., Any], *arrays: Any) -> Case:
        u, h, g = arrays
        run, temporary = compiled(forward_backward(fn), g, u, h)
        shape = str(list(u.shape))
        return Case(name, what, shape, run, "" if name == "jnp" else "jnp", temporary)

    transposed = jnp.swapaxes(u_BDN, 1, 2), h_DN.T, jnp.swapaxes(g_BDN, 1, 2)
    cases = [
        case("ours", "causal_conv, channels before positions", causal_conv, u_BDN, h_DN, g_BDN),
        case("jnp", "jnp.fft.rfft and irfft of 2N points along axis 1", plain, *transposed),
        case("jnp_rows", "the same, channels before positions", plain_rows, u_BDN, h_DN, g_BDN),
    ]
    ratios = [times_faster(f"causal_conv_vs_jnp_{named}", "ours", "jnp", ">= 2.1")]
    if settings.peers:
        peer, what = "torch_fft_conv", "torch.fft, as safari's fftconv"
        cases.append(settings.peers.case(peer, what, {"B": B, "D": D, "N": N}, baseline="jnp"))
        ratios.append(times_faster(f"causal_conv_vs_torch_{named}", "ours", peer, ">= 2.8"))
    return Comparison(cases, ratios)


def _spectral(N: int) -> Comparison:
    B, D = 8, 256
    rng = np.random.default_rng(0)
    x_BND, g_BND = _float32(*rng.normal(size=(2, B, N, D)))

    def filtered(fft_length: int) -> Callable[..., jax.Array]:
        def fn(x_BND: jax.Array, real_FD: jax.Array, imag_FD: jax.Array) -> jax.Array:
            return spectral_filter(x_BND, jax.lax.complex(real_FD, imag_FD), fft_length)

        return fn

    def seed_literal(x_BND: jax.Array, real_ND: jax.Array, imag_ND: jax.Array) -> jax.Array:
        spectrum_BND = jnp.fft.fft(x_BND, axis=1) * jax.lax.complex(real_ND, imag_ND)
        return jnp.fft.ifft(spectrum_BND, axis=1).real

    def case(name: str, what: str, fn: Callable[..., Any], bins: int) -> Case:
        w = _float32(*rng.normal(size=(2, bins, D)))
        run, temporary = compiled(forward_backward(fn), g_BND, x_BND, *w)
        baseline = "" if name == "seed_literal" else "seed_literal"
        return Case(name, what, str(list(x_BND.shape)), run, baseline, temporary)

    cases = [
        case("circular", "spectral_filter of N points", filtered(N), N // 2 + 1),
        case("linear", "spectral_filter of 2N points, the default", filtered(2 * N), N + 1),
        case("seed_literal", "full complex FFT of N points along axis 1", seed_literal, N),
    ]
    name = "spectral_{}vs_seed_literal_2048"
    return Comparison(
        cases,
        [
            times_faster(name.format(""), "circular", "seed_literal", ">= 2"),
            times_faster(name.format("linear_"), "linear", "seed_literal"),
        ],
    )


# ---- attention


def _attention(N: int) -> Comparison:
    """The method that dispatch chooses, and the scores of all pairs, causal and not."""
    shape = max(1, 4096 // N), N, 4, 64
    weights, *arguments = _float32(*np.random.default_rng(0).normal(size=(4, *shape)))
    mask_BN = jnp.ones(shape[:2], bool)
    cases: list[Case] = []
    ratios = []
    for name, causal in (("causal", True), ("all_positions", False)):
        plain = f"{name}_plain"
        for named, method in ((name, "auto"), (plain, "plain")):
            run = functools.partial(attention, mask_BN=mask_BN, causal=causal, method=method)
            repetition, held = compiled(forward_backward(run), weights, *arguments)
            what = f"attention, method '{method}'"
            cases.append(Case(named, what, str(list(shape)), repetition, temporaries=held))
        ratios.append(times_faster(f"attention_{name}_vs_plain_{N}", name, plain, ">= 0.9"))
    return Comparison(cases, ratios)


# ---- dispatch


def _dispatch(N: int, width: int) -> Comparison:
    """Every method of both filters, and the one that dispatch chooses for each."""
    D = min(width, 256 if N <= 8192 else 64)
    rng = np.random.default_rng(0)
    x_BND, g_BND = _float32(*rng.normal(size=(2, 4, N, D)))
    real_FD, imag_FD = _float32(*rng.normal(size=(2, N + 1, D)))
    h_DN = real_FD[:N].T

    def spectral(method: str, x_BND: jax.Array, real_FD: Any, imag_FD: Any) -> jax.Array:
        return spectral_filter(x_BND, jax.lax.complex(real_FD, imag_FD), 2 * N, method)

    def causal(method: str, u_BDN: jax.Array, h_DN: jax.Array) -> jax.Array:
        return causal_conv(u_BDN, h_DN, method)

    u_BDN, g_BDN = jnp.swapaxes(x_BND, 1, 2), jnp.swapaxes(g_BND, 1, 2)
    filters = {
        "spectral": _methods("spectral", spectral, fft.METHODS, g_BND, (x_BND, real_FD, imag_FD)),
        "causal": _methods("causal", causal, long_conv.METHODS, g_BDN, (u_BDN, h_DN)),
    }
    each = {
        name: functools.partial(_over_best, chosen, [case.name for case in cases])
        for name, (cases, chosen) in filters.items()
    }
    ratios = [Ratio(f"{name}_dispatch_vs_best_{N}", of) for name, of in each.items()]
    worse = Ratio(
        f"dispatch_vs_best_{N}", lambda rows: max(of(rows) for of in each.values()), "<= 1.1"
    )
    return Comparison([c for cases, _ in filters.values() for c in cases], [*ratios, worse], True)


def _methods(
    op: str, fn: Callable[..., Any], names: Sequence[str], weights: Any, arguments: Any
) -> tuple[list[Case], str]:
    """A case for every method that supports these sizes, and the name of the chosen one."""

    def lowered(method: str) -> Any:
        gradient = forward_backward(functools.partial(fn, method))
        return jax.jit(gradient).lower(weights, *arguments)

    def supported() -> Iterator[tuple[str, Any]]:
        for name in names:
            try:
                yield name, lowered(name)
            except ValueError:  # the method does not support these sizes
                continue

    automatic, cases, chosen = lowered("auto").as_text(), [], ""
    for method, low in supported():
        program = low.compile()
        case = Case(
            f"{op}_{method}",
            f"{fn.__name__} filter, method '{method}'",
            str(list(arguments[0].shape)),
            functools.partial(timed, program, weights, *arguments),
            temporaries=temporaries(program),
        )
        if low.as_text() == automatic:
            chosen = case.name
            case = case._replace(what=f"{case.what}: chosen")
        cases.append(case)
    assert chosen, f"dispatch of the {op} filter chooses none of its methods"
    return cases, chosen


def _over_best(chosen: str, names: Sequence[str], rows: Any) -> float:
    return rows[chosen].ms / min(rows[name].ms for name in names)


# ---- products, wavelets


def _dropout(N: int) -> Comparison:
    """Dropout of a tenth, with a new key, and Flax's with the same bits."""
    shape = 4, N, 128
    weights, x_BND = _float32(*np.random.default_rng(0).normal(size=(2, *shape)))
    words_2 = jax.random.key_data(jax.random.key(0))  # arguments, or bits would be constants

    def by(layer: type[Dropout] | type[nn.Dropout]) -> Callable[..., Any]:
        def fn(words_2: jax.Array, weights: jax.Array, x_BND: jax.Array) -> Any:
            rngs = {"dropout": jax.random.wrap_key_data(words_2)}
            dropped = functools.partial(layer(0.1, deterministic=False).apply, {}, rngs=rngs)
            return forward_backward(dropped)(weights, x_BND)

        return fn

    cases = []
    for name, layer in (("ours", Dropout), ("flax", nn.Dropout)):
        run, held = compiled(by(layer), words_2, weights, x_BND)
        what = f"dropout of {layer.__module__}"
        cases.append(Case(name, what, str(list(shape)), run, temporaries=held))
    return Comparison(cases, [times_faster("dropout_vs_flax", "ours", "flax", ">= 1.3")])


def _dense(shrink: int) -> Comparison:
    """Dense layers in bfloat16 and float32; the ratio is the smallest of three sizes."""
    sizes = [(4096, 256, 256), (4096, 256, 1024), (16_384, 512, 512)]
    rng = np.random.default_rng(0)
    cases, pairs = [], []
    for R, I, O in sizes:  # noqa: E741
        shape = (R // shrink, I, O)
        arrays = [rng.normal(size=s) for s in ((shape[0], I), (I, O), (shape[0], O))]
        names = [f"{dtype}_{R}x{I}x{O}" for dtype in ("float32", "bfloat16")]
        flops = 6.0 * math.prod(shape)
        for name, dtype in zip(names, (jnp.float32, jnp.bfloat16)):
            x, w, g = (jnp.asarray(a, dtype) for a in arrays)
            run, temporary = compiled(_affine_and_gradients, x, w, g)
            what = "x @ w + b and its gradients by ops/affine.py"
            baseline = names[0] if name != names[0] else ""
            text = " x ".join(map(str, shape))
            cases.append(Case(name, what, text, run, baseline, temporary, {"GFLOP": flops / 1e9}))
        pairs.append(names)
    least = Ratio(
        "bf16_dense_vs_float32",
        lambda rows: min(rows[slow].ms / rows[fast].ms for slow, fast in pairs),
        ">= 2",
    )
    return Comparison(cases, [least])


def _affine_and_gradients(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
    y, gradients = jax.vjp(affine, x, w, jnp.zeros(w.shape[1], w.dtype))
    return y, gradients(g)


def _wavelet(N: int) -> Comparison:
    B, D, levels = 4, 256, 3
    x_BND = np.random.default_rng(0).normal(size=(B, N, D)).astype(np.float32)
    run, temporary = compiled(lambda x: wavedec(x, "db4", levels), jnp.asarray(x_BND))
    shape = str([B, N, D])
    cases = [
        Case("ours", "wavedec, db4, 3 levels, forward", shape, run, "pywt", temporary),
        Case("pywt", "the same by PyWavelets", shape, lambda: timed(_pywt, x_BND, levels)),
    ]
    return Comparison(cases, [times_faster("wavelet_vs_pywt_1024", "ours", "pywt")])


def _pywt(x_BND: np.ndarray, levels: int) -> list[np.ndarray]:
    return pywt.wavedec(x_BND, "db4", level=levels, axis=1)


def _float32(*arrays: np.ndarray) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)
