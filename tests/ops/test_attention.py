"""Attention by every method against all pairs in float64, with gradients; local and linear
attention against explicit pairwise sums. At lengths that no block divides."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from spectral_pod.ops import attention as ops
from spectral_pod.ops import kernels
from spectral_pod.ops import linear_attention as linear
from spectral_pod.ops.blocked_attention import BLOCK
from spectral_pod.ops.kernels import flash, flash_gpu
from spectral_pod.ops.linear_attention import CHUNK

B, H, K = 2, 3, 4
local_attention = jax.jit(ops.local_attention, static_argnames=("before", "after"))
linear_attention = jax.jit(linear.linear_attention, static_argnames="causal")


METHODS = {
    "plain": functools.partial(ops.attention, method="plain"),
    "blocked": functools.partial(ops.attention, method="blocked"),
    "flash": flash.attention,
    "flash_gpu": flash_gpu.attention,
}


@pytest.fixture
def without_accelerators(monkeypatch):
    """Runs the kernel for TPUs interpreted, and JAX's own form of the call in place of cuDNN's."""
    original = jax.nn.dot_product_attention

    def in_place_of_cudnn(*arrays, implementation=None, **options):
        # It leaves what is past the end of a sequence undefined.
        with jax.numpy_dtype_promotion("standard"):
            o_BNHK = original(*arrays, **options)
        if implementation == "cudnn":
            t_1N = jnp.arange(o_BNHK.shape[1])[None]
            valid_BN = t_1N < options["query_seq_lengths"][:, None]
            o_BNHK = jnp.where(valid_BN[..., None, None], o_BNHK, jnp.nan)
        return o_BNHK

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_place_of_cudnn)
    with pltpu.force_tpu_interpret_mode():
        yield


def draw(length):
    rng = np.random.default_rng(length)
    q, k, v = rng.normal(size=(3, B, length, H, K))
    mask = rng.random((B, length)) < 0.8
    return q, k, v, mask


def pairs(weights, v, mask, near):
    """`sum_s w_ts v_s / sum_s w_ts` over valid s with `near(t - s)`; zero if there are none."""
    n = np.arange(weights.shape[-1])
    seen = mask[:, None, None] & near(n[:, None] - n)
    weights = np.where(seen, weights, 0)
    total = weights.sum(-1)[..., None]
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("bhts,bshv->bthv", weights, v), seen.any(-1)[:, 0]


def softmax_pairs(q, k, v, mask, near):
    return pairs(np.exp(np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)), v, mask, near)


def on_jax(*arrays):
    return [jnp.asarray(x if x.dtype == bool else np.float32(x)) for x in arrays]


def masks(length):
    """Valid positions first, last, anywhere, and none in one sequence."""
    t = np.arange(length)
    first, last = t < np.array([[length], [length // 2 + 1]]), t >= np.array([[0], [length // 3]])
    some = draw(length)[-1]
    return {"first": first, "last": last, "some": some, "none": first & [[True], [False]]}


def gradients(q, k, v, mask, do, causal):
    """Results and gradients of attention of all pairs, in float64; `do` is 0 at invalid queries."""
    o, _ = softmax_pairs(q, k, v, mask, lambda lag: (lag >= 0) | (not causal))
    n = np.arange(len(mask[0]))
    seen = mask[:, None, None] & ((n[:, None] >= n) | (not causal))
    scores = np.where(seen, np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K), -np.inf)
    top = np.where(seen.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0)
    weights = np.exp(scores - top)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    dweights = np.einsum("bthk,bshk->bhts", do, v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) / np.sqrt(K)
    dq, dk = np.einsum("bhts,bshk->bthk", dscores, k), np.einsum("bhts,bthk->bshk", dscores, q)
    return o, dq, dk, np.einsum("bhts,bthk->bshk", weights, do)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(method, causal, q, k, v, mask, do):
    o, pullback = jax.vjp(lambda *qkv: METHODS[method](*qkv, mask, causal=causal), q, k, v)
    return o, *pullback(do)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 23, 2 * BLOCK + 5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("without_accelerators")
def test_attention_equals_all_pairs(method, length, causal):
    q, k, v, _ = draw(length)
    for name, mask in masks(length).items():
        valid = mask[..., None, None]
        do = np.cos(np.arange(q.size)).reshape(q.shape) * valid
        got = [np.asarray(x) for x in run(method, causal, *on_jax(q, k, v, mask, do))]
        want = gradients(q, k, v, mask, do, causal)
        assert all(np.isfinite(x).all() for x in got), name
        np.testing.assert_allclose(got[0] * valid, want[0] * valid, atol=1e-5, err_msg=name)
        for x, y in zip(got[1:], want[1:], strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("without_accelerators")
def test_nothing_leaks_from_later_positions(method):
    """Not even rounding errors: gradients are exactly 0, and huge later values change nothing."""
    length, seen = 2 * BLOCK, BLOCK - 3
    q, k, v, mask = on_jax(*draw(length))
    mask = mask.at[:, seen - 1 : seen + 1].set(True)
    do = jnp.zeros_like(q).at[:, :seen].set(jnp.where(mask[:, :seen, None, None], 1.0, 0.0))
    o, *grads = run(method, True, q, k, v, mask, do)
    for grad in grads:
        assert np.abs(grad[:, :seen]).max() > 0
        assert np.abs(grad[:, seen:]).max() == 0
    k, v = (x.at[:, seen:].multiply(1e6) for x in (k, v))
    again = run(method, True, q, k, v, mask, do)[0]
    assert jnp.array_equal(jnp.where(do != 0, o, 0), jnp.where(do != 0, again, 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("without_accelerators")
def test_bfloat16_rounds_weights_and_results_only(method):
    length, dtype = BLOCK + 9, jnp.bfloat16
    q, k, v, mask = (x if x.dtype == bool else x.astype(dtype) for x in on_jax(*draw(length)))
    mask = jnp.asarray(masks(length)["first"])
    with jax.numpy_dtype_promotion("standard"):  # JAX mixes dtypes in the gradient of its own form
        o, *grads = run(method, True, q, k, v, mask, jnp.where(mask[..., None, None], q, 0))
    assert {x.dtype for x in (o, *grads)} == {jnp.dtype(dtype)}
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    want = softmax_pairs(*wide, np.asarray(mask), lambda lag: lag >= 0)[0]
    error = np.abs(np.asarray(o, np.float64) - want)[np.asarray(mask)]
    assert error.max() <= 4 * float(jnp.finfo(dtype).eps) * np.abs(want).max()


def test_only_the_plain_form_holds_all_pairs():
    length, size = 2048, jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, length), bool)
    held = {
        method: run.lower(method, True, size, size, size, mask, size)
        .compile().memory_analysis().temp_size_in_bytes
        for method in ops.METHODS
    }  # fmt: skip
    assert held["plain"] > 4 * length**2
    assert held["blocked"] < 4 * length**2 / 8


def test_dispatch_says_why():
    sizes = 64, jnp.bfloat16
    assert ops.choose("cpu", 128, *sizes).method == "plain"
    assert ops.choose("cpu", 129, *sizes).method == "blocked"
    for kernel, name in ((flash, "tpu"), (flash_gpu, "gpu")):
        with (
            mock.patch.object(kernel, "platform", return_value=name),
            mock.patch.object(kernels, "platform", return_value=name),
        ):
            assert ops.choose(name, 8192, *sizes).method == "fused"
            for width, dtype, why in (
                (64, "float32", "float32"),
                (136, "bfloat16", "136"),
            ):
                choice = ops.choose(name, 8192, width, dtype)
                assert choice.method == "blocked"
                assert why in choice.reason
    with pytest.warns(kernels.NotServed, match="'blocked' is used in place of 'fused': .* a cpu"):
        assert "in place of 'fused'" in ops.resolve("fused", 1000, *sizes).reason
    assert ops.resolve("plain", 8192, *sizes) == ("plain", "as configured")


@pytest.mark.parametrize(
    ("length", "before", "after"),
    [
        (23, 4, 0),
        (24, 4, 3),
        (23, 3, 5),
        (23, 0, 0),
        (23, 0, 2),
        (5, 9, 0),
        (1, 7, 7),
        (23, 22, 22),
    ],
)
def test_windows_equal_all_pairs_within_them(length, before, after):
    inputs = draw(length)
    want, some = softmax_pairs(*inputs, lambda lag: (lag <= before) & (lag >= -after))
    got = np.asarray(local_attention(*on_jax(*inputs), before=before, after=after))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[some], want[some], atol=1e-5)


def linear_pairs(q, k, v, mask, causal):
    q, k = (np.where(x > 0, x + 1, np.exp(x)) for x in (q, k))
    weights = np.einsum("bthk,bshk->bhts", q, k)
    return pairs(weights, v, mask, lambda lag: (lag >= 0) | (not causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK + 11])
def test_linear_attention_equals_all_pairs(length, causal):
    inputs = draw(length)
    want, some = linear_pairs(*inputs, causal)
    got = np.asarray(linear_attention(*on_jax(*inputs), causal=causal)[0])
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[some], want[some], atol=1e-5)


def test_linear_attention_goes_on_from_its_state():
    q, k, v, mask = draw(CHUNK + 11)
    mask[:, CHUNK:] = True
    want, _ = linear_pairs(q, k, v, mask, True)
    q, k, v, mask = on_jax(q, k, v, mask)
    _, state = linear_attention(*(x[:, :CHUNK] for x in (q, k, v, mask)), causal=True)
    step = jax.jit(linear.linear_attention_step)
    for t in range(CHUNK, CHUNK + 11):
        got, state = step(q[:, t], k[:, t], v[:, t], state)
        np.testing.assert_allclose(got, want[:, t], atol=1e-5)


def test_states_stay_in_float32():
    q, k, v, mask = (x.astype(jnp.bfloat16) if x.ndim > 2 else x for x in on_jax(*draw(9)))
    got, state = linear_attention(q, k, v, mask, causal=True)
    assert (got.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
