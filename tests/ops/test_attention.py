"""Local and linear attention against explicit pairwise sums, at lengths that no block divides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops import attention as ops
from spectral_pod.ops import linear_attention as linear
from spectral_pod.ops.linear_attention import CHUNK

B, H, K = 2, 3, 4
attention = jax.jit(ops.attention, static_argnames="causal")
local_attention = jax.jit(ops.local_attention, static_argnames=("before", "after"))
linear_attention = jax.jit(linear.linear_attention, static_argnames="causal")


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 23])
def test_attention_equals_all_pairs(length, causal):
    inputs = draw(length)
    want, some = softmax_pairs(*inputs, lambda lag: (lag >= 0) | (not causal))
    got = np.asarray(attention(*on_jax(*inputs), causal=causal))
    np.testing.assert_allclose(got[some], want[some], atol=1e-5)


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
